"""Which documents are left out because an earlier one is the same, or nearly; and what is held out where."""

import json
import random
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import text
from scionlm.core.config import validate
from scionlm.core.errors import DataError
from scionlm.core.records import read_json
from scionlm.data import Corpora, DataFolder, prepare
from scionlm.data.preparing import near
from scionlm.data.preparing.fates import _repeated
from scionlm.data.preparing.near import PERMUTATIONS, Signatures, near_duplicates, phrase_hashes
from scionlm.sources import load_tokenizer

quick = settings(max_examples=20)
FIELDS = {"held_out": {"fraction": 0.2, "min_documents": 2}}


def made(tiny_folder, folder, domains: dict[str, list[str]], **asked):
    """Prepare domains of texts; return {domain: {split: texts}} and the figures of each domain."""
    folder.mkdir(exist_ok=True)
    for name, documents in domains.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    config = {"tokenizer": str(tiny_folder), "domains": {n: {"paths": [f"{n}.jsonl"]} for n in domains}}
    prepare(validate(Corpora, config | FIELDS | asked, "corpora"), folder, folder / "out")
    data, tokenizer = DataFolder(folder / "out"), load_tokenizer(tiny_folder)
    found = {}
    for name in domains:
        found[name] = {}
        for split in ("train", "held_out"):
            stream = data.stream(name, split)
            spans = [(d.start, d.end - d.start) for d in stream.documents()]
            found[name][split] = [tokenizer.decode(stream.read(*span).tolist()) for span in spans]
    return found, read_json(folder / "out" / "statistics.json")["domains"]


def all_texts(found, name):
    return sorted(found[name]["train"] + found[name]["held_out"])


def different(count: int, seed: int = 0, words: int = 40) -> list[str]:
    return [f"{text(seed + i, words)} {i}" for i in range(count)]


def test_exact_duplicates_go_but_the_first_inside_and_across_domains(tiny_folder, tmp_path):
    one, two = different(12), different(8, seed=500)
    domains = {"a": [*one, one[3], one[3]], "b": [two[0], one[5], *two, one[0]]}
    found, figures = made(tiny_folder, tmp_path / "across", domains, dedupe="exact")
    assert all_texts(found, "a") == sorted(one)
    assert all_texts(found, "b") == sorted(two)
    assert [figures[n]["duplicates"] for n in "ab"] == [{"exact": 2, "near": 0}, {"exact": 3, "near": 0}]
    inside = {"method": "exact", "across": False}
    found, figures = made(tiny_folder, tmp_path / "inside", domains, dedupe=inside)
    assert all_texts(found, "b") == sorted([*two, one[5], one[0]])
    assert figures["b"]["duplicates"] == {"exact": 1, "near": 0}
    found, figures = made(tiny_folder, tmp_path / "none", domains)
    assert all_texts(found, "a") == sorted(domains["a"])  # off unless asked for
    assert figures["a"]["duplicates"] == {"exact": 0, "near": 0}


@quick
@given(st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=12), min_size=2, max_size=3))
def test_no_text_that_is_held_out_anywhere_is_trained_on_anywhere(tiny_folder, tmp_path_factory, numbers):
    domains = {f"d{i}": [f"text number {n}" for n in mine] for i, mine in enumerate(numbers)}
    if any(len(set(mine)) < 2 for mine in domains.values()):
        return
    found, _ = made(tiny_folder, tmp_path_factory.mktemp("x") / "w", domains)
    held_out = {t for splits in found.values() for t in splits["held_out"]}
    assert held_out
    assert not held_out & {t for splits in found.values() for t in splits["train"]}
    for name, documents in domains.items():
        assert all_texts(found, name) == sorted(documents)


def jaccard(one: str, two: str) -> float:
    mine, theirs = set(phrase_hashes(one).tolist()), set(phrase_hashes(two).tolist())
    return len(mine & theirs) / len(mine | theirs)


def changed(document: str, words: int, seed: int = 0) -> str:
    """Return a document with some of its words replaced, evenly spread."""
    parts = document.split()
    rng = random.Random(seed)
    for at in range(0, len(parts), max(1, len(parts) // words)):
        parts[at] = f"other{rng.randrange(10**6)}"
    return " ".join(parts)


def test_signatures_estimate_the_share_of_common_phrases():
    documents = [text(7, 400)]
    documents += [changed(documents[0], words, seed=words) for words in (1, 3, 8, 20)] + [text(9, 400)]
    signatures = Signatures()
    for document in documents:
        signatures.add(document)
    matrix = signatures.matrix()
    assert matrix.shape == (6, PERMUTATIONS)
    for i in range(1, 6):
        estimate = float((matrix[0] == matrix[i]).mean())
        assert estimate == pytest.approx(jaccard(documents[0], documents[i]), abs=0.14)


def test_signatures_do_not_depend_on_when_they_are_flushed(monkeypatch):
    documents = different(30)
    first, second = Signatures(), Signatures()
    for document in documents:
        first.add(document)
    monkeypatch.setattr(near, "_FLUSH_BYTES", 1)
    for document in documents:
        second.add(document)
    assert np.array_equal(first.matrix(), second.matrix())
    assert len({tuple(row) for row in first.matrix().tolist()}) == 30


def test_case_and_white_space_do_not_make_a_document_another():
    assert np.array_equal(
        phrase_hashes("The  quick\n\tbrown FOX jumps over"), phrase_hashes("the quick brown fox jumps over")
    )
    assert not np.array_equal(
        phrase_hashes("the quick brown fox jumps over"), phrase_hashes("the quick brown cat jumps over")
    )
    assert len(phrase_hashes("")) == len(phrase_hashes("short")) == 1


def test_near_duplicates_go_and_what_only_looks_alike_stays(tiny_folder, tmp_path):
    originals = different(10, words=300)
    copies = [changed(originals[2], 3), originals[4].upper(), f"{originals[6]} and one line more"]
    alike = [changed(originals[1], 60), " ".join(reversed(originals[3].split()))]
    domains = {"a": originals, "b": [*different(6, seed=900, words=300), *copies, *alike]}
    found, figures = made(tiny_folder, tmp_path / "near", domains, dedupe="near")
    assert all_texts(found, "a") == sorted(originals)
    assert all_texts(found, "b") == sorted([*domains["b"][:6], *alike])
    assert figures["b"]["duplicates"] == {"exact": 0, "near": 3}
    found, figures = made(tiny_folder, tmp_path / "exact", domains, dedupe="exact")
    assert figures["b"]["duplicates"] == {"exact": 0, "near": 0}  # the control


def test_of_a_group_of_near_duplicates_the_first_stays():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32)
    rows = [rng.integers(0, 2**32, PERMUTATIONS, dtype=np.uint32) for _ in range(20)]
    for place, differing in ((3, 0), (8, 10), (11, 20), (17, 40)):  # the last one is less near than asked
        rows[place] = base.copy()
        rows[place][slice(-40, None) if differing == 40 else slice(differing)] += 1
    assert np.flatnonzero(near_duplicates(np.stack(rows), 0.8)).tolist() == [8, 11]
    assert not near_duplicates(np.stack(rows), 0.95)[11]


def test_a_bucket_of_very_many_equal_documents_is_no_trouble():
    rows = np.zeros((20_000, PERMUTATIONS), dtype=np.uint32)
    assert near_duplicates(rows, 0.8).sum() == 19_999


def peak_bytes(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_index_takes_no_more_than_it_may():
    """64 bytes a document for equal texts, a kilobyte for nearly equal ones, what is looked up included."""
    rng = np.random.default_rng(0)
    count = 200_000
    places, sizes = rng.integers(0, 2**63, count, dtype=np.uint64), rng.integers(1, 9999, count)
    assert places.nbytes + sizes.nbytes + peak_bytes(lambda: _repeated(places, sizes)) < 64 * count
    rows = rng.integers(0, 2**32, (20_000, PERMUTATIONS), dtype=np.uint32)
    assert rows.nbytes + peak_bytes(lambda: near_duplicates(rows, 0.8)) < 1000 * len(rows)


def test_deduplication_that_leaves_nothing_to_split_is_a_data_error(tiny_folder, tmp_path):
    with pytest.raises(DataError, match=r"domains\.b"):
        made(tiny_folder, tmp_path / "x", {"a": different(6), "b": different(6)}, dedupe="exact")


def test_near_duplicates_without_their_package_say_what_to_install(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)  # importing it fails
    with pytest.raises(DataError, match=r"^dedupe: near needs the rensa package; pip install 'scionlm\[data\]'$"):
        made(tiny_folder, tmp_path / "x", {"a": different(6)}, dedupe="near")
    assert not (tmp_path / "x" / "out" / "index.json").exists()
