"""Which window stands in which slot."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError, UsageError
from scionlm.data import SamplePlan, TokenStream
from scionlm.data.mixing.plan import IGNORE, permuted, whole_weights
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

quick = settings(deadline=None, database=None, derandomize=True, max_examples=80)
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


@quick
@given(st.integers(1, 3000), st.text(max_size=20))
def test_permuted_is_a_bijection(length, key):
    assert sorted(permuted(index, length, key) for index in range(length)) == list(range(length))


def test_permuted_depends_on_the_key_and_is_not_the_identity():
    orders = {tuple(permuted(i, 100, key) for i in range(100)) for key in "abcdefgh"}
    assert len(orders) == 8
    assert tuple(range(100)) not in orders


def test_permuted_spreads_every_index_over_all_places():
    """Each of 16 indices lands on each of 16 places with a chance of 1/16: 100 expected of 1600 keys."""
    for index in range(16):
        counts = Counter(permuted(index, 16, f"key {number}") for number in range(1600))
        assert set(counts) == set(range(16))
        assert all(50 < count < 160 for count in counts.values())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 2**20, 10**9, 2**40 + 1])
def test_permuted_stays_inside_at_the_ends(length):
    for index in {0, length - 1, length // 2}:
        assert 0 <= permuted(index, length, "k") < length


@quick
@given(weights)
def test_whole_weights_sum_exactly_and_are_near_what_was_asked(asked):
    whole = whole_weights(asked)
    assert sum(whole.values()) == 2**32
    total = sum(Fraction(value) for value in asked.values())
    assert all(abs(whole[name] - Fraction(value) / total * 2**32) < 1.001 for name, value in asked.items())


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
    plan = SamplePlan(dict.fromkeys(asked, stream), asked, seq_len=8, seed=0)
    assert worst_deviation([sample.domain for sample in plan.take(500)], asked) < 1


@quick
@given(asked=weights, batch=st.integers(1, 64))
def test_any_batch_is_within_two_of_its_share(stream_of, asked, batch):
    plan = SamplePlan(dict.fromkeys(asked, stream_of(9)), asked, seq_len=8, seed=0)
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


def test_taking_the_most_owed_domain_leaves_the_bound():
    """The control for the rule itself: a greedy choice looks fair, and is not for some weights."""
    total = sum(UNEVEN.values())
    counts = dict.fromkeys(UNEVEN, 0)
    greedy = []
    for slot in range(1, 501):
        greedy.append(max(UNEVEN, key=lambda name: UNEVEN[name] / total * slot - counts[name]))
        counts[greedy[-1]] += 1
    assert worst_deviation(greedy, UNEVEN) > 1


def test_where_greed_leaves_the_bound_the_plan_stays_in_it(stream_of):
    plan = SamplePlan(dict.fromkeys(UNEVEN, stream_of(9)), UNEVEN, seq_len=8, seed=0)
    assert worst_deviation([sample.domain for sample in plan.take(500)], UNEVEN) < 1


def test_the_draws_of_a_domain_count_up_without_a_gap(stream_of):
    plan = SamplePlan({"a": stream_of(9), "b": stream_of(9)}, {"a": 0.7, "b": 0.3}, seq_len=8, seed=0)
    samples = plan.take(100)
    for name in "ab":
        draws = [sample.draw for sample in samples if sample.domain == name]
        assert draws == list(range(len(draws)))


@quick
@given(num_tokens=st.integers(2, 300), seq_len=st.integers(1, 40), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_an_epoch_predicts_each_token_but_the_first_exactly_once(stream_of, num_tokens, seq_len, epoch, seed):
    seq_len = min(seq_len, num_tokens - 1)
    plan = SamplePlan({"d": stream_of(num_tokens)}, {"d": 1.0}, seq_len, seed)
    plan.take(epoch * plan.num_windows("d"))
    batch = plan.batch(plan.take(plan.num_windows("d")))
    assert Counter(batch.labels[batch.labels != IGNORE].tolist()) == Counter(range(1, num_tokens))
    predicted = batch.labels != IGNORE
    assert np.array_equal(batch.input_ids[predicted] + 1, batch.labels[predicted])  # a label is the next token
    assert np.array_equal(np.diff(batch.input_ids, axis=1), np.ones((len(batch.labels), seq_len - 1)))


def test_a_shifted_window_would_be_found_out(stream_of):
    """The control for the count above: leave one window out, or take one twice, and it no longer holds."""
    plan = SamplePlan({"d": stream_of(100)}, {"d": 1.0}, 8, 0)
    samples = plan.take(plan.num_windows("d"))
    for wrong in (samples[1:], [samples[0], *samples[:-1]]):
        labels = plan.batch(wrong).labels
        assert Counter(labels[labels != IGNORE].tolist()) != Counter(range(1, 100))


def order(plan: SamplePlan, domain: str, count: int) -> list[int]:
    """Return which windows of a domain its next samples are, by their first token."""
    samples = [sample for sample in plan.take(count) if sample.domain == domain]
    return plan.batch(samples).input_ids[:, 0].tolist()


def test_each_epoch_and_each_domain_has_an_order_of_its_own(stream_of):
    stream = stream_of(50 * 4 + 1)
    plan = SamplePlan({"a": stream, "b": stream}, {"a": 1.0, "b": 1.0}, 4, 0)
    batch = plan.batch([s for s in plan.take(300) if s.domain == "a"]).input_ids[:, 0].reshape(3, 50)
    other = order(SamplePlan({"a": stream, "b": stream}, {"a": 1.0, "b": 1.0}, 4, 0), "b", 100)
    orders = [tuple(row) for row in batch.tolist()] + [tuple(other)]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(row)) for row in orders}) == 1


def test_the_plan_is_a_function_of_seed_and_stage(stream_of):
    streams = {"a": stream_of(201), "b": stream_of(300)}

    def ids(seed: int = 0, stage: str = "main", **shares: float) -> bytes:
        plan = SamplePlan(streams, shares or {"a": 0.6, "b": 0.4}, 8, seed, stage)
        return plan.batch(plan.take(80)).input_ids.tobytes()

    assert ids() == ids()
    assert len({ids(), ids(seed=1), ids(stage="recovery"), ids(a=0.5, b=0.5)}) == 4
    assert ids() == ids(a=6.0, b=4.0)  # weights need not sum to one


@quick
@given(asked=weights, before=st.integers(0, 150), after=st.integers(1, 60))
def test_a_restored_plan_goes_on_as_if_it_had_not_stopped(stream_of, asked, before, after):
    def plan() -> SamplePlan:
        return SamplePlan(dict.fromkeys(asked, stream_of(50)), asked, 8, seed=3)

    whole = plan().take(before + after)
    first, second = plan(), plan()
    first.take(before)
    second.restore(first.state())
    assert second.state() == first.state()
    assert second.take(after) == whole[before:]
    assert second.take(1) != [whole[-1]]


def test_a_state_is_plain_json_and_no_view_of_the_plan(stream_of):
    plan = SamplePlan({"a": stream_of(9)}, {"a": 1.0}, 8, 0)
    state = plan.state()
    plan.take(5)
    assert state == {"slot": 0, "counts": {"a": 0}}
    assert json.loads(json.dumps(plan.state())) == {"slot": 5, "counts": {"a": 5}}


def test_a_state_of_other_domains_is_refused(stream_of):
    plan = SamplePlan({"a": stream_of(9)}, {"a": 1.0}, 8, 0)
    with pytest.raises(DataError, match=r"\['b'\] are not \['a'\]"):
        plan.restore({"slot": 1, "counts": {"b": 1}})


def test_a_batch_is_its_micro_batches_one_after_another(stream_of):
    plan = SamplePlan({"a": stream_of(100), "b": stream_of(77)}, {"a": 0.5, "b": 0.5}, 8, 0)
    samples = plan.take(12)
    whole = plan.batch(samples)
    parts = [plan.batch(samples[i : i + 4]) for i in range(0, 12, 4)]
    assert np.array_equal(whole.input_ids, np.concatenate([part.input_ids for part in parts]))
    assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))


def test_a_domain_of_less_than_a_window_is_refused_by_name(stream_of):
    SamplePlan({"a": stream_of(9)}, {"a": 1.0}, 8, 0)
    with pytest.raises(DataError, match="domain 'a' has 9 training tokens, fewer than one window of 10"):
        SamplePlan({"a": stream_of(9)}, {"a": 1.0}, 9, 0)


def test_epochs_are_counted(stream_of):
    plan = SamplePlan({"a": stream_of(81), "b": stream_of(161)}, {"a": 1.0, "b": 1.0}, 8, 0)
    plan.take(40)
    assert plan.epochs() == {"a": 2.0, "b": 1.0}


def test_a_domain_without_weight_is_never_drawn(stream_of):
    plan = SamplePlan({"a": stream_of(9), "b": stream_of(9)}, {"a": 1.0, "b": 0.0}, 8, 0)
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
        SamplePlan({"a": stream_of(9), "b": stream_of(9)}, asked, 8, 0)
