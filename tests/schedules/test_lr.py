"""The learning rate as a function of the step."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scionlm.schedules import Sizes, build_schedule, curve, describe

quick = settings(max_examples=200)
DECAYS = ("linear", "cosine", "one_minus_sqrt", "exponential")
NAMES = ("constant", *DECAYS, "inverse_sqrt", "wsd", "infinite", "neox_cosine")


@st.composite
def requests(draw, names=NAMES):
    total = draw(st.integers(2, 400))
    warmup = draw(st.integers(0, total // 2))
    decay = draw(st.integers(0, (total - warmup) // 2))
    sizes = Sizes(
        total,
        warmup,
        floor=draw(st.floats(0.001, 0.5)),
        decay=decay,
        decay_shape=draw(st.sampled_from(DECAYS)),
        cooldown=draw(st.integers(1, total - warmup - decay)),
        cooldown_shape=draw(st.sampled_from(("cosine", "inverse_sqrt"))),
        constant=draw(st.floats(0.5, 1)),
        timescale=draw(st.floats(0.01, 1000)),
    )
    return draw(st.sampled_from(names)), sizes


@quick
@given(requests())
def test_the_multiplier_is_positive_and_at_most_the_peak(request):
    schedule = build_schedule(*request)
    assert all(0.0 < schedule(step) <= 1.0 for step in range(request[1].total + 5))
    assert schedule.total_steps == request[1].total


@quick
@given(requests())
def test_warmup_rises_in_a_straight_line_to_the_peak_at_its_last_update(request):
    schedule, warmup = build_schedule(*request), request[1].warmup
    for step in range(warmup):
        assert schedule(step) == (step + 1) / warmup
    assert schedule.at(warmup) == 1.0


@quick
@given(requests((*DECAYS, "wsd", "infinite")))
def test_the_last_update_stands_exactly_on_the_floor(request):
    name, sizes = request
    assume(name not in ("wsd", "infinite") or sizes.decay)
    schedule = build_schedule(name, sizes)
    assert schedule(sizes.total - 1) == sizes.floor
    assert schedule(sizes.total + 100) == sizes.floor


@quick
@given(requests())
def test_nothing_rises_after_the_warmup_and_every_joint_is_continuous(request):
    schedule, sizes = build_schedule(*request), request[1]
    after = [schedule.at(t) for t in range(sizes.warmup, sizes.total + 1)]
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(after))
    for before, piece in itertools.pairwise(schedule.pieces):
        assert before.at(before.steps) == pytest.approx(piece.at(0), abs=1e-15)


@quick
@given(requests())
def test_a_schedule_is_plain_values_that_tell_schedules_apart(request):
    name, sizes = request
    mine = build_schedule(name, sizes).to_list()
    assert json.loads(json.dumps(mine)) == mine
    assert mine == build_schedule(name, sizes).to_list()
    assert mine != build_schedule(name, replace(sizes, total=sizes.total + 1)).to_list()


@quick
@given(requests(("wsd", "constant")), st.integers(1, 200))
def test_a_longer_stable_phase_changes_no_earlier_rate(request, more):
    name, sizes = request
    short, long = build_schedule(name, sizes), build_schedule(name, replace(sizes, total=sizes.total + more))
    for t in range(sizes.total - sizes.decay + 1):
        assert short.at(t) == long.at(t)


def test_a_longer_cosine_changes_them_all():
    """Negative control of the test above."""
    short, long = (build_schedule("cosine", Sizes(total, 10)) for total in (100, 120))
    assert all(short.at(t) < long.at(t) for t in range(11, 101))


def test_the_middle_of_a_symmetric_decay_is_the_mean_of_peak_and_floor():
    for name in ("cosine", "linear"):
        assert build_schedule(name, Sizes(120, 20, floor=0.1)).at(70) == pytest.approx(0.55, abs=1e-12)
    assert build_schedule("exponential", Sizes(120, 20, floor=0.01)).at(70) == pytest.approx(0.1)


def test_published_values_of_the_cosine_and_of_its_legacy():
    """At 25, 50, 75, 80, 90 and 100 % of a run, peak 3e-4, floor 3e-5, warm-up 1 %."""
    times = [round(share * 100_000) for share in (0.25, 0.5, 0.75, 0.8, 0.9, 1.0)]
    correct = [2.627e-4, 1.671e-4, 7.030e-5, 5.629e-5, 3.674e-5, 3.000e-5]
    legacy = [2.593e-4, 1.547e-4, 4.732e-5, 3.148e-5, 3.000e-5, 3.000e-5]
    for name, wanted in (("cosine", correct), ("neox_cosine", legacy)):
        schedule = build_schedule(name, Sizes(100_000, 1000, floor=0.1))
        assert [3e-4 * schedule.at(t) for t in times] == pytest.approx(wanted, abs=5e-8)


def test_the_legacy_cosine_reaches_its_floor_where_the_paper_did():
    schedule = build_schedule("neox_cosine", Sizes(132_366, 1323, floor=0.1))
    first = next(t for t in range(100_000, 132_366) if schedule.at(t) == 0.1)
    assert first == pytest.approx(106_577, abs=1)
    # With a floor below where it stands still, the last updates are all the same.
    still = build_schedule("neox_cosine", Sizes(1000, 100, floor=0.0))
    assert still.at(900) == still.at(1000) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.8)))
    assert still.at(899) > still.at(900)


@pytest.mark.parametrize(
    ("shape", "cooldown"),
    [("cosine", [2.802e-4, 2.325e-4, 1.848e-4]), ("inverse_sqrt", [2.100e-4, 1.856e-4, 1.730e-4])],
)
def test_published_values_of_the_infinite_schedules(shape, cooldown):
    sizes = Sizes(
        10_000, 100, floor=0.1, decay=1400, decay_shape="exponential", cooldown=6000, cooldown_shape=shape,
        constant=0.55, timescale=10,
    )  # fmt: skip
    schedule = build_schedule("infinite", sizes)
    times = [50, 100, 1600, 3100, 4600, 6100, 8600, 9300, 10_000]
    wanted = [1.5e-4, 3e-4, *cooldown, 1.65e-4, 1.65e-4, 7.036e-5, 3e-5]
    assert [3e-4 * schedule.at(t) for t in times] == pytest.approx(wanted, rel=2e-4)
    assert 3e-4 * schedule.at(9300) == pytest.approx(math.sqrt(1.65e-4 * 3e-5))
    assert [schedule.phase(t) for t in (100, 101, 6101, 8601)] == ["warmup", "cooldown", "constant", "decay"]


@quick
@given(st.floats(0.01, 1000), st.floats(0.1, 0.9))
def test_the_inverse_square_root_cools_down_below_the_straight_line_and_is_monotone(timescale, constant):
    sizes = Sizes(1000, 100, cooldown=600, cooldown_shape="inverse_sqrt", constant=constant, timescale=timescale)
    schedule = build_schedule("infinite", sizes)
    inside = range(101, 700)
    assert all(schedule.at(t) < 1 - (1 - constant) * (t - 100) / 600 for t in inside)
    assert all(schedule.at(t + 1) < schedule.at(t) for t in inside)


def test_the_inverse_square_root_cools_down_below_the_cosine_until_shortly_before_they_meet():
    """A cosine arrives level, the inverse square root with a slope: nobody is below throughout."""
    sizes = Sizes(1000, 0, cooldown=1000, cooldown_shape="inverse_sqrt", constant=0.55, timescale=10)
    root, cosine = (
        build_schedule("infinite", replace(sizes, cooldown_shape=shape)) for shape in ("inverse_sqrt", "cosine")
    )
    above = [t for t in range(1, 1000) if root.at(t) > cosine.at(t)]
    assert above == list(range(above[0], 1000))
    assert 900 < above[0] < 950


def test_an_infinite_schedule_without_a_cooldown_warms_up_to_its_constant_phase():
    schedule = build_schedule("infinite", Sizes(100, 10, constant=0.4, decay=20, floor=0.1))
    assert [schedule.at(t) for t in (0, 5, 10, 80, 100)] == [0, 0.2, 0.4, 0.4, 0.1]


def test_a_small_timescale_makes_the_inverse_square_root_a_straight_line():
    sizes = Sizes(1000, 0, cooldown=1000, cooldown_shape="inverse_sqrt", constant=0.5, timescale=1e-9)
    schedule = build_schedule("infinite", sizes)
    assert [schedule.at(t) for t in (250, 500, 750)] == pytest.approx([0.875, 0.75, 0.625])


def test_one_minus_sqrt_and_half_life():
    schedule = build_schedule("wsd", Sizes(1000, 0, floor=0.0, decay=400, decay_shape="one_minus_sqrt"))
    assert schedule.at(700) == 0.5  # a quarter of the decay
    halving = build_schedule("wsd", Sizes(1000, 0, decay=400, decay_shape="exponential", half_life=100))
    assert [halving.at(600 + 100 * k) for k in range(5)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])


def test_the_inverse_square_root_is_that_of_its_warmup():
    schedule = build_schedule("inverse_sqrt", Sizes(10_000, 100, floor=0.0))
    assert [schedule.at(t) for t in (100, 400, 900)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert build_schedule("inverse_sqrt", Sizes(10_000, 100, floor=0.3)).at(5000) == 0.3


def test_a_warmup_may_begin_elsewhere():
    schedule = build_schedule("constant", Sizes(20, 10, first=0.5))
    assert [schedule.at(t) for t in (0, 5, 10, 20)] == [0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("wsd", Sizes(10, 5, decay=6), "longer than its 10 steps"),
        ("infinite", Sizes(10, 2, cooldown=5, decay=4), "longer than its 10 steps"),
        ("wsd", Sizes(10, decay=6, decay_shape="exponential", floor=0.0), "never arrives at 0"),
    ],
)
def test_what_does_not_fit_is_refused(name, sizes, words):
    with pytest.raises(ValueError, match=words):
        build_schedule(name, sizes)


@quick
@given(requests(), st.integers(1, 500))
def test_a_curve_has_the_first_and_the_last_update_in_order(request, points):
    schedule = build_schedule(*request)
    drawn = curve(schedule, points)
    times = [t for t, _ in drawn]
    assert times[0] == 1
    assert times[-1] == schedule.total_steps or points == 1
    assert times == sorted(set(times))
    assert all(value == schedule.at(t) for t, value in drawn)


def test_in_words():
    words = describe(build_schedule("wsd", Sizes(1000, 10, floor=0.1, decay=200)), 3e-4)
    assert words == "warmup 10 steps to 0.0003, constant 790 steps to 0.0003, decay 200 steps to 3e-05"


@pytest.mark.parametrize(
    "schedule",
    [
        build_schedule("inverse_sqrt", Sizes(1000, 100, floor=0.1)),
        build_schedule("neox_cosine", Sizes(1000, 300)),
        build_schedule("cosine", Sizes(1000, 100, floor=0.1)),
    ],
    ids=["inverse_sqrt", "neox_cosine", "cosine"],
)
def test_words_end_with_the_rate_of_the_last_update(schedule):
    assert describe(schedule, 3e-4).endswith(f"steps to {3e-4 * schedule.at(schedule.total_steps):.3g}")
