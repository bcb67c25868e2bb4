"""Which window stands in which slot."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, UsageError
from scionlm.data import Mixture, Order, Sample, SamplePlan, TokenStream
from scionlm.data.mixing.ledger import Consumed
from scionlm.data.mixing.permute import permuted
from scionlm.data.mixing.replay import LedgerReplay
from scionlm.data.mixing.windows import IGNORE
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

quick = settings(max_examples=80)
weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9).map(float), min_size=1, max_size=6).map(
    lambda values: {f"d{i}": value for i, value in enumerate(values)}
)


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory) -> Callable[[int], TokenStream]:
    """Make a stream of `n` tokens in which token `i` is `i`, so that a label says which position it is."""
    folder = tmp_path_factory.mktemp("streams")

    def make(num_tokens: int) -> TokenStream:
        path = folder / f"{num_tokens}.safetensors"
        if not path.exists():
            info = TokenizerInfo("tiny", "0" * 64, 2**16, "<|endoftext|>", num_tokens - 1, 0)
            write_shard(path, [np.arange(num_tokens - 1)], [num_tokens], info)
        return TokenStream([Shard(path)])

    return make


def images_of(indices, length: int, key: str) -> np.ndarray:
    numbers = np.array(list(indices), dtype=np.int64)
    return permuted(numbers, np.full(len(numbers), length), [key] * len(numbers))


@quick
@given(st.integers(1, 3000), st.text(max_size=20))
def test_permuted_is_a_bijection(length, key):
    images = images_of(range(length), length, key)
    assert sorted(images.tolist()) == list(range(length))
    assert [int(images_of([index], length, key)[0]) for index in (0, length // 2)] == [
        images[0],
        images[length // 2],
    ]  # the place of one does not depend on what is asked for with it


def test_permuted_depends_on_the_key_and_is_not_the_identity():
    orders = {tuple(images_of(range(100), 100, key).tolist()) for key in "abcdefgh"}
    assert len(orders) == 8
    assert tuple(range(100)) not in orders


def test_permuted_spreads_every_index_over_all_places():
    """Each of 16 indices lands on each of 16 places with a chance of 1/16: 100 expected of 1600 keys."""
    images = np.stack([images_of(range(16), 16, f"key {number}") for number in range(1600)])
    for index in range(16):
        counts = Counter(images[:, index].tolist())
        assert set(counts) == set(range(16))
        assert all(50 < count < 160 for count in counts.values())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 2**20, 10**9, 2**40 + 1])
def test_permuted_stays_inside_at_the_ends(length):
    indices = sorted({0, length - 1, length // 2})
    images = images_of(indices, length, "k")
    assert len(set(images.tolist())) == len(indices)
    assert all(0 <= image < length for image in images)


@quick
@given(st.lists(st.tuples(st.integers(1, 3000), st.sampled_from("abc"), st.data()), max_size=20))
def test_permuting_many_at_once_is_permuting_each_alone(cases):
    drawn = [(data.draw(st.integers(0, length - 1)), length, key) for length, key, data in cases]
    together = permuted(
        np.array([i for i, _, _ in drawn], dtype=np.int64),
        np.array([n for _, n, _ in drawn], dtype=np.int64),
        [k for _, _, k in drawn],
    )
    assert together.tolist() == [int(images_of([i], n, k)[0]) for i, n, k in drawn]


def worst_deviation(domains: Iterator[str] | list[str], asked: dict[str, float]) -> float:
    """Return the largest difference, in any prefix and domain, of the count from the sum of the weights."""
    total = sum(Fraction(value) for value in asked.values())
    share = {name: float(Fraction(value) / total) for name, value in asked.items()}
    counts = dict.fromkeys(asked, 0)
    worst = 0.0
    for slot, domain in enumerate(domains, start=1):
        counts[domain] += 1
        worst = max(worst, *(abs(counts[name] - share[name] * slot) for name in asked))
    return worst


@quick
@given(asked=weights)
def test_in_every_prefix_each_domain_is_within_one_of_its_share(stream_of, asked):
    stream = stream_of(9)
    plan = SamplePlan(dict.fromkeys(asked, stream), Mixture(asked), Order(8))
    assert worst_deviation([sample.domain for sample in plan.take(500)], asked) < 1


@quick
@given(asked=weights, batch=st.integers(1, 64))
def test_any_batch_is_within_two_of_its_share(stream_of, asked, batch):
    plan = SamplePlan(dict.fromkeys(asked, stream_of(9)), Mixture(asked), Order(8))
    total = sum(asked.values())
    for _ in range(5):
        counts = Counter(sample.domain for sample in plan.take(batch))
        assert all(abs(counts[name] - batch * value / total) < 2 for name, value in asked.items())


def test_naive_schemes_leave_the_bound():
    """The control: the largest weight always, an even rotation, and independent draws are all found out."""
    asked = {"a": 5.0, "b": 3.0, "c": 2.0}
    draws = np.random.default_rng(0).choice(list(asked), p=[0.5, 0.3, 0.2], size=500)
    for domains in (["a"] * 500, list("abc") * 166, draws.tolist()):
        assert worst_deviation(domains, asked) > 1


UNEVEN = {f"d{i}": value for i, value in enumerate([3.0, 10, 3, 2, 10, 3, 10, 2, 2, 20, 80])}


def test_where_greed_leaves_the_bound_the_plan_stays_in_it(stream_of):
    """That greed does is in test_chooser."""
    plan = SamplePlan(dict.fromkeys(UNEVEN, stream_of(9)), Mixture(UNEVEN), Order(8))
    assert worst_deviation([sample.domain for sample in plan.take(500)], UNEVEN) < 1


def test_the_draws_of_a_domain_count_up_without_a_gap(stream_of):
    plan = SamplePlan({"a": stream_of(9), "b": stream_of(9)}, Mixture({"a": 0.7, "b": 0.3}), Order(8))
    samples = plan.take(100)
    for name in "ab":
        draws = [sample.draw for sample in samples if sample.domain == name]
        assert draws == list(range(len(draws)))


@quick
@given(num_tokens=st.integers(2, 300), seq_len=st.integers(1, 40), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_an_epoch_predicts_each_token_but_the_first_exactly_once(stream_of, num_tokens, seq_len, epoch, seed):
    seq_len = min(seq_len, num_tokens - 1)
    plan = SamplePlan({"d": stream_of(num_tokens)}, Mixture({"d": 1.0}), Order(seq_len, seed))
    plan.take(epoch * plan.num_windows("d"))
    batch = plan.batch(plan.take(plan.num_windows("d")))
    assert Counter(batch.labels[batch.labels != IGNORE].tolist()) == Counter(range(1, num_tokens))
    predicted = batch.labels != IGNORE
    assert np.array_equal(batch.input_ids[predicted] + 1, batch.labels[predicted])  # a label is the next token
    assert np.array_equal(np.diff(batch.input_ids, axis=1), np.ones((len(batch.labels), seq_len - 1)))


def test_a_shifted_window_would_be_found_out(stream_of):
    """The control for the count above: leave one window out, or take one twice, and it no longer holds."""
    plan = SamplePlan({"d": stream_of(100)}, Mixture({"d": 1.0}), Order(8))
    samples = plan.take(plan.num_windows("d"))
    for wrong in (samples[1:], [samples[0], *samples[:-1]]):
        labels = plan.batch(wrong).labels
        assert Counter(labels[labels != IGNORE].tolist()) != Counter(range(1, 100))


def first_tokens(plan: SamplePlan, domain: str, count: int) -> list[int]:
    """Return which windows of a domain its next samples are, by their first token."""
    samples = [sample for sample in plan.take(count) if sample.domain == domain]
    return plan.batch(samples).input_ids[:, 0].tolist()


def test_each_epoch_and_each_domain_has_an_order_of_its_own(stream_of):
    stream = stream_of(50 * 4 + 1)

    def plan() -> SamplePlan:
        return SamplePlan({"a": stream, "b": stream}, Mixture({"a": 1.0, "b": 1.0}), Order(4))

    first = plan()
    batch = first.batch([s for s in first.take(300) if s.domain == "a"]).input_ids[:, 0].reshape(3, 50)
    other = first_tokens(plan(), "b", 100)
    orders = [tuple(row) for row in batch.tolist()] + [tuple(other)]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(row)) for row in orders}) == 1


def test_the_plan_is_a_function_of_seed_and_stage(stream_of):
    streams = {"a": stream_of(201), "b": stream_of(300)}

    def ids(seed: int = 0, stage: str = "main", **shares: float) -> bytes:
        plan = SamplePlan(streams, Mixture(shares or {"a": 0.6, "b": 0.4}), Order(8, seed, stage))
        return plan.batch(plan.take(80)).input_ids.tobytes()

    assert ids() == ids()
    assert len({ids(), ids(seed=1), ids(stage="recovery"), ids(a=0.5, b=0.5)}) == 4
    assert ids() == ids(a=6.0, b=4.0)  # weights need not sum to one


@quick
@given(asked=weights, before=st.integers(0, 150), after=st.integers(1, 60))
def test_a_restored_plan_goes_on_as_if_it_had_not_stopped(stream_of, asked, before, after):
    def plan() -> SamplePlan:
        return SamplePlan(dict.fromkeys(asked, stream_of(50)), Mixture(asked), Order(8, seed=3))

    whole = plan().take(before + after)
    first, second = plan(), plan()
    first.take(before)
    second.restore(first.state())
    assert second.state() == first.state()
    assert second.take(after) == whole[before:]
    assert second.take(1) != [whole[-1]]


KINDS = ("ramp", "moved", "redistribute", "repeat", "original", "offset", "reshuffled", "packed and masked")


def plan_of_kind(kind: str, stream_of) -> SamplePlan:
    """Return a plan with whatever a state has to hold; all but the ramp have their weights set while they run."""
    streams = {"a": stream_of(50), "b": stream_of(77), "c": stream_of(33)}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    order = Order(8, 3)
    if kind == "ramp":
        return SamplePlan(streams, Mixture(shares, {"a": 0.0, "b": 0.1, "c": 0.9}, 90), order)
    if kind == "redistribute":
        order = replace(order, max_epochs={"a": 2, "c": 3.5}, exhausted="redistribute")
    if kind == "packed and masked":
        order = replace(order, packing="best_fit", document_mask=True)
    if kind not in ("original", "offset", "reshuffled"):
        return SamplePlan(streams, Mixture(shares), order)
    first = SamplePlan({"x": stream_of(41), "y": stream_of(60)}, Mixture({"x": 0.6, "y": 0.4}), Order(8, stage="old"))
    first.take(13)
    first.set_weights({"x": 0.1, "y": 0.9}, 10)
    first.take(8)
    places = {name: first._places[name] for name in "xy"}
    consumed = Consumed(None, places, first.state()["counts"], first.new_phases(), ["x", "y"], 8)
    replay = LedgerReplay(consumed, 0.3, kind, offset=0.4 if kind == "offset" else 0.0, repeat=True, seed=5)
    return SamplePlan(streams, Mixture(shares), order, replay)


def drawn(plan: SamplePlan, kind: str, slots: int, changes: int = 11) -> list[Sample]:
    """Take one slot after another; every so many, new weights are set, which the slot alone decides."""
    samples = []
    for _ in range(slots):
        if kind != "ramp" and plan.slot and plan.slot % changes == 0:
            a = 0.1 + plan.slot * 7 % 60 / 100
            plan.set_weights({"a": a, "b": 0.7 * (1 - a), "c": 0.3 * (1 - a)}, changes)
        samples += plan.take(1)
    return samples


@pytest.mark.parametrize("kind", KINDS)
@settings(quick, max_examples=25)
@given(before=st.integers(0, 120), after=st.integers(1, 40))
def test_a_plan_of_any_kind_goes_on_from_any_slot(stream_of, kind, before, after):
    whole = drawn(plan_of_kind(kind, stream_of), kind, before + after)
    first, second = plan_of_kind(kind, stream_of), plan_of_kind(kind, stream_of)
    drawn(first, kind, before)
    state = json.loads(json.dumps(first.state()))
    drawn(second, kind, 17)  # whatever the other had done before must not matter
    second.restore(state)
    assert second.state() == first.state()
    assert second.weights() == first.weights()
    assert drawn(second, kind, after) == whole[before:]
    drawn(first, kind, after)
    assert (second.state(), second.epochs()) == (first.state(), first.epochs())
    mine, theirs = second.batch(whole), first.batch(whole)
    assert np.array_equal(mine.input_ids, theirs.input_ids)
    assert np.array_equal(mine.labels, theirs.labels)


NEEDED = [
    *((kind, part) for kind in ("ramp", "moved", "original", "packed and masked") for part in ("phase", "counts")),
    *(("redistribute", part) for part in ("phase", "counts", "exhausted")),
    *((kind, "replay") for kind in ("original", "offset", "reshuffled")),
    ("moved", "debt"),
]


@pytest.mark.parametrize(("kind", "part"), NEEDED)
def test_each_part_of_a_state_is_needed(stream_of, kind, part):
    """The control: a state of which one part is that of the beginning does not go on to the same samples."""
    plan, other = plan_of_kind(kind, stream_of), plan_of_kind(kind, stream_of)
    beginning = other.state()[part]
    drawn(plan, kind, 60)
    right = drawn(plan_of_kind(kind, stream_of), kind, 120)[60:]
    other.restore(plan.state() | {part: beginning})
    try:
        assert drawn(other, kind, 60) != right
    except DataError:  # a domain that the wrong state takes to be exhausted
        assert kind == "redistribute"


@pytest.mark.parametrize("kind", KINDS)
@settings(quick, max_examples=25)
@given(parts=st.lists(st.integers(0, 25), min_size=1, max_size=8))
def test_taking_in_parts_is_taking_at_once(stream_of, kind, parts):
    once, bit_by_bit = plan_of_kind(kind, stream_of), plan_of_kind(kind, stream_of)
    samples = [sample for part in parts for sample in bit_by_bit.take(part)]
    assert samples == once.take(sum(parts))
    assert bit_by_bit.state() == once.state()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (4, 3), (8, 1)])
def test_all_devices_together_see_the_same_sequences(stream_of, kind, world, micro):
    """Each device has a plan of its own, takes the global batch, and reads its part of it in micro-batches."""
    steps, sequences = 6, 16
    plans = [plan_of_kind(kind, stream_of) for _ in range(world + 1)]
    for _ in range(steps):
        whole = plans[0].batch(plans[0].take(sequences))
        seen: dict[int, np.ndarray] = {}
        for rank, plan in enumerate(plans[1:]):
            samples = plan.take(sequences)
            rows = list(range(rank, sequences, world))
            for start in range(0, len(rows), micro):
                some = rows[start : start + micro]
                batch = plan.batch([samples[row] for row in some])
                seen |= {row: ids for row, ids in zip(some, batch.input_ids, strict=True)}
        assert sorted(seen) == list(range(sequences))
        assert all(np.array_equal(seen[row], whole.input_ids[row]) for row in seen)


def test_resuming_at_a_million_steps_takes_no_time(stream_of):
    """State and batch are had at once, wherever the run stands and whatever its weights did."""
    step, sequences = 10**6, 64
    shares = {f"d{i}": value for i, value in enumerate([1.0, 1, 2, 2, 2, 4, 4, 8, 8, 32])}  # 64: exact in binary
    streams = {name: stream_of(2000 + i) for i, name in enumerate(shares)}

    def plan() -> SamplePlan:
        return SamplePlan(streams, Mixture(shares), Order(256))

    def state(slots: int) -> dict:
        """The state after so many slots: a whole number of rounds, in which each has exactly its share."""
        counts = {name: int(value * slots / 64) for name, value in shares.items()}
        whole = plan().state()
        return whole | {"slot": slots, "counts": counts, "phase": whole["phase"] | {"counts": list(counts.values())}}

    near = plan()
    near.take(640)
    assert near.state() == state(640)  # so it is the state of a plan that was dealt out
    opened, times = plan(), []
    for _ in range(5):
        started = time.process_time()
        opened.restore(state(step * sequences))
        batch = opened.batch(opened.take(sequences))
        times.append(time.process_time() - started)
    assert min(times) < 0.05
    assert batch.input_ids.shape == (sequences, 256)
    assert opened.state() == state((step + 1) * sequences)


def test_a_state_is_plain_json_and_no_view_of_the_plan(stream_of):
    plan = SamplePlan({"a": stream_of(9)}, Mixture({"a": 1.0}), Order(8))
    state = plan.state()
    plan.take(5)
    assert (state["slot"], state["counts"], state["phase"]["counts"]) == (0, {"a": 0}, [0])
    after = plan.state()
    assert (after["slot"], after["counts"], after["phase"]["counts"]) == (5, {"a": 5}, [5])
    assert json.loads(json.dumps(after)) == after


def test_a_state_of_other_domains_is_refused(stream_of):
    plan = SamplePlan({"a": stream_of(9)}, Mixture({"a": 1.0}), Order(8))
    with pytest.raises(DataError, match=r"\['b'\] are not \['a'\]"):
        plan.restore({"slot": 1, "counts": {"b": 1}})


def test_a_batch_is_its_micro_batches_one_after_another(stream_of):
    plan = SamplePlan({"a": stream_of(100), "b": stream_of(77)}, Mixture({"a": 0.5, "b": 0.5}), Order(8))
    samples = plan.take(12)
    whole = plan.batch(samples)
    parts = [plan.batch(samples[i : i + 4]) for i in range(0, 12, 4)]
    assert np.array_equal(whole.input_ids, np.concatenate([part.input_ids for part in parts]))
    assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))


def test_a_domain_of_less_than_a_window_is_refused_by_name(stream_of):
    SamplePlan({"a": stream_of(9)}, Mixture({"a": 1.0}), Order(8))
    with pytest.raises(DataError, match="domain 'a' has 9 training tokens, fewer than one window of 10"):
        SamplePlan({"a": stream_of(9)}, Mixture({"a": 1.0}), Order(9))


def test_epochs_are_counted(stream_of):
    plan = SamplePlan({"a": stream_of(81), "b": stream_of(161)}, Mixture({"a": 1.0, "b": 1.0}), Order(8))
    plan.take(40)
    assert plan.epochs() == {"a": 2.0, "b": 1.0}


def test_a_domain_without_weight_is_never_drawn(stream_of):
    plan = SamplePlan({"a": stream_of(9), "b": stream_of(9)}, Mixture({"a": 1.0, "b": 0.0}), Order(8))
    assert {sample.domain for sample in plan.take(50)} == {"a"}


@pytest.mark.parametrize(
    "asked",
    [
        {"a": 1.0, "b": -0.5},
        {"a": float("nan"), "b": 1.0},
        {"a": 0.0, "b": 0.0},
        {"a": 1.0, "b": 1.0, "c": 1.0},
        {"a": 1.0},
    ],
    ids=["negative", "nan", "zero", "unknown", "missing"],
)
def test_weights_that_are_none_are_refused(stream_of, asked):
    with pytest.raises(UsageError, match="weight"):
        SamplePlan({"a": stream_of(9), "b": stream_of(9)}, Mixture(asked), Order(8))
