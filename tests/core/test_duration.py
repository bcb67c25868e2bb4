"""Durations and counts as a recipe writes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.duration import Duration, parse_count

quick = settings(max_examples=200)


@pytest.mark.parametrize(
    ("value", "amount", "unit"),
    [
        (200, 200, "steps"),
        (0, 0, "steps"),
        (3.0, 3, "steps"),
        (0.1, 0.1, "fraction"),
        (0.0, 0.0, "fraction"),
        ("200 steps", 200, "steps"),
        ("1 step", 1, "steps"),
        ("1.5k steps", 1500, "steps"),
        ("50M tokens", 50_000_000, "tokens"),
        ("50M  Tokens", 50_000_000, "tokens"),
        ("20_000_000 tokens", 20_000_000, "tokens"),
        ("2B tokens", 2_000_000_000, "tokens"),
        ("2G tokens", 2_000_000_000, "tokens"),
        ("1T tokens", 10**12, "tokens"),
        ("10 min", 600, "seconds"),
        ("10min", 600, "seconds"),
        ("10 minutes", 600, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("2 hours", 7200, "seconds"),
        ("30 s", 30, "seconds"),
        ("30 sec", 30, "seconds"),
        (" 45 seconds ", 45, "seconds"),
    ],
)
def test_every_known_form_is_read(value, amount, unit):
    assert Duration.parse(value) == Duration(amount, unit)


@pytest.mark.parametrize(
    "value",
    [
        "200",
        "0.1",
        "",
        "tokens",
        "min",
        "ten min",
        "10 parsecs",
        "10 m",
        "5% tokens",
        "-3 steps",
        "1.5 tokens",
        "1.5 steps",
        "1.2.3 min",
        -1,
        -0.5,
        1.0,
        1.5,
        float("nan"),
        float("inf"),
    ],
)
def test_every_other_form_is_refused(value):
    with pytest.raises(ValueError, match=r"not a|neither|negative|at least 0|one step or the whole run"):
        Duration.parse(value)


@pytest.mark.parametrize("value", ["-5 min", "nan min", "inf h", "infinity s"])
def test_a_wall_clock_duration_is_finite_and_not_negative(value):
    with pytest.raises(ValueError, match="duration"):
        Duration.parse(value)


def test_a_truth_value_is_no_duration():
    with pytest.raises(ValueError, match="duration"):
        Duration.parse(True)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(7, "steps"), 7),
        (Duration(0.1, "fraction"), 100),
        (Duration(0.0, "fraction"), 0),
        (Duration(0.0126, "fraction"), 13),
        (Duration(131072, "tokens"), 1),
        (Duration(20_000_000, "tokens"), 153),
        (Duration(200_000, "tokens"), 2),
    ],
)
def test_steps_are_rounded_to_the_nearest(duration, steps):
    assert duration.in_steps(1000, 131072) == steps


def test_a_wall_clock_duration_has_no_steps():
    with pytest.raises(ValueError, match="wall-clock"):
        Duration.parse("10 min").in_steps(1000, 1)


@quick
@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_fraction_of_a_run_lies_inside_the_run(total, fraction):
    assert 0 <= Duration.parse(fraction).in_steps(total, 1) <= total


@pytest.mark.parametrize(
    ("text", "value"),
    [("20M", 20_000_000), ("1_000", 1000), ("0", 0), (5, 5), (" 2.5k ", 2500), ("1.5B", 1_500_000_000)],
)
def test_counts_are_read(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "M", "1.5", "-1", "1e6", "20 Mio", "0x10", "2.0005k", -1])
def test_counts_that_are_not_whole_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"count|whole|negative"):
        parse_count(text)


@quick
@given(st.integers(0, 10**18))
def test_a_whole_number_keeps_every_digit(number):
    assert parse_count(str(number)) == number


@quick
@given(st.integers(0, 10**6), st.sampled_from([("k", 10**3), ("M", 10**6), ("B", 10**9)]))
def test_three_decimals_before_a_suffix_are_exact(thousandths, suffix):
    letter, scale = suffix
    assert parse_count(f"{thousandths // 1000}.{thousandths % 1000:03d}{letter}") == thousandths * scale // 1000
