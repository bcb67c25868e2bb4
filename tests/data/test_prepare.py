"""`prepare`: no token lost, none twice, the same bytes whatever happens on the way."""

import errno
import gzip
import importlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.numpy
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import corpora_file, text
from scionlm.core.config import validate
from scionlm.core.errors import DataError, ScionError, StoppedError, StorageError, UsageError
from scionlm.data import Corpora, DataFolder, load_corpora, prepare
from scionlm.data.preparing import fates, job, units
from scionlm.data.preparing import survey as survey_module
from scionlm.data.preparing.prepare import warn_of_split
from scionlm.data.reading import files
from scionlm.sources import load_tokenizer

module = importlib.import_module("scionlm.data.preparing.prepare")  # the package has the function under this name
quick = settings(max_examples=15)


def corpora(tokenizer: Path, domains: dict[str, list[str]] | None = None, **settings) -> Corpora:
    domains = {name: {"paths": paths} for name, paths in (domains or {"x": ["x.jsonl"]}).items()}
    return validate(Corpora, {"tokenizer": str(tokenizer), "domains": domains} | settings, "corpora")


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Return different texts, some with characters of several bytes, one with what looks like a separator."""
    rng = random.Random(seed)
    texts = [f"{i} {text(seed + i, rng.randrange(1, 60))}" for i in range(count)]
    texts[0] = "naïve café 😀 日本語 \r\n\t é ﬁ"
    texts[1] = "before <|endoftext|> after"
    texts[2] = " "
    return texts


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def split_texts(out: Path, domain: str, split: str) -> list[tuple[int, ...]]:
    """Return the documents of a split as tokens with their separators, read without any code of ours."""
    documents = []
    for path in sorted((out / domain).glob(f"{split}-*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        start = 0
        for end in tensors["document_ends"].tolist():
            documents.append(tuple(tensors["tokens"][start:end].tolist()))
            start = end
        assert start == len(tensors["tokens"])
    return documents


def is_subsequence(part: list, whole: list) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


@pytest.fixture
def small_units(monkeypatch):
    """Parts, units and chunks so small that a few documents make several."""
    sizes(monkeypatch, unit=1500, chunk=400, part=4000)


def sizes(monkeypatch, unit=units.UNIT_BYTES, chunk=units.CHUNK_BYTES, part=files.PART_BYTES) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit)
    monkeypatch.setattr(job, "UNIT_BYTES", unit)
    monkeypatch.setattr(units, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(files, "PART_BYTES", part)


@pytest.mark.parametrize("unit_bytes", [1, 1500, 2**25])
def test_the_tokens_are_those_of_each_document_alone_with_a_separator_after_each(
    tiny_folder, tmp_path, monkeypatch, unit_bytes
):
    sizes(monkeypatch, unit=unit_bytes)
    documents = some_texts(30)
    write_jsonl(tmp_path / "x.jsonl", documents)
    prepare(corpora(tiny_folder, held_out={"fraction": 0.2, "min_documents": 5}), tmp_path, tmp_path / "out")
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.encode_special_tokens = True  # what looks like a separator in a text is text
    expected = [(*tokenizer.encode(document, add_special_tokens=False).ids, 0) for document in documents]
    assert all(document.count(0) == 1 for document in expected)
    train, held_out = (split_texts(tmp_path / "out", "x", split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(expected)
    assert is_subsequence(train, expected)
    assert is_subsequence(held_out, expected)
    assert train
    assert held_out


def test_a_lost_or_doubled_or_changed_token_would_be_found_out():
    """The control for the comparison above."""
    expected = [(1, 2, 0), (3, 0), (4, 5, 0)]
    for wrong in ([(1, 2, 0), (3, 0)], [(1, 2, 0), (3, 0), (3, 0), (4, 5, 0)], [(1, 2, 0), (3, 0), (4, 6, 0)]):
        assert sorted(wrong) != sorted(expected)
    assert not is_subsequence([(3, 0), (1, 2, 0)], expected)
    assert is_subsequence([(1, 2, 0), (4, 5, 0)], expected)


def test_the_index_counts_what_is_there(tiny_folder, tmp_path, small_units):
    documents = some_texts(30)
    write_jsonl(tmp_path / "x.jsonl", documents)
    index = prepare(corpora(tiny_folder), tmp_path, tmp_path / "out")
    splits = index["domains"]["x"]
    assert sum(splits[split]["num_bytes"] for split in splits) == sum(len(d.encode()) for d in documents)
    assert sum(splits[split]["num_documents"] for split in splits) == 30
    assert len(splits["train"]["shards"]) > 2
    data = DataFolder(tmp_path / "out")
    tokenizer = load_tokenizer(tiny_folder)
    for split in splits:
        stream = data.stream("x", split, verify=True)
        assert stream.num_tokens == splits[split]["num_tokens"]
        assert stream.num_documents == splits[split]["num_documents"]
        for document in stream.documents():
            decoded = tokenizer.decode(
                stream.read(document.start, document.end - document.start), skip_special_tokens=False
            )
            assert decoded in documents
            assert document.num_bytes == len(decoded.encode())


def test_bytes_do_not_depend_on_the_number_of_workers(tiny_folder, tmp_path, small_units):
    root = tmp_path
    path = corpora_file(root, tiny_folder)
    for workers in (1, 2, 4):
        prepare(load_corpora(path), root, root / f"out{workers}", workers=workers)
    assert folder_bytes(root / "out1") == folder_bytes(root / "out2") == folder_bytes(root / "out4")
    assert len(folder_bytes(root / "out1")) > 20


def test_bytes_do_not_depend_on_the_size_of_a_workers_portion(tiny_folder, tmp_path, monkeypatch):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20)
    for size in (1, 500, 2**19):
        sizes(monkeypatch, unit=3000, chunk=size)
        prepare(load_corpora(path), tmp_path, tmp_path / f"out{size}")
    assert (
        folder_bytes(tmp_path / "out1") == folder_bytes(tmp_path / "out500") == folder_bytes(tmp_path / f"out{2**19}")
    )


def killed_at(action, number: int, after: bool) -> bool:
    """Run `action` in a process that dies at its `number`-th atomic write, before or after it; return whether it did.

    Every file comes into place by `Path.replace`, so that these are all the moments at which a kill can leave one state
    of the folder or another.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    try:
        replace, calls = Path.replace, iter(range(1, 10**6))

        def counted(self, target):
            now = next(calls) == number
            if now and not after:
                os._exit(9)
            result = replace(self, target)
            if now:
                os._exit(9)
            return result

        Path.replace = counted
        action()
    finally:
        os._exit(0)


LIMITED = {"dedupe": "near", "held_out": {"fraction": 0.2, "min_documents": 3}}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("asked", [{}, LIMITED], ids=["plain", "near"])
def test_a_kill_at_any_write_and_the_same_command_again_give_the_same_bytes(
    tiny_folder, tmp_path, small_units, after, asked
):
    path = corpora_file(tmp_path, tiny_folder, num_documents=12, words=60)
    wanted = load_corpora(path).model_copy(update=dict(corpora(tiny_folder, **asked)) | {"domains": DOMAINS(path)})
    prepare(wanted, tmp_path, tmp_path / "whole")
    expected = folder_bytes(tmp_path / "whole")
    kills = 0
    while killed_at(lambda: prepare(wanted, tmp_path, tmp_path / "out"), kills + 1, after):
        kills += 1
        out = tmp_path / "out"
        if not (out / "index.json").exists():
            with pytest.raises((DataError, UsageError)):  # an unfinished folder is not taken for a finished one
                DataFolder(out)
        prepare(wanted, tmp_path, out)
        assert folder_bytes(out) == expected
        shutil.rmtree(out)
    assert folder_bytes(tmp_path / "out") == expected
    assert kills >= 20


def DOMAINS(path: Path) -> dict:
    """Return the domains of a corpora file, one of them with a limit."""
    domains = dict(load_corpora(path).domains)
    name = next(iter(domains))
    return domains | {name: domains[name].model_copy(update={"max_tokens": 400})}


def test_many_kills_of_one_run_give_the_same_bytes(tiny_folder, tmp_path, small_units):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20, words=60)
    prepare(load_corpora(path), tmp_path, tmp_path / "whole")
    kills = 0
    while killed_at(lambda: prepare(load_corpora(path), tmp_path, tmp_path / "out"), 4, after=False):
        kills += 1  # a unit is two shards and an entry: each life gets one further
        assert kills < 100
    assert kills > 5
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_processes_that_share_the_work_write_the_same_bytes_as_one(tiny_folder, tmp_path, small_units):
    """Several machines or ranks, started together or late, one of them killed on the way."""
    corpora_file(tmp_path, tiny_folder, num_documents=60, words=60)
    for name in ("alpha", "beta"):  # several files, so that there are several parts
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines(keepends=True)
        for i in range(6):
            (tmp_path / f"{name}-{i}.jsonl").write_text("".join(lines[i::6]))
    wanted = corpora(tiny_folder, {"alpha": ["alpha-*.jsonl"], "beta": ["beta-*.jsonl"]})
    prepare(wanted, tmp_path, tmp_path / "whole")
    children, begun = [], tmp_path / "out" / ".prepare" / "alpha" / "00001.survey"
    for number in range(4):
        deadline = time.monotonic() + 60
        while number == 1 and not begun.exists():  # so that the first has some of the work, and its kill comes
            assert time.monotonic() < deadline
            time.sleep(0.001)
        child = os.fork()
        if not child:
            try:
                if number == 0:
                    assert killed_at(lambda: prepare(wanted, tmp_path, tmp_path / "out"), 5, after=True)
                else:
                    prepare(wanted, tmp_path, tmp_path / "out")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0, 0]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_processes_that_begin_at_the_same_moment_all_claim_the_folder(tmp_path):
    """None takes what another leaves for an instant, a probe or a claim, for somebody else's data."""
    for turn in range(25):
        begin = time.monotonic() + 0.03
        children = []
        for _ in range(8):
            child = os.fork()
            if not child:
                try:
                    while time.monotonic() < begin:
                        pass
                    module._claim(tmp_path / str(turn), "the same")
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8


@pytest.mark.parametrize("failure", [StorageError("gone"), FileNotFoundError("gone")])
def test_what_is_missing_because_another_process_has_finished_is_no_failure(
    tiny_folder, tmp_path, monkeypatch, failure
):
    path = corpora_file(tmp_path, tiny_folder)
    survey_part = module.survey_part

    def meanwhile(*arguments):
        monkeypatch.setattr(module, "survey_part", survey_part)
        shutil.copytree(done, tmp_path / "out", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "out" / ".prepare")
        raise failure

    done = tmp_path / "done"
    wanted = prepare(load_corpora(path), tmp_path, done)
    monkeypatch.setattr(module, "survey_part", meanwhile)
    assert prepare(load_corpora(path), tmp_path, tmp_path / "out") == wanted
    assert folder_bytes(tmp_path / "out") == folder_bytes(done)


def test_a_resumed_run_does_not_write_finished_shards_again(tiny_folder, tmp_path, small_units):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20)
    assert killed_at(lambda: prepare(load_corpora(path), tmp_path, tmp_path / "out"), 14, after=False)
    finished = sorted((tmp_path / "out").rglob("*.safetensors"))
    stamps = [shard.stat().st_mtime_ns for shard in finished]
    assert len(stamps) > 2
    prepare(load_corpora(path), tmp_path, tmp_path / "out")
    assert (
        sum(shard.stat().st_mtime_ns == stamp for shard, stamp in zip(finished, stamps, strict=True)) >= len(stamps) - 2
    )


def test_a_shard_that_was_damaged_while_stopped_is_found_on_resuming(tiny_folder, tmp_path, small_units, monkeypatch):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20)
    assert killed_at(lambda: prepare(load_corpora(path), tmp_path, tmp_path / "out"), 14, after=False)
    shard = tmp_path / "out" / "alpha" / "train-00000-00000.safetensors"
    whole = safetensors.numpy.load_file(shard)["tokens"].tobytes()
    data = shard.read_bytes()
    at = data.index(whole)
    shard.write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    with pytest.raises(DataError, match=r"train-00000-00000\.safetensors does not match its sha256"):
        prepare(load_corpora(path), tmp_path, tmp_path / "out")


def test_a_full_disk_says_so_and_the_same_command_goes_on(tiny_folder, tmp_path, small_units, monkeypatch):
    path = corpora_file(tmp_path, tiny_folder, num_documents=8, words=40)
    prepare(load_corpora(path), tmp_path, tmp_path / "whole")
    calls = iter(range(10**6))
    original = os.fsync

    def full(handle):
        if next(calls) >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full") as caught:
            prepare(load_corpora(path), tmp_path, tmp_path / "out")
    assert caught.value.exit_code == 74
    prepare(load_corpora(path), tmp_path, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_finished_folder_is_returned_unchanged(tiny_folder, tmp_path):
    path = corpora_file(tmp_path, tiny_folder)
    first = prepare(load_corpora(path), tmp_path, tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert prepare(load_corpora(path), tmp_path, tmp_path / "out") == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == stamps


def test_other_corpora_settings_or_tokenizer_in_the_same_folder_are_refused(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    write_jsonl(tmp_path / "y.jsonl", some_texts(12, seed=50))
    good = corpora(tiny_folder)
    prepare(good, tmp_path, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["house"])
    tokenizer.save(str(other / "tokenizer.json"))
    for changed in (
        corpora(tiny_folder, {"x": ["y.jsonl"]}),
        corpora(tiny_folder, {"x": ["x.jsonl"], "y": ["y.jsonl"]}),
        corpora(tiny_folder, {"renamed": ["x.jsonl"]}),
        corpora(tiny_folder, held_out={"min_documents": 2}),
        corpora(tiny_folder, separator="a"),
        corpora(other),
    ):
        with pytest.raises(UsageError, match="other corpora, settings or tokenizer"):
            prepare(changed, tmp_path, tmp_path / "out")
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UsageError, match="other corpora"):
        prepare(good, tmp_path, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == before


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty"):
        prepare(corpora(tiny_folder), tmp_path, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_a_ledger_that_is_broken_is_a_data_error(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    (tmp_path / "out").mkdir()
    for content in ("{", '{"format_version": 2}', '{"format_version": 1}'):
        (tmp_path / "out" / "prepare.json").write_text(content)
        with pytest.raises(DataError, match=r"prepare\.json"):
            prepare(corpora(tiny_folder), tmp_path, tmp_path / "out")


def counts(tiny_folder: Path, documents: list[str], fraction: float, min_documents: int) -> tuple[list, list]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_jsonl(root / "x.jsonl", documents)
        settings = corpora(tiny_folder, held_out={"fraction": fraction, "min_documents": min_documents})
        prepare(settings, root, root / "out", workers=1)
        return split_texts(root / "out", "x", "train"), split_texts(root / "out", "x", "held_out")


splits = st.tuples(st.integers(2, 30), st.floats(0.001, 0.999), st.integers(1, 40), st.integers(0, 10**6))


@quick
@given(splits)
def test_at_least_the_asked_documents_are_held_out_where_half_are_enough(tiny_folder, split):
    number, fraction, min_documents, seed = split
    train, held_out = counts(tiny_folder, [f"{seed} {i}" for i in range(number)], fraction, min_documents)
    assert len(train) + len(held_out) == number
    assert len(held_out) >= min(min_documents, number // 2)
    assert not set(train) & set(held_out)


@quick
@given(splits)
def test_never_more_than_half_of_the_documents_are_held_out(tiny_folder, split):
    number, fraction, min_documents, seed = split
    train, held_out = counts(tiny_folder, [f"{seed} {i}" for i in range(number)], fraction, min_documents)
    assert len(held_out) <= number / 2
    assert train


def test_the_share_is_near_the_asked_fraction(tiny_folder):
    train, held_out = counts(tiny_folder, [f"document {i}" for i in range(2000)], 0.1, 1)
    assert len(train) + len(held_out) == 2000
    assert 150 < len(held_out) < 250


@pytest.mark.parametrize("seed", range(6))
def test_half_of_many_documents_can_be_asked_for_and_chance_does_not_refuse_it(tiny_folder, monkeypatch, seed):
    monkeypatch.setattr(fates, "_EXACT_DOCUMENTS", 400)
    train, held_out = counts(tiny_folder, [f"{seed} {i}" for i in range(600)], 0.5, 1)
    assert len(train) + len(held_out) == 600
    assert 180 < len(held_out) <= 300


@quick
@given(st.lists(st.integers(0, 8), min_size=2, max_size=30).filter(lambda numbers: len(set(numbers)) > 1))
def test_equal_texts_always_fall_on_one_side(tiny_folder, numbers):
    train, held_out = counts(tiny_folder, [f"document {i}" for i in numbers], 0.2, 3)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(numbers)
    assert held_out


@pytest.mark.parametrize(
    "numbers", [(0, 1, 1, 1), (1, 0, 0, 0), (0, 1, 1, 1, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0, 0, 0)], ids=str
)
def test_duplicates_never_leave_a_split_without_text(tiny_folder, numbers):
    """Both ways round, because one of two texts has the lower hash: whichever is repeated, the other is left."""
    train, held_out = counts(tiny_folder, [f"document {i}" for i in numbers], 0.01, 3)
    assert train
    assert held_out
    assert not set(train) & set(held_out)


def test_a_domain_of_one_text_many_times_cannot_be_split(tiny_folder):
    with pytest.raises(DataError, match="x"):
        counts(tiny_folder, ["the same"] * 9, 0.1, 2)


def test_the_split_of_a_document_depends_on_its_text_and_not_on_its_place(tiny_folder):
    documents = [f"document {i}" for i in range(60)]
    shuffled = documents[:]
    random.Random(0).shuffle(shuffled)
    first, second = (counts(tiny_folder, order, 0.1, 5) for order in (documents, shuffled))
    assert set(first[1]) == set(second[1])
    assert first[1] != second[1]


def test_packed_plain_and_source_files_hold_the_same_text(tiny_folder, tmp_path):
    """The same documents, as lines packed in three ways and as files of their own."""
    documents = sorted(some_texts(12))
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d" / "deep").mkdir(parents=True)
    for number, document in enumerate(documents):
        kind = number % 3
        suffix = (".txt", ".py.gz", ".md.zst")[kind]
        data = (bytes, gzip.compress, zstandard.compress)[kind](document.encode())
        (tmp_path / "d" / "deep" / f"{number:02d}{suffix}").write_bytes(data)
    domains = {"a": ["a.jsonl"], "b": ["*.jsonl.gz"], "c": ["c.jsonl.zst"], "d": ["d/**/*"]}
    prepare(corpora(tiny_folder, domains, held_out={"min_documents": 4}), tmp_path, tmp_path / "out")
    for split in ("train", "held_out"):
        expected = split_texts(tmp_path / "out", "a", split)
        assert expected
        assert all(split_texts(tmp_path / "out", name, split) == expected for name in "bcd")


def test_a_separator_of_ones_own_stands_after_every_document(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    prepare(corpora(tiny_folder, separator="a"), tmp_path, tmp_path / "out")
    letter = load_tokenizer(tiny_folder).get_vocab()["a"]
    for split in ("train", "held_out"):
        assert {document[-1] for document in split_texts(tmp_path / "out", "x", split)} == {letter}
    assert DataFolder(tmp_path / "out").tokenizer.separator == "a"


def test_a_tokenizer_that_asks_to_cut_or_pad_loses_and_adds_nothing(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    prepare(corpora(tiny_folder), tmp_path, tmp_path / "plain")
    asks = Path(shutil.copytree(tiny_folder, tmp_path / "asks"))
    tokenizer = load_tokenizer(asks)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(asks / "tokenizer.json"))
    prepare(corpora(asks), tmp_path, tmp_path / "out")
    for split in ("train", "held_out"):
        assert split_texts(tmp_path / "out", "x", split) == split_texts(tmp_path / "plain", "x", split)


def fails(corpora: Corpora, root: Path, kind: type[ScionError], match: str) -> None:
    """The request is refused with its exit code in one line, and no folder is left."""
    with pytest.raises(kind, match=match) as caught:
        prepare(corpora, root, root / "out")
    assert "\n" not in str(caught.value)
    assert not (root / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text"\n', r"x\.jsonl:3 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"x\.jsonl:2 has no text under text_key 'text' \(found: body\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2 is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"x\.jsonl:2"),
        ("x.txt", b"one\ntwo \xff\n", r"x\.txt:2 is not UTF-8"),
        ("x.jsonl", b"", r"domains\.x: the 1 file\(s\) hold no text"),
        ("x.jsonl", b'\n{"text": ""}\n', "hold no text"),
        (
            "x.txt",
            b"all in one",
            r"domains\.x: one document only;.*\(a \.txt is one document: give several files, or a \.jsonl",
        ),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 50)[:-9], r"x\.jsonl\.gz is a broken file"),
        ("x.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xff\xff\xff\xff", r"x\.jsonl\.gz"),
        ("x.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 50)[:-3], r"x\.jsonl\.zst"),
        ("x.jsonl.zst", b"not packed at all", r"x\.jsonl\.zst is a broken"),
    ],
    ids=[
        "json",
        "key",
        "utf-8",
        "surrogate",
        "text",
        "empty",
        "blank",
        "one",
        "gz-cut",
        "gz-bad",
        "zst-cut",
        "zst-bad",
    ],
)
def test_broken_data_is_a_data_error_with_its_place_and_leaves_nothing(tiny_folder, tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    fails(corpora(tiny_folder, {"x": [name]}), tmp_path, DataError, match)


def test_a_fault_in_the_last_file_is_found_before_anything_is_written(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", some_texts(12))
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{\n')
    fails(corpora(tiny_folder, {"a": ["a.jsonl"], "b": ["b.jsonl"]}), tmp_path, DataError, r"b\.jsonl:2")


def test_a_wrong_request_has_its_own_exit_code_and_leaves_nothing(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    fails(corpora(tiny_folder, {"x": ["*.md"]}), tmp_path, DataError, r"domains\.x\.paths: '\*\.md' matches no file")
    fails(corpora(tiny_folder, separator="<nothing>"), tmp_path, UsageError, "separator '<nothing>' is not a token")
    fails(corpora(tmp_path / "nowhere"), tmp_path, UsageError, "no such file or folder")
    (tmp_path / "model").mkdir()
    fails(corpora(tmp_path / "model"), tmp_path, DataError, "not a Hugging Face model folder")


def test_a_missing_tokenizer_is_a_data_error(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    broken = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (broken / "tokenizer.json").unlink()
    fails(corpora(broken), tmp_path, DataError, r"tokenizer\.json is missing")


def test_an_output_below_a_file_is_a_storage_error(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    with pytest.raises(StorageError) as caught:
        prepare(corpora(tiny_folder), tmp_path, tmp_path / "x.jsonl" / "out")
    assert caught.value.exit_code == 74


def test_an_output_that_is_a_file_is_a_wrong_request(tiny_folder, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    with pytest.raises(UsageError, match=r"x\.jsonl exists and is not a folder"):
        prepare(corpora(tiny_folder), tmp_path, tmp_path / "x.jsonl")
    with pytest.raises(UsageError, match=r"is a folder; name a YAML file"):
        load_corpora(tmp_path)


def test_a_tokenizer_is_looked_for_beside_the_corpora_and_then_here(tiny_folder, tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    write_jsonl(beside / "x.jsonl", some_texts(12))
    monkeypatch.chdir(here)
    fails(
        corpora("tok"),
        beside,
        UsageError,
        r"^tokenizer: model 'tok': no such file or folder.*looked for in .*beside, then",
    )
    shutil.copytree(tiny_folder, here / "tok")
    assert prepare(corpora("tok"), beside, tmp_path / "one")["tokenizer"]["name"] == "tok"
    shutil.copytree(tiny_folder, beside / "tok")
    assert prepare(corpora("tok"), beside, tmp_path / "two")["tokenizer"]["name"] == str(beside / "tok")


@pytest.mark.parametrize(
    ("fraction", "minimum", "is_said"), [(0.5, 1, False), (0.1, 20, True), (0.2, 1, False), (0.01, 6, True)]
)
def test_a_held_out_part_far_beyond_its_share_is_said(tiny_folder, tmp_path, capsys, fraction, minimum, is_said):
    write_jsonl(tmp_path / "x.jsonl", ["word " * 40 + str(number) for number in range(40)])
    asked = corpora(tiny_folder, held_out={"fraction": fraction, "min_documents": minimum})
    warn_of_split(asked, prepare(asked, tmp_path, tmp_path / "out"))
    said = capsys.readouterr().err
    assert ("tokens are held out" in said) == is_said
    assert not is_said or f"lower held_out.min_documents ({minimum}), or give more documents" in said


def test_text_that_changes_between_the_two_passes_is_found(tiny_folder, tmp_path, monkeypatch):
    documents = some_texts(12)
    write_jsonl(tmp_path / "x.jsonl", documents)
    original = module.settle

    def settle_then_change(*args):
        original(*args)
        write_jsonl(tmp_path / "x.jsonl", changed)

    monkeypatch.setattr(module, "settle", settle_then_change)
    changed = documents[:6]
    for number, text_then in enumerate([documents[:6], [*documents, "more"], [*documents[1:], documents[0]]]):
        changed = text_then
        write_jsonl(tmp_path / "x.jsonl", documents)
        for _ in range(2):  # it does not come right by being tried again
            with pytest.raises((DataError, UsageError), match=r"changed|other corpora"):
                prepare(corpora(tiny_folder), tmp_path, tmp_path / f"out{number}")


def test_files_that_were_only_touched_are_read_again_and_the_work_goes_on(tiny_folder, tmp_path, small_units):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20)
    prepare(load_corpora(path), tmp_path, tmp_path / "whole")
    assert killed_at(lambda: prepare(load_corpora(path), tmp_path, tmp_path / "out"), 14, after=False)
    for name in ("alpha", "beta"):
        os.utime(tmp_path / f"{name}.jsonl", (1, 1))
    prepare(load_corpora(path), tmp_path, tmp_path / "out")
    mine, whole = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "whole")
    assert mine.pop("prepare.json") != whole.pop("prepare.json")  # which says when they were changed
    assert mine == whole


def test_the_name_by_which_the_tokenizer_was_given_does_not_make_other_corpora(tiny_folder, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "x.jsonl", some_texts(12))
    prepare(corpora(tiny_folder), tmp_path, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    monkeypatch.chdir(tiny_folder.parent)
    prepare(corpora(Path(tiny_folder.name)), tmp_path, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == before


def test_a_signal_stops_between_units_and_the_same_command_goes_on(tiny_folder, tmp_path, small_units, monkeypatch):
    path = corpora_file(tmp_path, tiny_folder, num_documents=20, words=60)
    prepare(load_corpora(path), tmp_path, tmp_path / "whole")
    original = units.write_shard

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(units, "write_shard", terminated)
        with pytest.raises(StoppedError, match="run it again"):
            prepare(load_corpora(path), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    prepare(load_corpora(path), tmp_path, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_processes_that_share_the_work_keep_to_a_limit(tiny_folder, tmp_path, small_units):
    """What a part holds says whether the next one is needed: nobody may leave while another reads it."""
    corpora_file(tmp_path, tiny_folder, num_documents=60, words=60)
    lines = (tmp_path / "alpha.jsonl").read_text().splitlines(keepends=True)
    for i in range(6):
        (tmp_path / f"alpha-{i}.jsonl").write_text("".join(lines[i::6]))
    domain = {"paths": ["alpha-*.jsonl"], "max_documents": 35}
    wanted = validate(Corpora, {"tokenizer": str(tiny_folder), "domains": {"alpha": domain}}, "corpora")
    prepare(wanted, tmp_path, tmp_path / "whole")
    survey, children = module.survey_part, []
    for number in range(4):
        child = os.fork()
        if not child:
            try:
                if number == 0:  # is the first to begin and takes long over it
                    module.survey_part = lambda *arguments: (time.sleep(0.4), survey(*arguments))
                else:
                    time.sleep(0.1)
                prepare(wanted, tmp_path, tmp_path / "out")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0, 0]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_stop_does_not_wait_for_a_large_file_to_be_read(tiny_folder, tmp_path, monkeypatch):
    corpora_file(tmp_path, tiny_folder, num_documents=3)
    (tmp_path / "big.jsonl").write_text((json.dumps({"text": "word " * 4_000_000}) + "\n") * 3)
    wanted = corpora(tiny_folder, {"alpha": ["big.jsonl"]})
    seen = []
    places = survey_module.place_of

    def place_of(data):
        seen.append(len(data))
        os.kill(os.getpid(), signal.SIGTERM)
        return places(data)

    monkeypatch.setattr(survey_module, "place_of", place_of)
    with pytest.raises(StoppedError):
        prepare(wanted, tmp_path, tmp_path / "out")
    assert len(seen) == 1


def test_text_that_has_changed_since_is_named(tiny_folder, tmp_path, capsys):
    corpora_file(tmp_path, tiny_folder)
    wanted = corpora(tiny_folder, {"alpha": ["alpha.jsonl"], "beta": ["beta.jsonl"]})
    prepare(wanted, tmp_path, tmp_path / "out")
    prepare(wanted, tmp_path, tmp_path / "out")
    assert "have changed" not in capsys.readouterr().err
    path = tmp_path / "beta.jsonl"
    path.write_text(path.read_text().replace("the", "teh"))
    prepare(wanted, tmp_path, tmp_path / "out")
    err = capsys.readouterr().err
    assert "domains.beta: files have changed since" in err
    assert "domains.alpha" not in err


def test_a_shard_is_one_open_file(data_folder):
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [data_folder.stream(name, "train") for name in data_folder.domains]
    shards = sum(len(data_folder.index["domains"][name]["train"]["shards"]) for name in data_folder.domains)
    assert held
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= shards
