"""Limits in documents and tokens; statistics; BOS; and tokenizers of one's own."""

import json

import pytest
from transformers import AutoTokenizer

from factories import text
from scionlm.core.config import validate
from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import read_json
from scionlm.data import Corpora, DataFolder, prepare
from scionlm.data.preparing import job, survey, units
from scionlm.data.preparing.train_tokenizer import train_tokenizer
from scionlm.data.reading import files
from scionlm.sources import load_tokenizer


@pytest.fixture
def small(monkeypatch):
    for module in (job, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 1500)
    monkeypatch.setattr(units, "CHUNK_BYTES", 400)
    monkeypatch.setattr(files, "PART_BYTES", 6000)


DOCUMENTS = [f"{i} {text(i, 20 + i % 9)}" for i in range(90)]


def corpora(folder, tokenizer, files=3, **domain) -> Corpora:
    for i in range(files):
        lines = DOCUMENTS[i * len(DOCUMENTS) // files : (i + 1) * len(DOCUMENTS) // files]
        (folder / f"x{i}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in lines))
    config = {
        "tokenizer": str(tokenizer),
        "domains": {"x": {"paths": ["x*.jsonl"]} | domain},
        "held_out": {"fraction": 0.1, "min_documents": 3},
    }
    return validate(Corpora, config, "corpora")


def texts(out, tokenizer, split):
    stream, tokenizer = DataFolder(out).stream("x", split, verify=True), load_tokenizer(tokenizer)
    return [tokenizer.decode(stream.read(d.start, d.end - d.start).tolist()) for d in stream.documents()]


@pytest.mark.parametrize("limit", [10, 30, 31, 89, 90, 500])
def test_a_limit_in_documents_reads_the_first_ones(tiny_folder, tmp_path, small, limit):
    prepare(corpora(tmp_path, tiny_folder, max_documents=limit), tmp_path, tmp_path / "out")
    found = texts(tmp_path / "out", tiny_folder, "train") + texts(tmp_path / "out", tiny_folder, "held_out")
    assert sorted(found) == sorted(DOCUMENTS[:limit])
    figures = read_json(tmp_path / "out" / "statistics.json")["domains"]["x"]
    assert figures["documents_read"] == min(limit, 90)
    assert figures["limit"] == (f"{limit} documents" if limit <= 90 else None)


@pytest.mark.parametrize("limit", [40, 300, 1000, 10**6])
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_limit_in_tokens_trains_on_the_first_documents_that_fit(tiny_folder, tmp_path, small, limit, num_files):
    whole = corpora(tmp_path, tiny_folder, num_files)
    prepare(whole, tmp_path, tmp_path / "whole")
    prepare(corpora(tmp_path, tiny_folder, num_files, max_tokens=limit), tmp_path, tmp_path / "out", workers=2)
    stream = DataFolder(tmp_path / "out").stream("x", "train")
    assert stream.num_tokens <= limit
    found = texts(tmp_path / "out", tiny_folder, "train")
    held_out = texts(tmp_path / "out", tiny_folder, "held_out")
    kept = [d for d in DOCUMENTS if d not in held_out]
    assert found == kept[: len(found)]
    if len(found) < len(kept):
        more = len(load_tokenizer(tiny_folder).encode(kept[len(found)], add_special_tokens=False).ids) + 1
        assert stream.num_tokens + more > limit
    else:
        assert limit >= 1000
    assert held_out
    names = {path.name for path in (tmp_path / "out" / "x").iterdir()}
    listed = {
        s["file"] for split in DataFolder(tmp_path / "out").index["domains"]["x"].values() for s in split["shards"]
    }
    assert names == listed  # nothing of what was cut off is left


def test_a_limit_of_few_tokens_does_not_read_all_of_a_large_file(tiny_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(survey, "place_of", lambda data, place=survey.place_of: seen.append(len(data)) or place(data))
    few = survey.DOCUMENTS_PER_HELD_OUT * 3
    prepare(corpora(tmp_path, tiny_folder, 1, max_tokens=60), tmp_path, tmp_path / "out")
    assert len(seen) == few
    assert sum(seen) > 60 * survey.BYTES_PER_TOKEN


def test_a_limit_is_reached_also_where_documents_are_few_and_what_is_held_out_is_much_of_them(tiny_folder, tmp_path):
    """By the text alone a handful of long documents would do, and then half of them would be held out."""
    long = [f"{i} {text(i, 300)}" for i in range(80)]
    (tmp_path / "x0.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in long))
    config = {"tokenizer": str(tiny_folder), "domains": {"x": {"paths": ["x0.jsonl"], "max_tokens": 3000}}}
    asked = validate(Corpora, config | {"held_out": {"fraction": 0.01, "min_documents": 4}}, "corpora")
    index = prepare(asked, tmp_path, tmp_path / "out")["domains"]["x"]
    whole = len(load_tokenizer(tiny_folder).encode(max(long, key=len), add_special_tokens=False).ids) + 1
    assert 3000 - whole <= index["train"]["num_tokens"] <= 3000
    assert index["held_out"]["num_documents"] == 4


def test_a_limit_without_room_for_a_document_is_a_data_error(tiny_folder, tmp_path):
    with pytest.raises(DataError, match="limits leave no document for the train split"):
        prepare(corpora(tmp_path, tiny_folder, max_tokens=20), tmp_path, tmp_path / "out")


def test_the_figures_are_those_of_the_shards(tiny_folder, tmp_path, small):
    prepare(corpora(tmp_path, tiny_folder), tmp_path, tmp_path / "out")
    figures = read_json(tmp_path / "out" / "statistics.json")
    mine, data = figures["domains"]["x"], DataFolder(tmp_path / "out")
    lengths = sorted(
        d.end - d.start + 1 for split in ("train", "held_out") for d in data.stream("x", split).documents()
    )
    assert sum(mine["token_lengths"]["counts"]) == len(lengths) == 90
    edges = mine["token_lengths"]["edges"]
    for low, high, count in zip(edges[:-1], edges[1:], mine["token_lengths"]["counts"], strict=True):
        assert count == sum(low <= n < high for n in lengths)
    assert mine["length_percentiles"]["50"] == lengths[44]
    assert mine["length_percentiles"]["100"] == lengths[-1]
    assert mine["bytes_per_token"] == pytest.approx(sum(len(d.encode()) for d in DOCUMENTS) / sum(lengths))
    assert mine["gzip_ratio"] > 1
    assert {s["split"] for s in mine["samples"]} == {"train", "held_out"}
    assert all(any(d.startswith(s["text"].rstrip("…")) for d in DOCUMENTS) for s in mine["samples"])
    assert figures["tokenizer"]["dtype"] == "uint16"


def test_a_bos_stands_before_every_document_and_is_no_part_of_it(tiny_folder, tmp_path, small):
    asked = corpora(tmp_path, tiny_folder).model_copy(update={"bos": "<|endoftext|>", "separator": "a"})
    prepare(asked, tmp_path, tmp_path / "out")
    data = DataFolder(tmp_path / "out")
    letter = load_tokenizer(tiny_folder).get_vocab()["a"]
    assert (data.tokenizer.bos, data.tokenizer.bos_id, data.tokenizer.separator_id) == ("<|endoftext|>", 0, letter)
    for split in ("train", "held_out"):
        stream = data.stream("x", split)
        tokens = stream.read(0, stream.num_tokens)
        assert (tokens == 0).sum() == stream.num_documents  # BOS count = documents
        ends = stream.document_ends
        assert (tokens[[0, *ends[:-1]]] == 0).all()
        assert (tokens[ends - 1] == letter).all()
        assert stream.context_starts.tolist() == ends[:-1].tolist()
    assert sorted(
        texts(tmp_path / "out", tiny_folder, "train") + texts(tmp_path / "out", tiny_folder, "held_out")
    ) == sorted(DOCUMENTS)


def test_a_tokenizer_of_ones_own_has_its_size_and_gives_every_text_back(tiny_folder, tmp_path):
    asked = corpora(tmp_path, tiny_folder).model_copy(update={"tokenizer": None})
    assert train_tokenizer(asked, tmp_path, tmp_path / "tok", 300, special=("<|pad|>",)) == 300
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert (loaded.eos_token, loaded.convert_tokens_to_ids("<|endoftext|>"), len(loaded)) == ("<|endoftext|>", 0, 300)
    for document in ["naïve café 😀 日本語 \r\n\t 2048", *DOCUMENTS[:5]]:
        assert loaded.decode(loaded(document)["input_ids"]) == document
    assert len(loaded("12345")["input_ids"]) == 5
    own = asked.model_copy(update={"tokenizer": str(tmp_path / "tok")})
    prepare(own, tmp_path, tmp_path / "out")
    assert sorted(
        texts(tmp_path / "out", tmp_path / "tok", "train") + texts(tmp_path / "out", tmp_path / "tok", "held_out")
    ) == sorted(DOCUMENTS)
    train_tokenizer(asked, tmp_path, tmp_path / "again", 300, special=("<|pad|>",))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tok" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("size", "special"), [(257, ()), (258, ("x",)), (400, ("<|endoftext|>",)), (400, ("",))])
def test_a_vocabulary_without_room_or_with_double_names_is_refused(tiny_folder, tmp_path, size, special):
    with pytest.raises(UsageError, match=r"vocab_size|special"):
        train_tokenizer(corpora(tmp_path, tiny_folder), tmp_path, tmp_path / "tok", size, special)
    assert not (tmp_path / "tok").exists()


def test_preparing_without_a_tokenizer_says_what_to_do(tiny_folder, tmp_path):
    asked = corpora(tmp_path, tiny_folder).model_copy(update={"tokenizer": None})
    with pytest.raises(UsageError, match="scion train-tokenizer"):
        prepare(asked, tmp_path, tmp_path / "out")


def test_nothing_is_read_beyond_a_limit_in_documents(tiny_folder, tmp_path):
    asked = corpora(tmp_path, tiny_folder, files=1, max_documents=12)
    lines = (tmp_path / "x0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x0.jsonl").write_text("".join([*lines[:12], "{broken\n"]))
    prepare(asked, tmp_path, tmp_path / "out")
    train_tokenizer(asked, tmp_path, tmp_path / "tok", 300)
    more = corpora(tmp_path, tiny_folder, files=1, max_documents=13)
    (tmp_path / "x0.jsonl").write_text("".join([*lines[:12], "{broken\n"]))
    with pytest.raises(DataError, match=r"x0\.jsonl:13 is not JSON"):
        prepare(more, tmp_path, tmp_path / "more")


def test_a_finished_folder_keeps_what_its_user_put_there(tiny_folder, tmp_path):
    asked = corpora(tmp_path, tiny_folder)
    prepare(asked, tmp_path, tmp_path / "out")
    domain = tmp_path / "out" / "x"
    (domain / "notes.txt").write_text("mine")
    (domain / "more").mkdir()
    (domain / "train-00099-00000.safetensors").write_bytes(b"of a killed attempt")
    prepare(asked, tmp_path, tmp_path / "out")
    assert (domain / "notes.txt").read_text() == "mine"
    assert (domain / "more").is_dir()
    assert not (domain / "train-00099-00000.safetensors").exists()
