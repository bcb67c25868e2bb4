"""How much of each domain: mixtures, ramps, weights that are set while training runs, and domains that run out."""

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import first_sampling
from scionlm.core.errors import DataError, UsageError
from scionlm.data import Mixture, Order, SamplePlan, TokenStream
from scionlm.data.mixing.chooser import Ramp
from scionlm.data.mixing.mixture import by_temperature, demand_from_json, demand_to_json, rounded_counts, whole_weights
from scionlm.recipes.presets import load_recipe

quick = settings(max_examples=80)
share = st.floats(0.01, 1) | st.integers(1, 9).map(float)


def stream_of(num_windows: int) -> TokenStream:
    """Return a stream of so many windows of four tokens."""
    tokens = np.arange(4 * num_windows + 1)
    header = {"tokenizer": {"separator_id": int(tokens[-1])}}
    return TokenStream([SimpleNamespace(tokens=tokens, document_ends=np.array([len(tokens)]), header=header)])


def plan_of(shares: dict[str, float], windows: int | dict[str, int] = 5, ramp=None, slots: int = 0, **order):
    streams = {name: stream_of(windows if isinstance(windows, int) else windows[name]) for name in shares}
    return SamplePlan(streams, Mixture(shares, ramp, slots), Order(4, **order))


def named(values: list[float]) -> dict[str, float]:
    return {f"d{i}": value for i, value in enumerate(values)}


@st.composite
def changing(draw, longest: int = 30) -> tuple[dict[str, float], list[tuple[dict[str, float], int]]]:
    """First shares, and then new ones, each with the number of slots that they hold for."""
    domains = draw(st.integers(1, 5))
    shares = st.lists(share, min_size=domains, max_size=domains).map(named)
    return draw(shares), draw(st.lists(st.tuples(shares, st.integers(1, longest)), min_size=1, max_size=8))


class Watch:
    """Deals from a plan, one slot after another, and notes how far each domain comes from what was in force."""

    def __init__(self, plan: SamplePlan) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.in_force: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.worst = self.worst_asked = 0.0

    def take(self, slots: int, asked: dict[str, float]) -> None:
        total = sum(asked.values())
        for _ in range(slots):
            for name, weight in self.plan.weights().items():
                self.in_force[name] += weight
                self.asked[name] += asked[name] / total
            self.counts[self.plan.take(1)[0].domain] += 1
            self.worst = max(self.worst, *(abs(self.in_force[n] - self.counts[n]) for n in asked))
            self.worst_asked = max(self.worst_asked, *(abs(self.asked[n] - self.counts[n]) for n in asked))


# Mixtures


def test_temperature_goes_from_sizes_to_equal_shares():
    sizes = {"a": 10**9, "b": 10**6, "c": 10**3}
    assert by_temperature(sizes, 1) == pytest.approx({"a": 1, "b": 1e-3, "c": 1e-6})
    assert by_temperature(sizes, 3) == pytest.approx({"a": 1, "b": 0.1, "c": 0.01})
    assert all(value > 0.87 for value in by_temperature(sizes, 100).values())


@pytest.mark.parametrize(
    ("shares", "start"),
    [({"a": 0.0}, None), ({"a": float("inf")}, None), ({"a": 1.0}, {"a": -1.0}), ({"a": 1.0}, {"b": 1.0}), ({}, None)],
)
def test_a_mixture_that_is_none_is_refused(shares, start):
    with pytest.raises(UsageError):
        Mixture(shares, start, 10)


@quick
@given(st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9).map(float), min_size=1, max_size=6).map(named))
def test_whole_weights_sum_exactly_and_are_near_what_was_asked(asked):
    whole = whole_weights(asked)
    assert sum(whole.values()) == 2**32
    total = sum(Fraction(value) for value in asked.values())
    assert all(abs(whole[name] - Fraction(value) / total * 2**32) < 1.001 for name, value in asked.items())


@quick
@given(st.lists(share, min_size=1, max_size=5), st.data())
def test_a_ramp_is_linear_from_the_first_shares_to_the_last(values, data):
    names = named(values)
    start = named(data.draw(st.lists(share | st.just(0.0), min_size=len(values), max_size=len(values)).filter(sum)))
    slots = data.draw(st.integers(1, 50))
    watch = Watch(plan_of(names, ramp=start, slots=slots))
    for slot in range(1, slots + 20):
        part = min(slot / slots, 1)
        now = {n: (1 - part) * start[n] / sum(start.values()) + part * names[n] / sum(values) for n in names}
        assert watch.plan.weights() == pytest.approx(now, abs=1e-8)
        watch.take(1, now)
    assert watch.worst < 1
    assert watch.worst_asked < 1


@quick
@given(changing())
def test_a_demand_comes_back_from_json_as_it_was(case):
    shares, later = case
    for mixture in (Mixture(shares), Mixture(shares, later[0][0], later[0][1])):
        demand = mixture.demand()
        again = demand_from_json(json.loads(json.dumps(demand_to_json(demand))))
        assert isinstance(again, Ramp) == (mixture.ramp_from is not None)
        for slot in (1, 2, later[0][1], 10**7):
            assert [again.total(i, slot) for i in range(len(shares))] == [
                demand.total(i, slot) for i in range(len(shares))
            ]


# Weights that are set while it runs


@quick
@given(changing(), st.lists(st.floats(-2, 2), min_size=5, max_size=5))
def test_rounding_gives_whole_counts_of_the_slots_and_leaves_less_than_one_of_each(case, debts):
    shares, later = case
    names = list(shares)
    carry = dict(zip(names, debts, strict=False))
    carry[names[0]] -= sum(carry.values())  # debts and credits add up to nothing
    for weights, slots in later:
        total = sum(weights.values())
        counts = rounded_counts({name: weight / total for name, weight in weights.items()}, slots, carry)
        assert all(isinstance(count, int) and count >= 0 for count in counts.values())
        assert sum(counts.values()) == slots
        rest = {n: weights[n] / total * slots + carry[n] - counts[n] for n in names}
        if all(weights[n] / total * slots + carry[n] >= 0 for n in names):
            assert all(abs(value) < 1 for value in rest.values())
        carry = rest


@quick
@given(changing())
def test_each_period_holds_the_whole_counts_that_it_was_rounded_to(case):
    shares, later = case
    plan = plan_of(shares)
    for weights, slots in later:
        plan.set_weights(weights, slots)
        rounded = dict(zip(shares, plan.state()["phase"]["weights"], strict=True))
        assert sum(rounded.values()) == slots
        counts = Counter(sample.domain for sample in plan.take(slots))
        assert {name: counts[name] for name in shares} == rounded


@quick
@given(changing())
def test_each_domain_is_within_one_of_the_weights_in_force_however_they_move(case):
    """Weights set at random times, each held for the period it was rounded to."""
    shares, later = case
    watch = Watch(plan_of(shares))
    for weights, slots in later:
        watch.plan.set_weights(weights, slots)
        watch.take(slots, weights)
    assert watch.worst < 1


@quick
@given(changing())
def test_the_bound_holds_from_the_mixture_on_into_the_first_weights_that_are_set(case):
    """As in training: the mixture is set for the first period, and then other weights, again and again."""
    shares, later = case
    watch = Watch(plan_of(shares))
    watch.plan.set_weights(shares, later[0][1])
    watch.take(later[0][1], shares)
    for weights, slots in later[1:]:
        watch.plan.set_weights(weights, slots)
        watch.take(slots, weights)
    assert watch.worst < 1


@quick
@given(changing(), st.data())
def test_weights_that_are_set_before_their_period_is_over_stay_within_two(case, data):
    """What the phase before still owed is carried into the next, and that one is within one of its own."""
    shares, later = case
    watch = Watch(plan_of(shares))
    for weights, slots in later:
        enough = max(slots, *(int(sum(weights.values()) / weight) + 1 for weight in weights.values()))
        watch.plan.set_weights(weights, enough)
        watch.take(data.draw(st.integers(1, enough)), weights)
    assert watch.worst_asked < 3


@quick
@given(changing())
def test_each_domain_is_within_two_of_the_weights_asked_for(case):
    """Where each domain is owed a sequence in each period."""
    shares, later = case
    watch = Watch(plan_of(shares))
    for weights, slots in later:
        enough = max(slots, *(int(sum(weights.values()) / weight) + 1 for weight in weights.values()))
        watch.plan.set_weights(weights, enough)
        watch.take(enough, weights)
    assert watch.worst_asked < 2


def test_rounding_without_carrying_would_leave_the_bound():
    """The control: 0.27 of 10 slots is 2.7, again and again; without what was rounded away it is 3 every time."""
    weights, none = {"a": 0.27, "b": 0.365, "c": 0.365}, {"a": 0.0, "b": 0.0, "c": 0.0}
    assert rounded_counts(weights, 10, none)["a"] * 40 > 0.27 * 400 + 2
    debt, given_to_a = none, 0
    for _ in range(40):
        counts = rounded_counts(weights, 10, debt)
        debt = {name: debt[name] + 10 * weights[name] - counts[name] for name in weights}
        given_to_a += counts["a"]
    assert given_to_a == 108


@pytest.mark.parametrize("period", [1, 3, 10, 64])
def test_a_domain_too_small_for_a_sequence_in_a_period_gets_its_share_all_the_same(period):
    weights = {"a": 0.5, "b": 0.49, "tiny": 0.01}
    plan = plan_of(weights)
    counts: Counter[str] = Counter()
    for _ in range(2000 // period):
        plan.set_weights(weights, period)
        counts.update(sample.domain for sample in plan.take(period))
    assert counts["tiny"] == pytest.approx(20, abs=1.5)
    assert counts["b"] == pytest.approx(980, abs=10)


def test_setting_the_same_weights_early_changes_no_share():
    """`set_weights` holds for so many slots at most: being called again sooner may not move the mixture."""
    weights = {"a": 0.5, "b": 0.5}
    for period, used in ((2, 1), (3, 1), (7, 3), (10, 9)):
        plan = plan_of(weights)
        counts: Counter[str] = Counter()
        for _ in range(300 // used):
            plan.set_weights(weights, period)
            counts.update(sample.domain for sample in plan.take(used))
        assert counts["a"] == pytest.approx(150, abs=5), (period, used)


def test_new_weights_act_from_the_very_next_slot():
    plan = plan_of({"a": 1.0, "b": 1.0})
    assert {sample.domain for sample in plan.take(6)} == {"a", "b"}
    plan.set_weights({"a": 0.0, "b": 1.0}, 5)
    assert plan.weights() == {"a": 0.0, "b": 1.0}
    assert [sample.domain for sample in plan.take(5)] == ["b"] * 5
    plan.set_weights({"a": 3.0, "b": 0.0}, 5)
    assert [sample.domain for sample in plan.take(5)] == ["a"] * 5


def test_weights_that_were_set_hold_until_they_are_set_again():
    """A period that is over goes on with the same counts."""
    plan = plan_of({"a": 1.0, "b": 1.0})
    plan.set_weights({"a": 0.3, "b": 0.7}, 10)
    counts = Counter(sample.domain for sample in plan.take(100))
    assert counts == {"a": 30, "b": 70}


def test_draws_go_on_over_phases():
    plan = plan_of({"a": 1.0, "b": 1.0})
    samples = plan.take(7)
    for weight in (0.2, 0.9, 0.5):
        plan.set_weights({"a": weight, "b": 1 - weight}, 10)
        samples += plan.take(10)
    for name in "ab":
        draws = [sample.draw for sample in samples if sample.domain == name]
        assert draws == list(range(len(draws)))


# Domains that run out


def test_redistribute_gives_the_share_to_the_others_in_proportion_and_says_so_once(capsys):
    plan = plan_of({"a": 0.6, "b": 0.3, "c": 0.1}, 12, max_epochs={"a": 1}, exhausted="redistribute")
    samples = plan.take(20)
    assert Counter(sample.domain for sample in samples)["a"] == 12
    assert samples[19].domain == "a"
    assert plan.weights() == pytest.approx({"a": 0, "b": 0.75, "c": 0.25}, abs=1e-9)
    watch = Watch(plan)
    watch.take(100, {"a": 0.0, "b": 0.75, "c": 0.25})
    assert watch.worst_asked < 1
    said = capsys.readouterr().err
    assert said.count("exhausted") == 1
    assert "'a' is exhausted after 20 sequences" in said


def test_redistribute_goes_on_until_the_last_window_of_the_last_domain(capsys):
    plan = plan_of({"a": 0.5, "b": 0.5}, {"a": 3, "b": 9}, max_epochs={"a": 2, "b": 1}, exhausted="redistribute")
    counts = Counter(sample.domain for sample in plan.take(15))
    assert counts == {"a": 6, "b": 9}
    with pytest.raises(DataError, match="every domain"):
        plan.take(1)
    assert capsys.readouterr().err.count("exhausted") == 1  # of the last one the error speaks


def test_redistribute_keeps_the_proportions_of_weights_that_have_moved():
    plan = plan_of({"a": 1.0, "b": 1.0, "c": 1.0}, 12, max_epochs={"a": 1}, exhausted="redistribute")
    plan.set_weights({"a": 0.5, "b": 0.4, "c": 0.1}, 100)
    counts = Counter(sample.domain for sample in plan.take(100))
    assert counts["a"] == 12
    assert (counts["b"], counts["c"]) == (pytest.approx(0.8 * 88, abs=2), pytest.approx(0.2 * 88, abs=2))


def test_redistribute_keeps_them_when_a_second_domain_ends():
    shares = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    plan = plan_of(shares, 12, max_epochs={"a": 1, "b": 1}, exhausted="redistribute")
    plan.set_weights({"a": 0.4, "b": 0.3, "c": 0.24, "d": 0.06}, 100)
    while len(plan.state()["exhausted"]) < 2:
        plan.take(1)
    assert plan.weights() == pytest.approx({"a": 0, "b": 0, "c": 0.8, "d": 0.2}, abs=0.01)


def test_redistribute_gives_nothing_back_to_an_exhausted_domain_when_weights_are_set():
    plan = plan_of({"a": 1.0, "b": 1.0, "c": 2.0}, 4, max_epochs={"a": 1}, exhausted="redistribute")
    plan.take(20)
    for _ in range(5):
        plan.set_weights({"a": 0.9, "b": 0.05, "c": 0.05}, 10)
        assert Counter(sample.domain for sample in plan.take(10)) == {"b": 5, "c": 5}


def test_a_limit_of_less_than_a_window_redistributes_from_the_start():
    plan = plan_of({"a": 0.5, "b": 0.5}, 10, max_epochs={"a": 0.01}, exhausted="redistribute")
    assert Counter(sample.domain for sample in plan.take(8)) == {"b": 8}


def test_a_limit_of_less_than_a_window_stops_where_it_is_said_to_stop():
    with pytest.raises(DataError, match="'a' is exhausted"):
        plan_of({"a": 0.5, "b": 0.5}, 10, max_epochs={"a": 0.01}, exhausted="stop").take(8)


def test_a_ramp_goes_on_when_a_domain_is_exhausted():
    shares, start = {"a": 0.1, "b": 0.3, "c": 0.6}, {"a": 0.8, "b": 0.1, "c": 0.1}
    plan = plan_of(shares, 10, ramp=start, slots=60, max_epochs={"a": 1}, exhausted="redistribute")
    while "a" not in plan.state()["exhausted"]:
        plan.take(1)
    begun = plan.slot
    assert begun < 40
    b, c = 0.1 + begun / 60 * 0.2, 0.1 + begun / 60 * 0.5
    first, last = b / (b + c), 0.3 / 0.9
    for slot in range(begun + 1, 70):
        part = min((slot - begun) / (60 - begun), 1)
        now = (1 - part) * first + part * last
        assert plan.weights() == pytest.approx({"a": 0, "b": now, "c": 1 - now}, abs=1e-8)
        plan.take(1)


def test_a_ramp_to_a_domain_that_is_exhausted_stays_with_the_one_it_came_from():
    plan = plan_of({"old": 0.0, "new": 1.0}, {"old": 90, "new": 3}, ramp={"old": 1.0, "new": 0.0}, slots=40,
                   max_epochs={"new": 1}, exhausted="redistribute")  # fmt: skip
    assert Counter(sample.domain for sample in plan.take(40)) == {"old": 37, "new": 3}


def test_a_limit_for_a_domain_that_is_not_mixed_is_refused_by_name():
    with pytest.raises(UsageError, match="other"):
        plan_of({"a": 1.0}, max_epochs={"a": 1, "other": 1}, exhausted="stop")


def sampling_for(tiny_folder, data_folder, share: float, limit: int, steps: int):
    """Open a recipe of four sequences a step in which `alpha` may give so many of its windows."""
    windows = -(-(data_folder.num_tokens("alpha", "train") - 1) // 24)
    settings = {
        "source": str(tiny_folder),
        "data.dir": str(data_folder.path),
        "data.mixture": {"alpha": share, "beta": 1 - share},
        "data.seq_len": 24,
        "data.exhausted": "stop",
        "data.max_epochs": {"alpha": (limit + 0.5) / windows},
        "inherit.layers": 2,
        "train.global_batch_tokens": 24 * 4,
        "train.tokens": 24 * 4 * steps,
    }
    return first_sampling(load_recipe("inheritune-mini", settings), data_folder)


def test_a_supply_that_is_just_enough_is_not_refused(tiny_folder, data_folder):
    """0.3 of 40 sequences is 12, and 12 there are; that 0.3 is no whole number of 2**-32 must not matter."""
    plan = sampling_for(tiny_folder, data_folder, 0.3, 12, 10).plan()
    assert Counter(sample.domain for sample in plan.take(40)) == {"alpha": 12, "beta": 28}
    with pytest.raises(DataError, match=r"'alpha' would be gone through .* data.max_epochs allows"):
        sampling_for(tiny_folder, data_folder, 0.3, 12, 11)


@pytest.mark.parametrize("share", [0.3, 0.32, 0.45, 0.7])
def test_what_is_not_refused_beforehand_comes_to_its_end(tiny_folder, data_folder, share):
    for steps in range(2, 12):
        try:
            plan = sampling_for(tiny_folder, data_folder, share, 9, steps).plan()
        except DataError:
            assert share * 4 * steps > 9
            continue
        assert len(plan.take(4 * steps)) == 4 * steps, steps


def test_stop_says_who_is_exhausted_and_leaves_the_plan_where_it_was():
    plan = plan_of({"rare": 0.5, "b": 0.5}, {"rare": 4, "b": 50}, max_epochs={"rare": 1.5}, exhausted="stop")
    plan.take(9)
    before = plan.state()
    with pytest.raises(DataError, match=r"'rare' is exhausted: data.max_epochs allows 1.5 epochs"):
        plan.take(6)
    assert plan.state() == before
    left = plan.take(3)
    assert [sample.domain for sample in left].count("rare") + before["counts"]["rare"] == 6
    with pytest.raises(DataError, match="'rare'"):
        plan.take(2)


def test_without_a_limit_or_with_repeat_nothing_ends():
    for order in ({}, {"max_epochs": {"a": 1}, "exhausted": "repeat"}, {"max_epochs": None, "exhausted": "stop"}):
        plan = plan_of({"a": 0.5, "b": 0.5}, 4, **order)
        assert Counter(sample.domain for sample in plan.take(100)) == {"a": 50, "b": 50}


def test_repeat_takes_every_window_once_an_epoch_each_time_in_another_order():
    plan = plan_of({"a": 1.0}, 20)
    windows = plan.batch(plan.take(100)).input_ids[:, 0].reshape(5, 20)
    assert all(sorted(row) == list(range(0, 80, 4)) for row in windows.tolist())
    assert all(first != second for first, second in pairwise(windows.tolist()))


@quick
@given(changing(), st.integers(0, 100))
def test_weights_in_force_are_those_of_the_slots_that_follow(case, before):
    """`weights()` is what the next slot adds to the demand: shares of one, and the mixture's where nothing was set."""
    shares, later = case
    plan = plan_of(shares)
    plan.take(before)
    assert plan.weights() == pytest.approx({n: v / sum(shares.values()) for n, v in shares.items()}, abs=1e-8)
    plan.set_weights(*later[0])
    assert sum(Fraction(value) for value in plan.weights().values()) == pytest.approx(1)
