"""The offline suite: items that are what they claim to be, scored as choices, the same for the same data and seed."""

import math
import re
from collections import Counter
from statistics import stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation_texts import places, written_data
from factories import corpora_file, tiny_model
from scionlm.core.errors import DataError
from scionlm.data import DataFolder, load_corpora, prepare
from scionlm.evaluation import offline, passages
from scionlm.evaluation.choices import Score, encode_pair, score
from scionlm.evaluation.offline import offline_scores
from scionlm.evaluation.passages import CLOZE, LAST_WORD, NEXT_LINE, Passages, items_hash, make_passages
from scionlm.sources import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_folder):
    return written_data(tmp_path_factory.mktemp("written") / "w", tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(data):
    return load_tokenizer(data.tokenizer_folder)


@pytest.fixture(scope="module")
def made(data, tokenizer):
    return make_passages(places(data), tokenizer, 24, 0)


def held_out_texts(data, tokenizer, domain):
    stream = data.stream(domain, "held_out")
    return [tokenizer.decode(stream.read(d.start, d.end - d.start).tolist()) for d in stream.documents()]


def test_items_are_held_out_text_and_the_answer_is_what_follows(data, tokenizer, made):
    texts = {domain: held_out_texts(data, tokenizer, domain) for domain in data.domains}
    assert set(made.tasks) == {LAST_WORD, CLOZE, NEXT_LINE}
    for task, items in made.tasks.items():
        for item in items:
            whole = item.context + item.choices[item.answer]
            assert any(whole in text for text in texts[item.domain]), (task, item)
            others = [choice for n, choice in enumerate(item.choices) if n != item.answer]
            assert len(set(item.choices)) == len(item.choices)
            assert not any(item.context + other in text for other in others for text in texts[item.domain])


def test_no_item_is_text_that_is_trained_on(data, tokenizer, made):
    stream = data.stream("tales", "train")
    trained = tokenizer.decode(stream.read(0, stream.num_tokens).tolist())
    for items in made.tasks.values():
        assert not any(item.context in trained for item in items if item.domain == "tales")


def test_each_kind_is_what_it_says(made):
    for item in made.tasks[LAST_WORD]:
        assert item.choices[0].strip().lower() in re.findall(r"\w+", item.context.lower())
        assert item.choices[0].startswith(" ")
    for item in made.tasks[CLOZE]:
        assert [len(choice.split()) for choice in item.choices] == [10] * 4
    for item in made.tasks[NEXT_LINE]:
        assert item.domain == "python"
        assert len({len(choice) - len(choice.lstrip()) for choice in item.choices}) == 1  # the indent tells nothing
        assert all(choice.startswith("\n") for choice in item.choices)


def test_answers_are_spread_over_the_places_and_domains_share(made):
    for task in (CLOZE, NEXT_LINE):
        counts = Counter(item.answer for item in made.tasks[task])
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) < 0.5 * len(made.tasks[task])
    assert Counter(item.domain for item in made.tasks[CLOZE]) == {"tales": 12, "python": 12}


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), min_size=1), st.integers(1, 150))
def test_items_are_dealt_evenly_and_never_more_than_there_are(have, wanted):
    shares = passages._dealt(have, wanted)
    assert sum(shares.values()) == min(wanted, sum(have.values()))
    assert all(shares[name] <= have[name] for name in have)
    short = [shares[name] for name in have if shares[name] < have[name]]
    assert not short or max(shares.values()) - min(short) <= 1  # who has more left gives as much as any other


def test_only_code_has_next_lines(made):
    lines = made.lines
    assert lines["python"]["indented"] > passages.CODE_INDENTED > lines["tales"]["indented"]
    assert lines["python"]["ended"] > passages.CODE_ENDED > lines["tales"]["ended"]


def test_items_depend_on_data_and_seed_alone(data, tokenizer, made):
    torch.manual_seed(3)
    again = make_passages(places(data), tokenizer, 24, 0)
    other = make_passages(places(data), tokenizer, 24, 1)
    turned = make_passages(dict(reversed(places(data).items())), tokenizer, 24, 0)
    alone = make_passages({"python": (data, "python")}, tokenizer, 12, 0)
    for task, items in made.tasks.items():
        assert items_hash(again.tasks[task]) == items_hash(turned.tasks[task]) == items_hash(items)
        assert items_hash(other.tasks[task]) != items_hash(items)
    assert alone.tasks[CLOZE] == [item for item in made.tasks[CLOZE] if item.domain == "python"]


def test_scores_are_those_of_the_single_choices(data, tokenizer, made):
    model = tiny_model()
    found = offline_scores(model, made, tokenizer, None, 128)
    for task, items in made.tasks.items():
        rights = []
        for item in items:
            scores = score(model, [encode_pair(tokenizer, item.context, choice) for choice in item.choices], 128)
            likelihoods = [-one.nll for one in scores]
            best = likelihoods.index(max(likelihoods)) == item.answer
            rights.append(int(scores[0].greedy if len(scores) == 1 else best))
        record = found.tasks[task]
        assert found.items[task]["scores"] == "".join(map(str, rights))
        assert record["acc"] == pytest.approx(sum(rights) / len(rights))
        assert record["acc_stderr"] == pytest.approx(stdev(rights) / math.sqrt(len(rights)), abs=1e-12)
        assert record["num_items"] == len(items) == sum(d["num_items"] for d in record["domains"].values())
        total = sum(d["acc"] * d["num_items"] for d in record["domains"].values())
        assert total / len(items) == pytest.approx(record["acc"])
        assert found.items[task]["sha256"] == items_hash(items)
    assert found.tasks[CLOZE]["chance"] == 0.25
    assert found.tasks[LAST_WORD]["chance"] == 0.0


def test_who_knows_the_text_is_right_and_who_does_not_is_at_chance(monkeypatch, data, tokenizer, made):
    told = []
    for domain in data.domains:
        stream = data.stream(domain, "held_out")
        told.append(" ".join(map(str, stream.read(0, stream.num_tokens).tolist())))

    def knowing(model, requests, *rest):
        texts = [" ".join(map(str, [*one.context[-20:], *one.continuation])) for one in requests]
        return [Score(0.0, True) if any(text in ids for ids in told) else Score(9.0, False) for text in texts]

    monkeypatch.setattr(offline, "score", knowing)
    known = offline_scores(None, made, tokenizer, None, 512).tasks
    monkeypatch.setattr(offline, "score", lambda model, requests, *rest: [Score(1.0, False) for _ in requests])
    blank = offline_scores(None, made, tokenizer, None, 512).tasks
    for task in (CLOZE, NEXT_LINE):
        assert known[task]["acc"] == known[task]["acc_norm"] > 0.85  # a token may run over an end
        assert abs(blank[task]["acc"] - 0.25) < 0.2
    assert blank[LAST_WORD]["acc"] == 0.0


def test_text_that_is_too_short_is_said(tmp_path, tiny_folder, tokenizer):
    path = corpora_file(tmp_path / "c", tiny_folder, num_documents=8, words=12)
    prepare(load_corpora(path), path.parent, tmp_path / "d")
    made = make_passages(places(DataFolder(tmp_path / "d")), tokenizer, 40, 0)
    assert made.tasks == {}
    with pytest.raises(DataError, match="too short for tasks"):
        offline_scores(tiny_model(), Passages(0), tokenizer, None, 128)


def test_one_item_has_no_standard_error():
    assert offline.mean_and_error("acc", [1.0]) == {"acc": 1.0, "acc_stderr": None}
