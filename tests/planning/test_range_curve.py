"""The rule that reads a peak off the curve of a learning-rate range test, on curves made by hand."""

import itertools
import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scionlm.planning.range_curve import is_over, range_rates, read_curve

quick = settings(max_examples=100)
RATES = range_rates()
PER_DECADE = 12


def valley(at=1e-3, fall=1.0, steep=2.0, noise=0.0, before=5.0, seed=0):
    """Return losses: flat, in a decade down to `before - fall` where the rate is `at`, then up by `steep` a decade."""
    rng = random.Random(seed)
    losses = []
    for rate in RATES:
        decades = math.log10(rate / at)
        ideal = before - fall * max(1 + decades, 0) if decades < 0 else before - fall + steep * decades
        losses.append(ideal + rng.gauss(0, noise))
        if is_over(before, losses):
            break
    return losses


def reading(losses, before=5.0):
    return read_curve(before, RATES[: len(losses)], losses)


def test_rates_rise_evenly_from_far_below_to_far_above():
    steps = [b / a for a, b in itertools.pairwise(RATES)]
    assert RATES[0] == 1e-6
    assert 0.5 < RATES[-1] < 1
    assert steps == pytest.approx([10 ** (1 / PER_DECADE)] * len(steps))


@pytest.mark.parametrize("at", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("fall", [0.02, 0.3, 3.0])
def test_a_clean_valley(at, fall):
    losses = valley(at, fall)
    found = reading(losses)
    assert found.lr_lowest is not None
    assert at / 2 < found.lr_lowest < at * 1.25
    assert found.proposal is not None
    assert at / 3 < found.proposal < 1.5 * at
    assert found.lr_diverges is not None
    assert found.lr_lowest < found.lr_diverges <= RATES[len(losses) - 1]
    assert len(found.smoothed) == len(losses) < len(RATES), "the test ends once the loss has clearly risen"
    assert f"{found.proposal:.1e}" == f"{float(f'{found.proposal:.1e}'):.1e}"
    assert f"{found.lr_lowest:.2g}" in found.why


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_the_proposal_little(seed):
    clean = reading(valley(fall=1.0)).proposal
    noisy = reading(valley(fall=1.0, noise=0.05, seed=seed)).proposal
    assert clean is not None
    assert noisy is not None
    assert clean / 2 < noisy < clean * 2


def test_one_high_loss_ends_nothing():
    losses = valley()
    at = RATES.index(min(RATES, key=lambda rate: abs(rate - 3e-5)))
    before = reading(losses)
    losses[at] += 3
    assert not is_over(5.0, losses[: at + 1])
    assert reading(losses).lr_diverges == before.lr_diverges


def test_a_test_that_breaks_the_weights_ends_there():
    losses = valley()[:37]
    assert not is_over(5.0, losses)
    for broken in (math.inf, math.nan):
        assert is_over(5.0, [*losses, broken])
        found = read_curve(5.0, RATES[:38], [*losses, broken])
        assert found.lr_diverges == RATES[37]
        assert found.proposal is not None
        assert len(found.smoothed) == 37


def test_what_diverges_at_once_gets_no_proposal():
    for losses in ([math.nan], [8.0, 9.0, 10.0]):
        assert is_over(5.0, losses)
        found = reading(losses)
        assert (found.lr_lowest, found.lr_diverges, found.proposal) == (None, RATES[0], None)
        assert "after the first step" in found.why


def test_what_never_diverges_gets_no_proposal():
    losses = [5.0 - 0.01 * number for number in range(len(RATES))]
    assert not is_over(5.0, losses)
    found = reading(losses)
    assert (found.lr_diverges, found.proposal) == (None, None)
    assert found.lr_lowest == RATES[-1]
    assert "not clearly higher yet" in found.why


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_what_never_falls_gets_no_proposal(noise):
    rng = random.Random(1)
    losses = []
    for rate in RATES:
        losses.append(5.0 + max(math.log10(rate / 1e-3), 0) + rng.gauss(0, noise))
        if is_over(5.0, losses):
            break
    found = reading(losses)
    assert (found.lr_lowest, found.proposal) == (None, None)
    assert found.lr_diverges == pytest.approx(1.6e-3, rel=0.3)
    assert "never fell" in found.why


valleys = st.builds(
    valley,
    at=st.floats(1e-5, 2e-2),
    fall=st.floats(0.02, 4),
    steep=st.floats(0.5, 8),
    noise=st.floats(0, 0.02),
    seed=st.integers(0, 99),
)


@quick
@given(valleys, st.floats(-4, 4))
def test_a_constant_added_to_all_losses_changes_nothing(losses, shift):
    plain, moved = reading(losses), reading([loss + shift for loss in losses], 5.0 + shift)
    assert (moved.lr_lowest, moved.lr_diverges, moved.proposal) == (
        plain.lr_lowest, plain.lr_diverges, plain.proposal
    )  # fmt: skip
    assert moved.smoothed == pytest.approx([loss + shift for loss in plain.smoothed], abs=1e-9)


@quick
@given(valleys)
def test_the_proposal_lies_below_what_diverges(losses):
    found = reading(losses)
    assume(found.proposal is not None)
    assert found.lr_lowest < found.lr_diverges
    assert found.proposal < found.lr_diverges


@quick
@given(valleys, st.integers(1, 12))
def test_a_valley_at_other_rates_moves_the_proposal_with_it(losses, places):
    """Everything goes by the ratio of rates: more of the flat beginning is a curve at higher rates."""
    before, after = reading(losses), reading([5.0] * places + losses)
    assume(before.proposal is not None and after.proposal is not None)
    assert after.proposal == pytest.approx(before.proposal * 10 ** (places / PER_DECADE), rel=0.1)
