"""The growth controller: which rounds follow, when it stops, and that it always does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scionlm.recipes.controller import Rule, Shown, best_round, next_move


def play(rule, differences, width=0.01):
    """Follow the rule with rounds that show these differences; return the layers of each, and the last move."""
    rounds = []
    while (move := next_move(rule, rounds)).layers is not None:
        difference = differences[min(len(rounds), len(differences) - 1)]
        rounds.append(Shown(move.layers, rule.round_tokens, difference, difference + width))
    return rounds, move


def test_the_rounds_of_the_paper():
    """GPT-2 medium on OpenWebText: 12, 14, 16 of 24 layers end at 2.87, 2.84, 2.81, the reference at 2.81."""
    rule = Rule(first=12, by=2, most=24, round_tokens=1)
    rounds, move = play(rule, [2.87 - 2.81, 2.84 - 2.81, 2.81 - 2.81])
    assert [one.layers for one in rounds] == [12, 14, 16]
    assert move.matched
    raw = [2.8704 - 2.8187, 2.8496 - 2.8187, 2.8108 - 2.8187]  # the last losses of the published logs
    assert [one.layers for one in play(rule, raw)[0]] == [12, 14, 16]


def test_it_stops_at_once_where_the_first_round_matches():
    rounds, move = play(Rule(first=12, by=2, most=24, round_tokens=1), [-0.1])
    assert [one.layers for one in rounds] == [12]
    assert move.matched


def test_what_cannot_be_matched_ends_with_a_reason():
    rounds, move = play(Rule(first=3, by=2, most=6, round_tokens=1), [0.5])
    assert [one.layers for one in rounds] == [3, 5, 6]
    assert not move.matched
    assert move.why == "the reference is not matched: all 6 layers are in use"


@pytest.mark.parametrize(
    ("limits", "layers", "why"),
    [
        ({"most_rounds": 2}, [2, 3], "2 rounds were allowed"),
        ({"most_tokens": 250}, [2, 3], "another round would go beyond 250 tokens"),
        ({"most_tokens": 300}, [2, 3, 4], "another round would go beyond 300 tokens"),
        ({"most_tokens": 99}, [], "another round would go beyond 99 tokens"),
    ],
)
def test_limits_of_rounds_and_tokens(limits, layers, why):
    rounds, move = play(Rule(first=2, by=1, most=9, round_tokens=100, **limits), [1.0])
    assert [one.layers for one in rounds] == layers
    assert move.why.endswith(why)


def test_tolerance_and_the_upper_end():
    assert play(Rule(2, 1, 4, 1, tolerance=0.05), [0.05])[1].matched
    assert not play(Rule(2, 1, 4, 1, tolerance=0.04), [0.05])[1].matched
    sure = Rule(2, 1, 4, 1, criterion="upper")
    assert not play(sure, [-0.005], width=0.01)[1].matched
    assert play(sure, [-0.02], width=0.01)[1].matched
    assert not sure.matches(Shown(2, 1, -1.0, None))  # one window: nothing is known of the spread


def test_to_the_end_whatever_is_shown():
    rule = Rule(first=2, by=2, most=4, round_tokens=1, until="end")
    rounds, _ = play(rule, [-1.0, 1.0])
    assert [one.layers for one in rounds] == [2, 4]
    assert best_round(rule, rounds) == 1


def test_the_result_is_the_match_or_else_the_lowest_loss():
    rule = Rule(first=2, by=1, most=9, round_tokens=1)
    rounds, _ = play(Rule(2, 1, 4, 1), [0.3, 0.1, 0.2])
    assert best_round(rule, rounds) == 1
    assert best_round(rule, [*rounds, Shown(5, 1, -0.001, 0.0)]) == 3


@given(
    first=st.integers(1, 30),
    by=st.integers(1, 7),
    more=st.integers(0, 40),
    differences=st.lists(st.floats(-1, 1), min_size=1, max_size=50),
    rounds=st.none() | st.integers(1, 5),
    tokens=st.none() | st.integers(1, 60),
    tolerance=st.floats(0, 0.5),
    until=st.sampled_from(["matched", "end"]),
)
def test_it_never_goes_beyond_its_limits_and_always_ends(
    first, by, more, differences, rounds, tokens, tolerance, until
):
    rule = Rule(first, by, first + more, 10, rounds, tokens, until, tolerance)
    made, move = play(rule, differences)
    layers = [one.layers for one in made]
    assert layers == sorted(set(layers))
    assert all(first <= n <= first + more for n in layers)
    assert len(made) <= -(-more // by) + 1
    assert rounds is None or len(made) <= rounds
    assert tokens is None or len(made) * 10 <= tokens
    assert move.matched == (bool(made) and made[-1].difference <= tolerance)
    if until == "matched":
        assert all(one.difference > tolerance for one in made[:-1])
