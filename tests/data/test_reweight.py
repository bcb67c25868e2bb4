"""Weights that follow losses: the published numbers, and what each rule may never do."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import DataError
from scionlm.data import Mixture, Order, Sample, SamplePlan, TokenStream
from scionlm.data.mixing.reweight import RULES, RuleSettings, reweight
from scionlm.recipes.config_data import ReweightConfig
from scionlm.recipes.reweighting import Reweighter
from scionlm.train.loop import _domain_means
from scionlm.train.step import StepResult

quick = settings(max_examples=80)
NAMES = ["cc", "github", "book", "se", "wiki", "arxiv", "c4"]
REDPAJAMA = dict(zip(NAMES, [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15], strict=True))
PLAIN = RuleSettings()


def named(values: list[float]) -> dict[str, float]:
    return {f"d{i}": value for i, value in enumerate(values)}


@st.composite
def cases(draw, most: float = 12) -> tuple[dict, dict, dict, dict]:
    """Losses, references, weights now and prior, of one to six domains."""
    size = draw(st.integers(1, 6))
    nats = st.lists(st.floats(0.1, most), min_size=size, max_size=size).map(named)
    shares = st.lists(st.floats(1e-3, 1), min_size=size, max_size=size).map(named)
    return draw(nats), draw(nats), draw(shares), draw(shares)


def share_of(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def by_excess(rule, excess: list[float], weights=REDPAJAMA, settings: RuleSettings = PLAIN) -> dict[str, float]:
    losses = {name: 2.0 + value for name, value in zip(weights, excess, strict=True)}
    return reweight(rule, losses, dict.fromkeys(weights, 2.0), weights, REDPAJAMA, settings)


SPREAD = [0.30, 0.10, 0.35, 0.15, 0.25, 0.12, 0.40]
BELOW = [0.05, -0.20, 0.10, 0.02, 0.03, 0.01, 0.15]


@pytest.mark.parametrize(
    ("rule", "excess", "expected"),
    [
        ("code", [0.0] * 7, [0.669947, 0.04501, 0.04501, 0.020012, 0.04501, 0.025012, 0.149999]),
        ("code", [0.7] * 7, [0.669947, 0.04501, 0.04501, 0.020012, 0.04501, 0.025012, 0.149999]),
        ("code", [-0.7] * 7, [0.669947, 0.04501, 0.04501, 0.020012, 0.04501, 0.025012, 0.149999]),
        ("paper", [0.0] * 7, list(REDPAJAMA.values())),
        ("paper", [0.7] * 7, list(REDPAJAMA.values())),
        ("code", SPREAD, [0.669394, 0.036823, 0.047278, 0.017213, 0.04278, 0.020877, 0.165636]),
        ("paper", SPREAD, [0.669446, 0.036812, 0.047268, 0.0172, 0.04277, 0.020865, 0.165639]),
    ],
)
def test_the_rules_give_the_numbers_of_the_released_code_and_of_the_paper(rule, excess, expected):
    assert list(by_excess(rule, excess).values()) == pytest.approx(expected, abs=6e-7)


def test_a_domain_below_its_reference_tells_the_code_from_the_paper():
    assert by_excess("code", BELOW)["github"] == pytest.approx(0.034859, abs=6e-7)
    assert by_excess("paper", BELOW)["github"] == pytest.approx(0.042238, abs=6e-7)


# Two times the excess: 1, 1.8, 0.8. `paper`: 0.5 e^1, 0.3 e^1.8, 0.2 e^0.8 over their sum; `code` and `doremi` mix
# 1e-4 and 1e-3 of thirds into it. `proportional`: 0.4 of 0.25, 0.4 of 0.45, 0.2 of 0.4, 1e-4 of thirds mixed in.
# `bounded`: from the mean excess, 0.6, moves of -0.2, 0.6 (0.3 at most) and -0.4 (-0.3), and a tenth of the way back:
# 0.5 e^(-0.2 + 0.1 ln 0.8), 0.3 e^(0.3 + 0.1 ln 4/3), 0.2 e^(-0.3).
GOLDEN = {
    "paper": [0.375542, 0.501471, 0.122987],
    "code": [0.375538, 0.501454, 0.123008],
    "doremi": [0.375500, 0.501303, 0.123198],
    "proportional": [0.277783, 0.499983, 0.222233],
    "bounded": [0.414735, 0.431771, 0.153494],
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_gives_the_weights_that_its_formula_gives_by_hand(rule):
    losses, references = {"a": 2.5, "b": 2.9, "c": 1.4}, {"a": 2.0, "b": 2.0, "c": 1.0}
    weights, prior = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.4, "b": 0.4, "c": 0.2}
    found = reweight(rule, losses, references, weights, prior, RuleSettings(step_size=2.0))
    assert list(found.values()) == pytest.approx(GOLDEN[rule], abs=6e-7)


@quick
@given(cases(), st.sampled_from(sorted(RULES)))
def test_weights_are_shares_of_one(case, rule):
    weights = reweight(rule, *case, PLAIN)
    assert set(weights) == set(case[2])
    assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert all(0 <= weight <= 1 + 1e-12 for weight in weights.values())
    for name in weights:  # a domain that has something keeps something
        assert weights[name] > 0 or rule in ("proportional", "paper")


@quick
@given(cases(), st.floats(1e-6, 0.3), st.sampled_from(["code", "doremi", "proportional"]))
def test_smoothing_leaves_each_domain_at_least_its_part_of_equal_weights(case, share, rule):
    losses, references, _, prior = case
    if rule == "proportional" and not any(losses[name] > references[name] for name in prior):
        losses = {name: references[name] + 1 for name in prior}
    for settings_, least in (
        (RuleSettings(smoothing=share), share),
        (PLAIN, {"code": 1e-4, "doremi": 1e-3, "proportional": 1e-4}[rule]),
    ):
        weights = reweight(rule, losses, references, case[2], prior, settings_)
        assert all(weight >= least / len(weights) * (1 - 1e-12) for weight in weights.values())


def test_without_smoothing_a_domain_goes_below_it():
    """The control: so that the floor above is smoothing's work."""
    losses = {"a": 12.0, "b": 2.0}
    for smoothing, least in ((0.0, 0), (0.1, 0.05)):
        weights = dict.fromkeys(losses, 0.5)
        for _ in range(5):
            weights = reweight("code", losses, dict.fromkeys(losses, 2.0), weights, weights, RuleSettings(1, smoothing))
        assert weights["b"] == pytest.approx(least, abs=1e-5)


@quick
@given(cases(), st.floats(0, 3), st.sampled_from(["code", "paper"]))
def test_a_constant_added_to_all_losses_changes_nothing_where_nothing_is_clipped(case, shift, rule):
    losses, references, weights, prior = case
    above = {name: references[name] + losses[name] for name in losses}
    shifted = {name: value + shift for name, value in above.items()}
    before = reweight(rule, above, references, weights, prior, PLAIN)
    assert reweight(rule, shifted, references, weights, prior, PLAIN) == pytest.approx(before, abs=1e-9)


def test_where_something_is_clipped_a_constant_does_change_the_paper():
    """The control, and where the two differ."""
    shifted = [value + 1 for value in BELOW]
    assert by_excess("code", BELOW) == pytest.approx(by_excess("code", shifted), abs=1e-12)
    assert by_excess("paper", BELOW)["github"] > by_excess("paper", shifted)["github"] + 0.005


@quick
@given(cases())
def test_a_domain_below_its_reference_never_gains_in_the_paper(case):
    losses, references, weights, prior = case
    before = share_of(weights)
    after = reweight("paper", losses, references, weights, prior, PLAIN)
    for name in after:
        if losses[name] <= references[name]:
            assert after[name] <= before[name] * (1 + 1e-9)
    first = next(iter(after))
    others = [name for name in after if name != first]
    if others and losses[first] > references[first] + 1e-3 and all(losses[n] <= references[n] for n in others):
        assert after[first] > before[first]


@quick
@given(cases(most=60), st.lists(cases(most=60), max_size=5), st.floats(1.05, 8), st.floats(0, 1), st.floats(0.05, 3))
def test_bounded_never_leaves_its_bounds(case, later, ratio, pull, max_step):
    settings_ = RuleSettings(max_ratio=ratio, pull=pull, max_step=max_step, step_size=10)
    prior = share_of(case[3])
    weights = prior
    for losses, references, _, _ in [case, *(other for other in later if set(other[0]) == set(prior))]:
        for _ in range(3):
            weights = reweight("bounded", losses, references, weights, prior, settings_)
            for name, share in prior.items():
                assert share / ratio * (1 - 1e-9) <= weights[name] <= min(share * ratio, 1) * (1 + 1e-9)


@quick
@given(cases())
def test_bounded_moves_towards_what_is_in_excess(case):
    losses, references, _, prior = case
    prior = share_of(prior)
    after = reweight("bounded", losses, references, prior, prior, RuleSettings(pull=0.0, max_ratio=1e6))
    excess = {name: max(losses[name] - references[name], 0.0) for name in prior}
    gain = {name: after[name] / prior[name] for name in prior}
    for one in prior:
        for other in prior:
            if excess[one] > excess[other]:
                assert gain[one] >= gain[other] * (1 - 1e-9)
            assert gain[one] / gain[other] <= math.exp(2 * 0.3) * (1 + 1e-9)  # at most max_step either way


def test_at_a_constant_spread_bounded_comes_to_rest_and_the_paper_runs_away():
    excess = {name: 0.3 * (name == "c4") for name in NAMES}
    bounded = paper = REDPAJAMA
    for update in range(1, 501):
        before = bounded
        bounded = by_excess("bounded", list(excess.values()), bounded)
        paper = by_excess("paper", list(excess.values()), paper)
        if update == 64:
            assert paper["c4"] > 0.9
    assert max(abs(bounded[name] - before[name]) for name in NAMES) < 1e-9
    assert 0.15 < bounded["c4"] <= 4 * 0.15 + 1e-9
    assert bounded["github"] / bounded["cc"] == pytest.approx(REDPAJAMA["github"] / REDPAJAMA["cc"], rel=1e-6)
    assert paper["c4"] > 0.999


@pytest.mark.parametrize("pull", [0.05, 0.1, 0.5])
def test_the_fixed_point_of_bounded_is_where_push_and_pull_are_equal(pull):
    """Small moves, far from every bound: ln(w / prior) differs between two domains by the excess over the pull."""
    weights = prior = {"a": 0.5, "b": 0.5}
    for _ in range(2000):
        weights = reweight(
            "bounded", {"a": 2.02, "b": 2.0}, {"a": 2.0, "b": 2.0}, weights, prior, RuleSettings(pull=pull)
        )
    assert math.log(weights["a"] / weights["b"]) == pytest.approx(0.02 / pull, rel=1e-6)


@quick
@given(cases(), st.sampled_from(sorted(RULES)), st.sampled_from([math.nan, math.inf, -math.inf, None]), st.booleans())
def test_a_loss_that_is_missing_or_not_finite_names_its_domain(case, rule, value, reference):
    losses, references, weights, prior = case
    broken = dict(references if reference else losses)
    name = list(broken)[-1]
    del broken[name]
    if value is not None:
        broken[name] = value
    given_ = (losses, broken) if reference else (broken, references)
    with pytest.raises(DataError, match=f"'{name}' has no finite {'reference' if reference else 'loss'}"):
        reweight(rule, *given_, weights, prior, PLAIN)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_losses_that_are_far_apart_overflow_nothing(rule):
    """A large step size first takes everything from b, and then wants to give it all back."""
    steep = RuleSettings(step_size=1000.0, smoothing=0.0)
    weights = prior = {"a": 0.5, "b": 0.5}
    for losses in ({"a": 5000.0, "b": 2.0}, {"a": 3.0, "b": 4.0}):
        weights = reweight(rule, losses, {"a": 2.0, "b": 2.0}, weights, prior, steep)
        assert math.fsum(weights.values()) == pytest.approx(1)
        assert all(0 <= weight <= 1 for weight in weights.values())


def test_bounds_hold_from_the_recipes_weights_wherever_a_stretch_begins():
    """A recovery begins with the weights that pruning ended with: the room that is left is not all of it again."""
    shares, prior = {"a": 0.4, "b": 0.6}, {"a": 0.1, "b": 0.9}
    plan, updates = reweighter(
        [{"a": 9.0, "b": 2.0}] * 40, dict.fromkeys(prior, 2.0), prior, shares=shares, max_ratio=4.0
    )
    assert plan.weights()["a"] == pytest.approx(0.4)
    for _ in range(40):
        weight = updates.update()["reweight/a/weight"]
    assert 0.3 < weight <= 0.4 + 1e-9


def test_proportional_is_the_prior_where_nothing_is_in_excess():
    assert by_excess("proportional", [-0.1] * 7) == pytest.approx(REDPAJAMA)
    assert by_excess("proportional", [0.0, 0.5, 0, 0, 0, 0, 0])["github"] == pytest.approx(1, abs=1e-3)


def reweighter(
    measured: list[dict[str, float]], references=None, prior=None, every: int = 5, shares=None, **config
) -> tuple[SamplePlan, Reweighter]:
    """Return a plan of two domains and what moves its weights by the losses given, one after another."""
    header = {"tokenizer": {"separator_id": 40}}
    shard = SimpleNamespace(tokens=np.arange(41), document_ends=np.array([41]), header=header)
    prior = prior or {"a": 0.5, "b": 0.5}
    plan = SamplePlan(dict.fromkeys(prior, TokenStream([shard])), Mixture(shares or prior), Order(4))
    made = Reweighter(ReweightConfig(**config), every, plan, 4, references, prior, lambda: measured.pop(0))
    return plan, made


def test_an_update_sets_the_plan_and_says_what_it_did():
    plan, updates = reweighter([{"a": 3.0, "b": 2.0}], {"a": 2.0, "b": 2.0}, rule="paper")
    plan.take(20)
    record = updates.update()
    wanted = math.e / (1 + math.e)
    assert plan.weights()["a"] == pytest.approx(wanted, abs=1 / 20)  # rounded to the 20 sequences of a period
    assert record["reweight/a/weight"] == pytest.approx(wanted)
    assert (record["reweight/a/nll_nats"], record["reweight/a/reference_nats"]) == (3.0, 2.0)


@quick
@given(cases(), st.integers(1, 9), st.lists(st.lists(st.floats(1, 4), min_size=6, max_size=6), max_size=5))
def test_each_domain_is_within_one_of_the_weights_in_force_from_the_first_slot_on(case, every, losses):
    """The first period too is dealt out in whole sequences, so that each one ends even."""
    prior = case[3]
    measured = [dict(zip(prior, values, strict=False)) for values in losses]
    plan, updates = reweighter(measured.copy(), dict.fromkeys(prior, 2.0), prior, every, rule="paper")
    debts = dict.fromkeys(prior, 0.0)
    for period in range(len(measured) + 1):
        for _ in range(4 * every):
            for name, weight in plan.weights().items():
                debts[name] += weight
            debts[plan.take(1)[0].domain] -= 1
            assert max(map(abs, debts.values())) < 1
        if period < len(measured):
            updates.update()


def test_the_best_so_far_is_a_reference_that_only_falls():
    plan, updates = reweighter([{"a": 3.0, "b": 3.0}, {"a": 2.0, "b": 3.5}, {"a": 2.5, "b": 3.0}], rule="paper")
    first, second = updates.update(), updates.update()
    assert first["reweight/a/weight"] == 0.5  # nothing to compare with yet
    assert (second["reweight/a/reference_nats"], second["reweight/b/reference_nats"]) == (2.0, 3.0)
    assert second["reweight/b/weight"] > 0.5
    other_plan, other = reweighter([{"a": 2.5, "b": 3.0}], rule="paper")
    other_plan.restore(plan.state())
    other.restore(updates.state())
    mine, theirs = updates.update(), other.update()
    assert {key: mine[key] for key in mine if "time" not in key} == {
        key: theirs[key] for key in theirs if "time" not in key
    }
    assert mine["reweight/a/reference_nats"] == 2.0


def test_a_domain_that_does_not_occur_in_a_step_has_no_loss_instead_of_nan():
    samples = [Sample("a", 0), Sample("b", 0), Sample("a", 1), Sample("c", 5)]
    result = StepResult(0.0, 1.0, 30, [6.0, 8.0, 10.0, 0.0], [4, 8, 4, 0], {}, True)
    means = _domain_means(samples, result)
    assert means == {"train/a/nll_nats": 2.0, "train/b/nll_nats": 1.0}  # c: nothing in it was predicted
