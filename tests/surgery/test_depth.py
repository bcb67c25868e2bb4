"""Which layers are chosen: strategies, lists, scores, growth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.core.errors import UsageError
from scionlm.surgery.depth import STRATEGIES, parse_keep, plan_depth

IN_ORDER = ("first", "last", "middle", "first_last", "random", "spaced")


@pytest.mark.parametrize("layers", [0, -1, 6, 31])
def test_a_number_of_layers_out_of_range_is_refused(layers):
    with pytest.raises(UsageError, match="5 layers"):
        plan_depth(5, layers)


@pytest.mark.parametrize("keep", [[5], [-1], [0, 0], []])
def test_impossible_lists_are_refused(keep):
    with pytest.raises(UsageError, match="keep"):
        plan_depth(5, keep=keep)


@pytest.mark.parametrize("keep", ["", "a", "3-1", "1,,2", "0-", "-1", "1;2", "0-4:0", "1:2", "0-99999999999"])
def test_keep_that_is_not_a_list_of_layers_is_refused(keep):
    with pytest.raises(UsageError, match=f"keep {keep!r}: .* is neither a number nor a range"):
        parse_keep(keep)


def test_keep_reads_ranges_steps_and_single_layers_in_order():
    assert parse_keep("0-3, 12,7-8") == [0, 1, 2, 3, 12, 7, 8]
    assert parse_keep("0-9:3") == [0, 3, 6, 9]


def test_strategies_need_a_number_and_a_known_name():
    with pytest.raises(UsageError, match="first_last"):
        plan_depth(30, 8, strategy="first_lats")
    with pytest.raises(UsageError, match="leave layers, strategy"):
        plan_depth(30, keep=[1], strategy="first")
    with pytest.raises(UsageError, match=r"how many layers to keep \(layers\) or which \(keep\)"):
        plan_depth(30)


@pytest.mark.parametrize(
    ("strategy", "layers", "keep"),
    [
        ("first", 3, (0, 1, 2)),
        ("last", 3, (5, 6, 7)),
        ("middle", 4, (2, 3, 4, 5)),
        ("every:2", None, (0, 2, 4, 6)),
        ("every:3", 2, (0, 3)),
        ("every", 4, (0, 2, 4, 6)),
        ("spaced", 3, (0, 4, 7)),
        ("first_last", 4, (0, 1, 6, 7)),
        ("first_last:1", 4, (0, 1, 2, 7)),
        ("stack", 11, (*range(8), 0, 1, 2)),
        ("hybrid_stack", 6, (0, 1, 2, 0, 1, 2)),
    ],
)
def test_each_strategy_chooses_what_it_says(strategy, layers, keep):
    assert plan_depth(8, layers, strategy=strategy).keep == keep


def test_first_last_of_fifteen_is_twelve_and_three():
    assert plan_depth(30, 15, strategy="first_last").keep == (*range(12), 27, 28, 29)


@given(st.integers(1, 80), st.data(), st.sampled_from(IN_ORDER))
@settings(max_examples=300)
def test_every_subset_strategy_keeps_that_many_different_layers_in_order(total, data, strategy):
    assert set(IN_ORDER) | {"every", "stack", "hybrid_stack"} == set(STRATEGIES)
    layers = data.draw(st.integers(1, total))
    keep = plan_depth(total, layers, strategy=strategy).keep
    assert len(keep) == layers
    assert list(keep) == sorted(set(keep))
    assert 0 <= keep[0] <= keep[-1] < total


def test_scores_keep_the_best_layers_in_their_order_and_ties_go_to_the_first():
    assert plan_depth(5, 2, scores=[0.1, 0.9, 0.5, 0.5, 0.2]).keep == (1, 2)
    for wrong in ([0.1] * 4, [0.1, float("nan"), 0, 0, 0]):
        with pytest.raises(UsageError):
            plan_depth(5, 2, scores=wrong)


def test_layers_drawn_at_random_are_the_same_again_and_others_with_another_seed():
    first, again, other = (plan_depth(30, 15, strategy=rule).keep for rule in ("random", "random:0", "random:1"))
    assert first == again != other
