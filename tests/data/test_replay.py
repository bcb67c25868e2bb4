"""Replay: what a run's ledger says it trained on, and the same samples again in a later run."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import corpora_file, first_sampling
from scionlm.core.errors import DataError, UsageError
from scionlm.data import DataFolder, Ledger, Mixture, Order, Sample, SamplePlan, load_corpora, prepare
from scionlm.data.mixing.ledger import LEDGER, Consumed, as_consumed, plan_facts, read_consumed
from scionlm.data.mixing.plan import REPLAYED
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.train import step as step_module
from whole_runs import quicken

quick = settings(max_examples=40)
SEQ_LEN, SEQUENCES = 24, 4
SHARES = {"alpha": 0.7, "beta": 0.3}
KINDS = ("fixed", "ramp", "moved", "redistributed", "packed")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quicken(monkeypatch.setattr)


class FirstRun:
    """A run as far as its ledger goes: plan, steps, a record now and then.

    Attributes:
        samples: What it trained on, in order.
    """

    def __init__(self, folder: Path, data: DataFolder, kind: str = "fixed", steps: int = 20, replayed=None) -> None:
        self.folder, self.kind = folder, kind
        folder.mkdir(exist_ok=True)
        order = Order(SEQ_LEN, seed=4, packing="best_fit" if kind == "packed" else "concat")
        mixture = Mixture(SHARES)
        if kind == "ramp":
            mixture = Mixture(SHARES, {"alpha": 0.1, "beta": 0.9}, 50)
        streams = {name: data.stream(name, "train") for name in SHARES}
        if kind == "redistributed":  # alpha ends after 25 sequences
            epochs = 25.5 / (streams["alpha"].num_tokens // SEQ_LEN)
            order = replace(order, max_epochs={"alpha": epochs}, exhausted="redistribute")
        self.plan = SamplePlan(streams, mixture, order, replayed)
        self.ledger = Ledger(folder / LEDGER, plan_facts(data, list(SHARES), order, None))
        self.ledger.rewind(-1)
        self.samples: list[Sample] = []
        self.go(range(1, steps + 1))
        self.ledger.close()

    def go(self, steps: range) -> None:
        for step in steps:
            self.samples += self.plan.take(SEQUENCES)
            if self.kind == "moved" and step % 3 == 0:
                alpha = 0.1 + step * 7 % 8 / 10
                self.plan.set_weights({"alpha": alpha, "beta": 1 - alpha}, 3 * SEQUENCES)
            if step % 4 == 0 or step == steps[-1]:
                self.ledger.record(step, self.plan)

    def ids(self, samples: list[Sample] | None = None) -> np.ndarray:
        return self.plan.batch(self.samples if samples is None else samples).input_ids


def again(data: DataFolder, consumed: Consumed, fraction: float = 0.25, exhausted=None, **settings) -> SamplePlan:
    """Return the plan of a later run on the same data, in another order, with replay."""
    streams = {name: data.stream(name, "train") for name in SHARES}
    order = Order(SEQ_LEN, seed=9, stage="later")
    if exhausted:
        order = replace(order, max_epochs=exhausted, exhausted="redistribute")
    return SamplePlan(streams, Mixture(SHARES), order, LedgerReplay(consumed, fraction, **settings))


def replayed(samples: list[Sample]) -> list[Sample]:
    """Return the samples that are replayed, under the names they had in the first run."""
    return [Sample(s.domain.removeprefix(REPLAYED), s.draw) for s in samples if s.domain.startswith(REPLAYED)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_gives_back_what_was_consumed_and_its_order(tmp_path, data_folder, kind):
    first = FirstRun(tmp_path / "first", data_folder, kind)
    consumed = read_consumed(first.folder)
    assert consumed.num_samples == len(first.samples)
    in_order = consumed.samples()
    assert [next(in_order) for _ in first.samples] == first.samples
    assert (len(consumed.phases) > 1) == (kind in ("moved", "redistributed"))


def test_the_ledger_has_to_know_each_phase(tmp_path, data_folder):
    """The control: with the first weights alone the order would be another."""
    first = FirstRun(tmp_path / "first", data_folder, "moved")
    consumed = read_consumed(first.folder)
    in_order = replace(consumed, phases=consumed.phases[:1]).samples()
    assert [next(in_order) for _ in first.samples] != first.samples


@pytest.mark.parametrize("kind", KINDS)
def test_original_order_is_the_first_runs_to_the_token(tmp_path, data_folder, kind):
    first = FirstRun(tmp_path / "first", data_folder, kind)
    plan = again(data_folder, read_consumed(first.folder))
    samples = plan.take(4 * len(first.samples))
    assert replayed(samples) == first.samples
    rows = [row for row, sample in enumerate(samples) if sample.domain.startswith(REPLAYED)]
    assert np.array_equal(plan.batch(samples).input_ids[rows], first.ids())
    assert np.array_equal(plan.batch(samples).labels[rows], first.plan.batch(first.samples).labels)
    own = [row for row in range(len(samples)) if row not in set(rows)]
    assert not np.array_equal(plan.batch(samples).input_ids[own[: len(rows)]], first.ids())  # own data, own order


@pytest.mark.parametrize("kind", ["fixed", "packed"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_runs_windows_are_read_as_that_run_packed_them(tmp_path, data_folder, kind, packing):
    """Also where the later run packs its own in another way, and wants positions; labels are the first run's."""
    first = FirstRun(tmp_path / "first", data_folder, kind)
    order = Order(SEQ_LEN, 9, "later", packing, document_mask=True)
    streams = {name: data_folder.stream(name, "train") for name in SHARES}
    plan = SamplePlan(streams, Mixture(SHARES), order, LedgerReplay(read_consumed(first.folder), 0.5))
    alone = SamplePlan(streams, Mixture(SHARES), order)
    samples = plan.take(2 * len(first.samples))
    batch, expected = plan.batch(samples), first.plan.batch(first.samples)
    rows = [row for row, sample in enumerate(samples) if sample.domain.startswith(REPLAYED)]
    assert np.array_equal(batch.input_ids[rows], expected.input_ids)
    assert np.array_equal(batch.labels[rows], expected.labels)
    own = [row for row in range(len(samples)) if row not in set(rows)]
    theirs = alone.batch([samples[row] for row in own])
    assert np.array_equal(batch.input_ids[own], theirs.input_ids)
    assert np.array_equal(batch.labels[own], theirs.labels)
    assert np.array_equal(batch.position_ids[own], theirs.position_ids)


def test_a_run_that_was_stopped_and_went_on_has_the_ledger_of_one_that_was_not(tmp_path, data_folder):
    whole = FirstRun(tmp_path / "whole", data_folder, "moved", 20)
    parts = FirstRun(tmp_path / "parts", data_folder, "moved", 10)
    at_eight = FirstRun(tmp_path / "eight", data_folder, "moved", 8).plan.state()
    parts.ledger = Ledger(parts.folder / LEDGER, {})
    parts.ledger.rewind(8)  # the checkpoint was of step 8; the steps after it are lost and done again
    fresh = FirstRun(tmp_path / "fresh", data_folder, "moved", 0).plan
    fresh.restore(json.loads(json.dumps(at_eight)))
    parts.plan, parts.samples = fresh, parts.samples[: 8 * SEQUENCES]
    parts.go(range(9, 21))
    parts.ledger.close()
    assert parts.samples == whole.samples
    mine, theirs = read_consumed(parts.folder), read_consumed(whole.folder)
    assert (mine.counts, mine.phases, mine.num_samples) == (theirs.counts, theirs.phases, theirs.num_samples)


def test_weights_set_before_the_first_slot_stay_in_the_ledger_of_a_resumed_run(tmp_path, data_folder):
    streams = {name: data_folder.stream(name, "train") for name in SHARES}
    order = Order(SEQ_LEN, 4)

    def ledger() -> Ledger:
        return Ledger(tmp_path / LEDGER, plan_facts(data_folder, list(SHARES), order, None))

    plan, book = SamplePlan(streams, Mixture(SHARES), order), ledger()
    book.rewind(-1)
    plan.set_weights({"alpha": 0.1, "beta": 0.9}, 40)
    samples = plan.take(20)
    plan.set_weights({"alpha": 0.5, "beta": 0.5}, 40)
    samples += plan.take(10)
    book.record(1, plan)
    book.close()
    resumed, book = SamplePlan(streams, Mixture(SHARES), order), ledger()
    resumed.restore(plan.state())
    book.rewind(1)
    samples += resumed.take(10)
    book.record(2, resumed)
    book.close()
    in_order = read_consumed(tmp_path).samples()
    assert [next(in_order) for _ in samples] == samples


def test_what_a_run_replayed_itself_is_not_replayed_again(tmp_path, data_folder):
    oldest = FirstRun(tmp_path / "oldest", data_folder)
    replay = LedgerReplay(read_consumed(oldest.folder), 0.5)
    first = FirstRun(tmp_path / "first", data_folder, "moved", replayed=replay)
    own = [sample for sample in first.samples if not sample.domain.startswith(REPLAYED)]
    assert len(own) == pytest.approx(len(first.samples) / 2, abs=2)
    consumed = read_consumed(first.folder)
    assert consumed.num_samples == len(own)
    assert replayed(again(data_folder, consumed, 0.5).take(2 * len(own))) == own


@pytest.mark.parametrize("kind", KINDS)
@settings(quick, max_examples=10)
@given(before=st.integers(0, 79), after=st.integers(1, 30))
def test_the_order_of_a_ledger_can_be_gone_on_with_from_anywhere(tmp_path_factory, data_folder, kind, before, after):
    first = FirstRun(tmp_path_factory.mktemp("runs") / "first", data_folder, kind)
    one, other = read_consumed(first.folder).samples(), read_consumed(first.folder).samples()
    for _ in range(before):
        next(one)
    other.restore(json.loads(json.dumps(one.state())))
    assert [next(other) for _ in range(after)] == [next(one) for _ in range(after)]


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.999])
def test_an_offset_rotates_the_order(tmp_path, data_folder, offset):
    first = FirstRun(tmp_path / "first", data_folder, "moved")
    start = int(offset * len(first.samples))
    plan = again(data_folder, read_consumed(first.folder), order="offset", offset=offset, repeat=True)
    rotated = first.samples[start:] + first.samples[:start]
    assert replayed(plan.take(8 * len(first.samples))) == rotated * 2


@pytest.mark.parametrize("order", ["original", "offset", "reshuffled"])
def test_replay_goes_on_from_any_draw_through_the_end_of_a_pass(tmp_path, data_folder, order):
    """Fresh, just before, at and after the last sample of the order, of the pass, and of the pass after it."""
    first = FirstRun(tmp_path / "first", data_folder, "moved", steps=5)
    consumed = read_consumed(first.folder)

    def replay() -> LedgerReplay:
        return LedgerReplay(consumed, 0.5, order, 0.3 if order == "offset" else 0.0, repeat=True)

    whole = replay()
    expected = [whole.sample(draw) for draw in range(70)]
    for draws in (0, 1, 13, 14, 15, 19, 20, 21, 33, 34, 35, 39, 40, 41):
        one, other = replay(), replay()
        for draw in range(draws):
            one.sample(draw)
        for draw in range(5):
            other.sample(draw)
        other.restore(json.loads(json.dumps(one.state())), draws)
        assert [other.sample(draw) for draw in range(draws, 70)] == expected[draws:], draws


@quick
@given(fraction=st.floats(0.01, 0.9), seed=st.integers(0, 99), passes=st.integers(1, 3))
def test_reshuffled_takes_every_sample_once_a_pass(tmp_path_factory, data_folder, fraction, seed, passes):
    first = FirstRun(tmp_path_factory.mktemp("runs") / "first", data_folder, "moved")
    consumed = read_consumed(first.folder)
    plan = again(data_folder, consumed, fraction, order="reshuffled", seed=seed, repeat=True)
    wanted = passes * len(first.samples)
    samples: list[Sample] = []
    while len(samples) < wanted:
        samples += replayed(plan.take(50))
    orders = [tuple(samples[at : at + len(first.samples)]) for at in range(0, wanted, len(first.samples))]
    assert all(Counter(taken) == Counter(first.samples) for taken in orders)
    assert len({*orders, tuple(first.samples)}) == passes + 1
    shares = [Counter(sample.domain for sample in taken[:40])["alpha"] / 40 for taken in orders]
    expected = consumed.counts["alpha"] / consumed.num_samples
    assert all(share == pytest.approx(expected, abs=1 / 40) for share in shares)  # evenly mixed, too


@quick
@given(fraction=st.floats(0.01, 0.9), kind=st.sampled_from(["original", "reshuffled"]), moved=st.booleans())
def test_the_fraction_holds_in_every_prefix(tmp_path_factory, data_folder, fraction, kind, moved):
    first = FirstRun(tmp_path_factory.mktemp("runs") / "first", data_folder)
    plan = again(data_folder, read_consumed(first.folder), fraction, order=kind, repeat=True)
    taken = 0
    for slot in range(1, 201):
        if moved and slot % 50 == 1:
            plan.set_weights({"alpha": 0.1 + slot / 300, "beta": 0.9 - slot / 300}, 50)
        taken += plan.take(1)[0].domain.startswith(REPLAYED)
        assert abs(taken - fraction * slot) < (2 if moved else 1)


def test_what_a_domain_leaves_goes_to_the_new_data_and_not_to_replay(tmp_path, data_folder):
    first = FirstRun(tmp_path / "first", data_folder)
    plan = again(data_folder, read_consumed(first.folder), 0.2, exhausted={"alpha": 0.2}, repeat=True)
    while not plan.state()["exhausted"]:
        plan.take(1)
    assert plan.weights() == pytest.approx({"alpha": 0, "beta": 0.8, REPLAYED: 0.2}, abs=1e-9)


def test_replay_alone_is_no_training_data(tmp_path, data_folder):
    first = FirstRun(tmp_path / "first", data_folder)
    limits = {"alpha": 0.2, "beta": 0.2}
    plan = again(data_folder, read_consumed(first.folder), 0.2, exhausted=limits, repeat=True)
    with pytest.raises(DataError, match="exhausted"):
        plan.take(2000)


@pytest.mark.parametrize("order", ["original", "offset", "reshuffled"])
def test_a_second_pass_is_refused_unless_it_is_wanted(tmp_path, data_folder, order):
    first = FirstRun(tmp_path / "first", data_folder, steps=5)
    consumed = read_consumed(first.folder)
    settings = {"order": order, "offset": 0.5 if order == "offset" else 0.0}
    plan = again(data_folder, consumed, 0.5, **settings)
    assert len(replayed(plan.take(40))) == 20
    before = plan.state()
    with pytest.raises(DataError, match=r"second pass .*replay\.repeat"):
        plan.take(3)
    assert plan.state() == before
    allowed = again(data_folder, consumed, 0.5, **settings, repeat=True)
    samples = replayed(allowed.take(80))
    assert Counter(samples[:20]) == Counter(samples[20:]) == Counter(first.samples)
    assert (samples[:20] == samples[20:]) == (order != "reshuffled")
    assert allowed.epochs()["replay"] == 2.0


def test_a_fraction_or_offset_that_is_none_is_refused(tmp_path, data_folder):
    consumed = read_consumed(FirstRun(tmp_path / "first", data_folder).folder)
    for wrong in ({"fraction": 0.0}, {"fraction": 1.0}, {"fraction": 0.5, "order": "offset", "offset": 1.0}):
        with pytest.raises(UsageError, match="replay"):
            LedgerReplay(consumed, **wrong)


def test_a_run_without_a_ledger_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"has no ledger\.jsonl"):
        read_consumed(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere has no ledger\.jsonl"):
        read_consumed(tmp_path / "nowhere")


def test_data_that_are_gone_or_others_are_refused_by_name(tmp_path, data_folder, tiny_folder):
    first = FirstRun(tmp_path / "first", data_folder)
    other_corpora = corpora_file(tmp_path / "corpora", tiny_folder, num_documents=12)
    prepare(load_corpora(other_corpora), other_corpora.parent, tmp_path / "other")
    with pytest.raises(DataError, match=r"other is not the data that .*first was trained on; give replay\.data"):
        read_consumed(first.folder, DataFolder(tmp_path / "other"))
    lines = (first.folder / LEDGER).read_text().replace(str(data_folder.path), str(tmp_path / "moved"))
    (first.folder / LEDGER).write_text(lines)
    with pytest.raises(UsageError, match="moved"):
        read_consumed(first.folder)
    assert read_consumed(first.folder, data_folder).num_samples == len(first.samples)


def test_a_torn_last_line_leaves_what_was_recorded_before(tmp_path, data_folder):
    first = FirstRun(tmp_path / "first", data_folder, "moved", steps=10)
    path = first.folder / LEDGER
    path.write_bytes(path.read_bytes()[:-9])
    consumed = read_consumed(first.folder)
    assert consumed.num_samples == 8 * SEQUENCES
    in_order = consumed.samples()
    assert [next(in_order) for _ in range(8 * SEQUENCES)] == first.samples[: 8 * SEQUENCES]


def broken(lines: list[str], how: str) -> list[str]:
    """Return the lines of a ledger (header, plan, records) with something wrong."""
    plan, record = json.loads(lines[1]), json.loads(lines[-1])
    if how == "nothing recorded":
        return lines[:2]
    if how == "no plan":
        return [lines[0], *lines[2:]]
    if how == "no first phase":
        return [*lines[:2], *lines[3:]]
    if how == "a line cut in the middle":
        return [*lines[:2], lines[2][:30], *lines[3:]]
    if how == "an order of another version":
        plan["plan"]["order"]["colour"] = 1
    if how == "no domains":
        del plan["plan"]["domains"]
    if how == "no counts of a domain":
        del record["counts"]["beta"]
    if how == "a phase without weights":
        record["phases"] = [{"slot": 70}]
    if how == "weights of too few domains":
        record["phases"] = [{"slot": 70, "weights": [1]}]
    return [lines[0], json.dumps(plan), *lines[2:-1], json.dumps(record)]


BROKEN = (
    "nothing recorded, no plan, no first phase, a line cut in the middle, an order of another version, no domains, "
    "no counts of a domain, a phase without weights, weights of too few domains"
)


@pytest.mark.parametrize("how", BROKEN.split(", "))
def test_a_broken_ledger_is_refused_by_name(tmp_path, data_folder, how):
    first = FirstRun(tmp_path / "first", data_folder)
    path = first.folder / LEDGER
    lines = path.read_text().splitlines()
    path.write_text("\n".join(broken(lines, how)) + "\n")
    with pytest.raises(DataError, match=r"ledger\.jsonl"):
        read_consumed(first.folder)


def test_a_proxy_has_each_window_of_each_domain_once_evenly(data_folder):
    proxy = as_consumed(data_folder, Order(SEQ_LEN, 4, "replay"))
    plan = again(data_folder, proxy, 0.5)
    windows = {name: plan.num_windows(REPLAYED + name) for name in ("alpha", "beta")}
    samples = replayed(plan.take(2 * sum(windows.values())))
    assert Counter(samples) == Counter(Sample(name, draw) for name in windows for draw in range(windows[name]))
    alpha = np.cumsum([sample.domain == "alpha" for sample in samples])
    even = windows["alpha"] / len(samples) * np.arange(1, len(samples) + 1)
    assert np.abs(alpha - even).max() < 1
    with pytest.raises(DataError, match="second pass"):
        plan.take(2)


def test_a_later_run_trains_on_the_very_batches_of_an_earlier_one(tmp_path, data_folder, tiny_folder, monkeypatch):
    """Whole runs: the ledger of the first is what the second replays."""
    settings = {
        "source": str(tiny_folder),
        "data.dir": str(data_folder.path),
        "data.mixture": SHARES,
        "data.seq_len": SEQ_LEN,
        "inherit.layers": 2,
        "train.tokens": SEQ_LEN * SEQUENCES * 5,
        "train.global_batch_tokens": SEQ_LEN * SEQUENCES,
        "train.precision": "fp32",
        "evaluate.tokens_per_domain": 50,
        "control": False,
    }
    seen = []
    original = step_module.micro_batches

    def spy(batch, size):
        seen.append(batch)
        return original(batch, size)

    monkeypatch.setattr(step_module, "micro_batches", spy)
    run_recipe(load_recipe("inheritune-mini", settings), tmp_path / "first")
    first = np.concatenate([batch.input_ids for batch in seen])
    seen.clear()
    later = settings | {"replay.run": str(tmp_path / "first"), "replay.fraction": 0.5, "seed": 3}
    recipe = load_recipe("inheritune-mini", later)
    run_recipe(recipe, tmp_path / "second")
    samples = first_sampling(recipe, data_folder).plan().take(len(first))
    rows = [row for row, sample in enumerate(samples) if sample.domain.startswith(REPLAYED)]
    assert len(rows) == len(first) // 2
    assert np.array_equal(np.concatenate([batch.input_ids for batch in seen])[rows], first[: len(rows)])
    assert read_consumed(tmp_path / "second").num_samples == len(first) - len(rows)
    with pytest.raises(UsageError, match=r"more than the 20 that there are"):
        first_sampling(load_recipe("inheritune-mini", later | {"train.tokens": SEQ_LEN * SEQUENCES * 11}), data_folder)
    wider = later | {"data.seq_len": 2 * SEQ_LEN}
    with pytest.raises(UsageError, match=r"set data\.seq_len=24 to replay them"):
        first_sampling(load_recipe("inheritune-mini", wider), data_folder)
