"""What a person sees goes to stderr, and numbers read well."""

from types import SimpleNamespace

import pytest

from scionlm.core import log
from scionlm.core.log import Progress, format_bytes, format_count, format_seconds, say, warn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (1000, "1k"),
        (134_515_008, "134.5M"),
        (1_235_000_000, "1.235B"),
        (2e12, "2T"),
        (-5e6, "-5M"),
    ],
)
def test_counts_for_people(value, text):
    assert format_count(value) == text


def test_a_count_just_below_a_unit_is_not_a_thousand_of_the_one_below():
    assert format_count(999_999) == "1M"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0s"),
        (9.4, "9s"),
        (59.6, "1m 00s"),
        (245, "4m 05s"),
        (3599.7, "1h 00m"),
        (7620, "2h 07m"),
        (360_000, "100h 00m"),
        (863_999, "239h 59m"),
        (864_000, "10 days"),
        (175_822_743, "2,035 days"),
    ],
)
def test_times_for_people(value, text):
    assert format_seconds(value) == text


def test_messages_go_to_stderr_and_are_not_read_as_markup(capsys):
    say("[red]name[/red]")
    warn("careful")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[red]name[/red]\nwarning: careful\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on by hand."""
    now = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_away_from_a_terminal_is_a_plain_line_now_and_then_on_stderr(capsys, clock):
    with Progress("reading", 100) as progress:
        for done in range(1, 101):
            clock[0] += 0.5
            progress.update(done, "detail")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "reading: 20%  detail  40s left"
    assert lines[-1] == "reading: done in 50s"
    assert len(lines) == 6


def test_work_done_at_once_says_nothing(capsys):
    with Progress("reading", 1) as progress:
        progress.update(1)
    assert capsys.readouterr() == ("", "")


def test_progress_says_nothing_of_done_when_the_work_failed(capsys, clock):
    def work():
        with Progress("reading", 0) as progress:
            progress.update(0)
            clock[0] += 5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert "done" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (999 * 2**10, "999 KiB"), (1000 * 2**10, "0.977 MiB"),
        (1010 * 2**30, "0.986 TiB"), (3.5 * 2**30, "3.5 GiB"), (5000 * 2**40, "5e+03 TiB"),
    ],
)  # fmt: skip
def test_a_size_is_told_in_the_unit_that_three_digits_are_enough_for(num_bytes, text):
    assert format_bytes(num_bytes) == text
