"""The learning rate as a function of the step."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.schedules import Schedule

quick = settings(deadline=None, database=None, derandomize=True, max_examples=200)


@st.composite
def schedules(draw, names=("cosine", "linear", "constant")):
    total = draw(st.integers(2, 400))
    return Schedule(
        draw(st.sampled_from(names)),
        total_steps=total,
        warmup_steps=draw(st.integers(0, total - 1)),
        min_lr_ratio=draw(st.floats(0, 1)),
    )


@quick
@given(schedules())
def test_the_multiplier_is_always_between_nothing_and_the_peak(schedule):
    assert all(0.0 <= schedule(step) <= 1.0 for step in range(schedule.total_steps + 5))


@quick
@given(schedules())
def test_warmup_rises_in_a_straight_line_to_the_peak_at_its_last_update(schedule):
    for step in range(schedule.warmup_steps):
        assert schedule(step) == (step + 1) / schedule.warmup_steps
    assert schedule(max(schedule.warmup_steps - 1, 0)) == 1.0


@quick
@given(schedules())
def test_no_update_before_the_floor_is_spent_on_nothing(schedule):
    assert all(schedule(step) > 0.0 for step in range(schedule.total_steps - 1))


@quick
@given(schedules(("cosine", "linear")))
def test_the_last_update_stands_exactly_on_the_floor(schedule):
    assert schedule(schedule.total_steps - 1) == schedule.min_lr_ratio
    assert schedule(schedule.total_steps + 100) == schedule.min_lr_ratio


@quick
@given(schedules(("cosine", "linear")))
def test_the_decay_never_rises(schedule):
    decay = [schedule(step) for step in range(max(schedule.warmup_steps - 1, 0), schedule.total_steps)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(decay))


@quick
@given(schedules(("constant",)))
def test_constant_stays_at_the_peak(schedule):
    assert {schedule(step) for step in range(schedule.warmup_steps, schedule.total_steps)} == {1.0}


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "middle"), [(0, 50), (1, 50), (21, 60)])
def test_the_middle_of_the_decay_is_the_mean_of_peak_and_floor(name, warmup, middle):
    schedule = Schedule(name, total_steps=101, warmup_steps=warmup, min_lr_ratio=0.1)
    assert schedule(middle) == pytest.approx(0.55, abs=1e-12)


def test_cosine_and_linear_differ_elsewhere_by_the_known_curve():
    cosine = Schedule("cosine", total_steps=101, warmup_steps=1, min_lr_ratio=0.1)
    linear = Schedule("linear", total_steps=101, warmup_steps=1, min_lr_ratio=0.1)
    assert cosine(25) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert linear(25) == pytest.approx(0.1 + 0.9 * 0.75)
    assert cosine(25) > linear(25)
    assert cosine(75) < linear(75)


@quick
@given(schedules(("cosine", "linear")), st.integers(1, 50))
def test_a_longer_run_is_higher_at_the_same_step(schedule, more):
    """A control: a schedule that ignored its length would pass most of the tests above."""
    longer = Schedule(schedule.name, schedule.total_steps + more, schedule.warmup_steps, schedule.min_lr_ratio)
    assert longer(schedule.total_steps - 1) >= schedule(schedule.total_steps - 1)
    if schedule.min_lr_ratio < 0.9:
        assert longer(schedule.total_steps - 1) > schedule(schedule.total_steps - 1)
