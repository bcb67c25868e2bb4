"""Documents out of files: every one, in order, and every fault with file and line."""

import gzip
import json
import unicodedata
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import text
from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.data import DomainConfig
from scionlm.data.reading import documents as module
from scionlm.data.reading.documents import find_files, read_documents

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def texts(*files: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in read_documents(list(files), text_key)]


def jsonl(*documents: str) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def packed(kind: str, data: bytes) -> bytes:
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[kind](data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@quick
@given(documents=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=40), max_size=8))
def test_every_line_comes_back_in_order(folder, kind, documents):
    path = folder / f"x.jsonl{kind}"
    path.write_bytes(packed(kind, jsonl(*documents)))
    found = list(read_documents([path], "text"))
    assert [document.text for document in found] == documents
    assert [document.origin for document in found] == [f"{path}:{i + 1}" for i in range(len(documents))]


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.txt", "x.py", "x.json", "Makefile"])
def test_any_other_file_is_one_document_with_its_line_ends_kept(tmp_path, name, kind):
    content = "def f():\r\n\treturn 'né 😀'\n\n"
    (tmp_path / (name + kind)).write_bytes(packed(kind, content.encode()))
    assert texts(tmp_path / (name + kind)) == [content]


def test_a_packed_file_of_several_parts_is_read_to_the_end(tmp_path):
    for kind in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{kind}"
        path.write_bytes(packed(kind, jsonl("a")) + packed(kind, jsonl("b")))
        assert texts(path) == ["a", "b"]


def test_blank_lines_and_empty_texts_are_passed_over_but_lines_are_still_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n  \n{"text": ""}\n{"text": "a"}\n\r\n{"text": " "}')
    assert [(d.text, d.origin) for d in read_documents([path], "text")] == [("a", f"{path}:4"), (" ", f"{path}:6")]
    (tmp_path / "empty.txt").write_bytes(b"")
    assert texts(tmp_path / "empty.txt") == []


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl("hello"))
    assert texts(tmp_path / "x.txt", tmp_path / "x.jsonl") == ["hello", "hello"]


def test_texts_are_not_normalised(tmp_path):
    forms = [unicodedata.normalize(form, "é ﬁ Å") for form in ("NFC", "NFD", "NFKC")]
    (tmp_path / "x.jsonl").write_bytes(jsonl(*forms))
    assert texts(tmp_path / "x.jsonl") == forms


def test_the_text_may_have_another_key(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"content": "a", "text": "b"}\n')
    assert texts(tmp_path / "x.jsonl", text_key="content") == ["a"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", r":3: not JSON"),
        (b"[" * 100_000, r":3: not JSON"),
        (b'{"body": "x"}', r":3: no text under the key 'text' \(found: body\); set text_key"),
        (b'{"text": 5}', r":3: no text under the key 'text'"),
        (b'{"text": null}', r":3: no text"),
        (b'["text"]', r":3: no text .*\(found: list\)"),
        (b'{"text": "\xff"}', r":3: not UTF-8 .* at byte 10 of the line"),
    ],
    ids=["json", "nesting", "key", "number", "null", "list", "utf-8"],
)
def test_a_bad_line_is_a_data_error_with_file_and_line(tmp_path, line, match):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("a") + b"\n" + line + b"\n" + jsonl("b"))
    with pytest.raises(DataError, match=r"x\.jsonl" + match) as caught:
        texts(path)
    assert caught.value.exit_code == 65
    assert "\n" not in str(caught.value)


def test_half_a_character_from_a_json_escape_is_a_data_error_with_file_and_line(tmp_path):
    """No tokenizer takes it: found in the first pass it costs nothing, later it ends a run of hours."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("a") + b'{"text": "broken \\ud83d pair"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2"):
        texts(path)


def test_a_whole_pair_of_json_escapes_is_one_character(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "x.jsonl") == ["😀"]


def test_bad_utf_8_in_a_whole_file_is_named_with_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\nthr\xffee")
    with pytest.raises(DataError, match=r"x\.txt:3: not UTF-8 .*at byte 11"):
        texts(tmp_path / "x.txt")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MAX_LINE_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("a", "b" * 2000))
    with pytest.raises(DataError, match=r"x\.jsonl:2: the line has more than 1000 bytes"):
        texts(path)
    path.write_bytes(jsonl("a", "b" * 900))
    assert len(texts(path)) == 2


CUTS = [0.0, 0.05, 0.2, 0.5, 0.8, 0.95]


@pytest.mark.parametrize("inner", [".jsonl", ".txt"])
@pytest.mark.parametrize("kind", [".gz", ".zst"])
@pytest.mark.parametrize("share", [*CUTS, 1.0])
def test_a_packed_file_cut_short_is_a_data_error_and_never_less_text(tmp_path, kind, inner, share):
    whole = packed(kind, b"".join(jsonl(text(i, 60)) for i in range(200)))
    path = tmp_path / f"x{inner}{kind}"
    path.write_bytes(whole[: min(max(int(share * len(whole)), 1), len(whole) - 1)])
    with pytest.raises(DataError, match="x" + inner) as caught:
        texts(path)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_packed_file_with_a_flipped_bit_anywhere_is_a_data_error_or_the_same_text(tmp_path, kind):
    content = "\n".join(text(i, 20) for i in range(12))
    whole = packed(kind, content.encode())
    path = tmp_path / f"x.txt{kind}"
    refused = 0
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        try:
            assert texts(path) == [content]
        except DataError:
            refused += 1
    assert refused > len(whole) / 3 * 0.9


@pytest.mark.parametrize("kind", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"plain text, not packed\n", b"\xff" * 50])
def test_what_is_not_packed_but_says_so_is_a_data_error(tmp_path, kind, content):
    (tmp_path / f"x.txt{kind}").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.txt"):
        texts(tmp_path / f"x.txt{kind}")


def test_a_file_that_vanished_is_a_storage_error(tmp_path):
    for name in ("gone.txt", "gone.jsonl", "gone.jsonl.gz", "gone.jsonl.zst"):
        with pytest.raises(StorageError, match=name):
            texts(tmp_path / name)


def found(root: Path, *paths: str) -> list[str]:
    return [str(path.relative_to(root)) for path in find_files(DomainConfig(paths=list(paths)), root, "d")]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a.txt", "src/x.py", "src/deep/y.py", "notes [draft].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_files_come_in_sorted_order_each_once(tree):
    assert found(tree, "b.txt", "[ab].txt", "./b.txt") == ["a.txt", "b.txt"]
    assert found(tree, "src/**/*.py") == ["src/deep/y.py", "src/x.py"]
    assert found(tree, str(tree / "a.txt"), "a.txt") == ["a.txt"]


def test_a_file_named_by_two_spellings_is_read_once(tree):
    assert len(found(tree, "a.txt", "src/../a.txt")) == 1


def test_a_file_whose_name_looks_like_a_pattern_is_found_by_its_name(tree):
    assert found(tree, "notes [draft].txt") == ["notes [draft].txt"]


def test_a_pattern_that_matches_nothing_is_a_data_error_that_names_it(tree):
    for pattern in ("*.md", "gone.txt", "gone", str(tree / "nowhere" / "*.txt")):
        with pytest.raises(DataError, match=r"domains\.d\.paths: .* matches no file") as caught:
            found(tree, "a.txt", pattern)
        assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("pattern", ["", ".", "/", "a\0b"])
def test_what_is_no_pattern_is_refused(tree, pattern):
    with pytest.raises((UsageError, DataError), match=r"domains\.d\.paths"):
        found(tree, pattern)


def test_a_folder_is_every_file_in_it_but_for_hidden_ones(tmp_path):
    for name in ("src/a.py", "src/deep/b.py", "src/.git/c.py", "src/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = find_files(DomainConfig(paths=["src"]), tmp_path, "code")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["src/a.py", "src/deep/b.py"]
