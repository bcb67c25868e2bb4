"""Documents out of files: every one, in order, and every fault with file and line."""

import gzip
import json
import sys
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from factories import text
from scionlm.core.errors import DataError, StorageError, UsageError
from scionlm.data import DomainConfig
from scionlm.data.reading.corpora import Corpora
from scionlm.data.reading.documents import Document, Problems, Reader
from scionlm.data.reading.files import DataFile, find_files, parts_of
from scionlm.data.reading.zst import open_zst

quick = settings(max_examples=60)


def actions(on_error="stop") -> dict:
    return Corpora(domains={"x": DomainConfig(paths=["x"])}, on_error=on_error).on_error


STRICT = actions({})
"""What stands without any setting: everything stops, but for empty texts."""


def read(*files: Path, text_key: str = "text", on_error=STRICT, max_bytes: int = 2**20) -> list[Document]:
    found = [DataFile(str(path), path.stat().st_size if path.exists() else 0) for path in files]
    return list(Reader(text_key, max_bytes, Problems(on_error)).read(found))


def texts(*files: Path, **settings) -> list[str]:
    return [document.text for document in read(*files, **settings)]


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
    found = read(path)
    assert [document.text for document in found] == documents
    assert [document.origin for document in found] == [f"{path}:{i + 1}" for i in range(len(documents))]


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.txt", "x.py", "x.json5", "Makefile"])
def test_any_other_file_is_one_document_with_its_line_ends_kept(tmp_path, name, kind):
    content = "def f():\r\n\treturn 'né 😀'\n\n"
    (tmp_path / (name + kind)).write_bytes(packed(kind, content.encode()))
    assert texts(tmp_path / (name + kind)) == [content]


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
def test_json_is_refused_with_the_name_it_may_have_unless_it_is_to_be_skipped(tmp_path, kind):
    path, other = tmp_path / f"x.json{kind}", tmp_path / "y.jsonl"
    path.write_bytes(packed(kind, jsonl("a", "b")))
    other.write_bytes(jsonl("c"))
    with pytest.raises(DataError, match=r"x\.json.* is \.json, which is not read; rename it to \.jsonl if each line"):
        texts(path, other)
    assert texts(path, other, on_error=actions({"json": "skip"})) == ["c"]


def test_a_packed_file_of_several_parts_is_read_to_the_end(tmp_path):
    for kind in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{kind}"
        path.write_bytes(packed(kind, jsonl("a")) + packed(kind, jsonl("b")))
        assert texts(path) == ["a", "b"]


def test_blank_lines_and_empty_texts_are_passed_over_but_lines_are_still_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n  \n{"text": ""}\n{"text": "a"}\n\r\n{"text": " "}')
    assert [(d.text, d.origin) for d in read(path)] == [("a", f"{path}:4"), (" ", f"{path}:6")]
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
        (b"{", r":3 is not JSON"),
        (b"[" * 100_000, r":3 is not JSON"),
        (b'{"body": "x"}', r":3 has no text under text_key 'text' \(found: body\)"),
        (b'{"text": 5}', r":3: text_key 'text' is a number, not text"),
        (b'{"text": 0.5}', r":3: text_key 'text' is a number, not text"),
        (b'{"text": null}', r":3: text_key 'text' is null, not text"),
        (b'{"text": false}', r":3: text_key 'text' is true or false, not text"),
        (b'{"text": ["a"]}', r":3: text_key 'text' is a list, not text"),
        (b'{"text": {"a": "b"}}', r":3: text_key 'text' is an object, not text"),
        (b'["text"]', r":3 has no text .*\(found: list\)"),
        (b'{"text": "\xff"}', r":3 is not UTF-8 .* at byte 10 of the line"),
    ],
    ids=["json", "nesting", "key", "number", "fraction", "null", "truth", "list", "object", "no-object", "utf-8"],
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
    with pytest.raises(DataError, match=r"x\.txt:3 is not UTF-8 .*at byte 11"):
        texts(tmp_path / "x.txt")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("a", "b" * 2000))
    with pytest.raises(DataError, match=r"x\.jsonl:2: more than max_document_bytes 1000 in one line"):
        texts(path, max_bytes=1000)
    path.write_bytes(jsonl("a", "b" * 900))
    assert len(texts(path, max_bytes=1000)) == 2


def test_a_file_larger_than_a_document_may_be_is_refused_by_name(tmp_path):
    (tmp_path / "x.txt").write_text("x" * 1001)
    with pytest.raises(DataError, match=r"x\.txt has more than max_document_bytes 1000"):
        texts(tmp_path / "x.txt", max_bytes=1000)
    assert len(texts(tmp_path / "x.txt", max_bytes=1001)) == 1


BAD = {
    "encoding": b'{"text": "\xff"}',
    "json": b"{",
    "field": b'{"body": "x"}',
    "length": b'{"text": "' + b"y" * 300 + b'"}',
    "empty": b'{"text": ""}',
}


@pytest.mark.parametrize("kind", BAD)
def test_each_problem_stops_or_is_skipped_and_counted_as_asked(tmp_path, capsys, kind):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl("a") + 5 * (BAD[kind] + b"\n") + jsonl("b"))
    with pytest.raises(DataError, match=rf"x\.jsonl:2.*on_error: {{{kind}: skip}}"):
        texts(path, on_error=actions({kind: "stop"}), max_bytes=200)
    capsys.readouterr()
    problems = Problems(actions({kind: "skip"}))
    found = list(Reader("text", 200, problems).read([DataFile(str(path), 1)]))
    assert [(d.text, d.origin) for d in found] == [("a", f"{path}:1"), ("b", f"{path}:7")]
    assert problems.skipped == {kind: 5}
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == (0 if kind == "empty" else 3)
    assert all(f"{path}:{i + 2}" in line for i, line in enumerate(shown))
    assert not shown or "counted only" in shown[-1]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.zst", "x.parquet"])
def test_a_broken_file_can_be_skipped(tmp_path, name):
    (tmp_path / name).write_bytes(b"not packed at all")
    (tmp_path / "y.txt").write_text("good")
    with pytest.raises(DataError, match=name):
        texts(tmp_path / name, tmp_path / "y.txt")
    assert texts(tmp_path / name, tmp_path / "y.txt", on_error=actions("skip")) == ["good"]


def test_an_empty_file_is_named_where_it_is_to_stop(tmp_path):
    for name in ("x.jsonl", "x.txt"):
        (tmp_path / name).write_bytes(b"")
        assert texts(tmp_path / name) == []
        with pytest.raises(DataError, match=rf"{name} is empty"):
            texts(tmp_path / name, on_error=actions("stop"))


def write_parquet(path: Path, columns: dict, **settings) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("rows", [1, 3, 1024, 3000])
def test_the_rows_of_a_parquet_file_are_documents(tmp_path, rows):
    content = [f"{i} né 😀\n{text(i, 3)}" for i in range(rows)]
    columns = {"text": content, "id": [str(i) for i in range(rows)]}
    path = write_parquet(tmp_path / "x.parquet", columns, row_group_size=700)
    assert texts(path) == content
    assert read(path)[-1].origin == f"{path}: row {rows}"
    assert texts(path, text_key="id") == columns["id"]


def test_faults_of_a_parquet_file_are_named_with_file_and_row(tmp_path):
    import pyarrow

    path = write_parquet(tmp_path / "x.parquet", {"text": ["a", None, ""], "n": [1, 2, 3]})
    with pytest.raises(DataError, match=r"x\.parquet: row 2 has nothing in the column 'text'"):
        texts(path)
    with pytest.raises(DataError, match=r"x\.parquet has no column 'body' \(has: .*text, n"):
        texts(path, text_key="body")
    with pytest.raises(DataError, match="row 1 has int in the column 'n'"):
        texts(path, text_key="n")
    assert texts(path, on_error=actions("skip")) == ["a"]
    bad = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "y.parquet", {"text": bad})
    with pytest.raises(DataError, match=r"y\.parquet: row 2 is not UTF-8 .* at byte 0"):
        texts(path)


def test_output_of_datatrove_is_read_as_it_is(tmp_path):
    """Its writers make gzipped lines and parquet with text, id and metadata."""
    records = [{"text": t, "id": f"id/{i}", "metadata": {"url": "u"}} for i, t in enumerate(["one", "two"])]
    (tmp_path / "00000.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    columns = {key: [record[key] for record in records] for key in records[0]}
    write_parquet(tmp_path / "00001.parquet", columns)
    assert texts(tmp_path / "00000.jsonl.gz", tmp_path / "00001.parquet") == ["one", "two"] * 2


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
    return [str(file.path.relative_to(root)) for file in find_files(DomainConfig(paths=list(paths)), root, "d")]


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
    assert [file.path.relative_to(tmp_path).as_posix() for file in found] == ["src/a.py", "src/deep/b.py"]


@quick
@given(st.lists(st.integers(0, 3 * 2**25), max_size=40))
def test_parts_hold_every_file_once_in_order_and_are_small_unless_one_file_is_large(sizes):
    files = [DataFile(f"{i:03d}", size) for i, size in enumerate(sizes)]
    parts = parts_of(files)
    assert [file for part in parts for file in part] == files
    assert all(sum(file.size for file in part) <= 2**25 or len(part) == 1 for part in parts)
    assert len(parts) <= 1 + 2 * sum(sizes) // 2**25


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip"])
def test_a_damaged_parquet_file_is_broken_wherever_a_bit_is_flipped(tmp_path, codec):
    """Its library raises many kinds of errors, of which none is the disk's."""
    whole = write_parquet(tmp_path / "x.parquet", {"text": [text(i, 40) for i in range(60)]}, compression=codec)
    data, met = whole.read_bytes(), Counter()
    for place in range(5, len(data) - 8, max(1, len(data) // 150)):
        broken = bytearray(data)
        broken[place] ^= 0x40
        path = tmp_path / "y.parquet"
        path.write_bytes(broken)
        try:
            texts(path, on_error=actions("skip"))
            texts(path, on_error=actions("stop"))
        except DataError as error:
            met["broken file" in str(error)] += 1
    assert met[True] > 20, "the flips did no harm"


def test_memory_that_runs_out_is_not_the_files_fault(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a"]})

    def full(*_, **__):
        raise pyarrow.ArrowMemoryError("out of memory")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", full)
    with pytest.raises(MemoryError):
        texts(path, on_error=actions("skip"))


def test_the_length_of_a_parquet_document_is_counted_in_bytes(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"text": ["é" * 60, "e" * 60]})
    assert texts(path, on_error=actions("skip"), max_bytes=100) == ["e" * 60]
    with pytest.raises(DataError, match="row 1 has 120 bytes"):
        texts(path, max_bytes=100)


def test_a_file_that_unpacks_to_very_much_is_unpacked_a_little_at_a_time(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=19).compress(b"a" * 2**28))
    tracemalloc.start()
    with open_zst(path) as stream:
        assert stream.readline(1000) == b"a" * 1000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**26, "a quarter of it was held at once"


def test_a_long_window_is_read(tmp_path):
    """As `zstd --long=28` makes it."""
    settings = zstandard.ZstdCompressionParameters(window_log=28, hash_log=10, chain_log=10, write_content_size=False)
    data = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "x.txt.zst").write_bytes(data.compress(b"some text\n") + data.flush())
    assert open_zst(tmp_path / "x.txt.zst").read() == b"some text\n"


@pytest.mark.parametrize("name", ["x.JSONL", "x.Jsonl.GZ", "x.ndjson.ZST"])
def test_endings_in_capitals_are_the_same(tmp_path, name):
    kind = "." + name.lower().rpartition(".")[2]
    path = tmp_path / name
    path.write_bytes(packed(kind if kind in (".gz", ".zst") else "", jsonl("one", "two")))
    assert texts(path) == ["one", "two"]


@pytest.mark.parametrize(("name", "package"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_a_file_whose_package_is_not_there_says_what_to_install(tmp_path, monkeypatch, name, package):
    if package == "pyarrow":
        write_parquet(tmp_path / name, {"text": ["a"]})
    else:
        (tmp_path / name).write_bytes(packed(".zst", jsonl("a")))
    assert texts(tmp_path / name) == ["a"]
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(DataError, match=rf"{name} needs the {package} package; pip install 'scionlm\[data\]'$"):
        read(tmp_path / name)
