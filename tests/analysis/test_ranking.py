"""What criteria keep and how far they agree: against brute force and Spearman's definition."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scionlm.analysis.ranking import (
    CRITERIA,
    best_layers,
    closest_block,
    layers_before_lazy_group,
    potent_prefix,
    rank_correlation,
    suggest,
)
from scionlm.analysis.summary import layer_scores

FEW = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 1e9])  # so that many are equal
LAW = settings(max_examples=80)


def spearman(x, y):
    """Pearson's correlation of places, where equal ones share the mean of theirs; by counting."""

    def places(values):
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]

    a, b = places(x), places(y)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    sizes = sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b)
    return covariance / math.sqrt(sizes) if sizes else 0.0


@st.composite
def criteria(draw):
    layers = draw(st.integers(1, 9))
    rows = st.lists(st.one_of(FEW, st.floats(-1e3, 1e3)), min_size=layers, max_size=layers)
    return {name: np.array(row) for name, row in zip("abc", draw(st.lists(rows, min_size=1, max_size=3)), strict=False)}


@LAW
@given(criteria())
def test_agreement_is_spearmans(scores):
    found = rank_correlation(scores)
    rows = list(scores.values())
    assert found.shape == (len(rows), len(rows))
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            assert found[i, j] == pytest.approx(spearman(x.tolist(), y.tolist()), abs=1e-12)
    assert (found == found.T).all()
    assert (np.abs(found) <= 1 + 1e-12).all()


def test_agreement_of_known_orders():
    found = rank_correlation(
        {
            "up": np.array([1.0, 2.0, 3.0, 4.0, 5.0]),
            "far up": np.array([-9.0, 0.0, 1.0, 1e3, 1e6]),
            "down": np.array([5.0, 4.0, 3.0, 2.0, 1.0]),
            "ties": np.array([1.0, 1.0, 2.0, 2.0, 2.0]),
            "nothing": np.full(5, 7.0),
            "one pair": np.array([1.0, 2.0, 3.0, 5.0, 4.0]),
        }
    )
    assert found[0] == pytest.approx([1.0, 1.0, -1.0, 0.8660254037844387, 0.0, 0.9])
    assert not found[4].any()  # not even with itself
    assert not found[:, 4].any()


# ---- best layers ---------------------------------------------------------------------------------


@LAW
@given(st.lists(FEW, min_size=1, max_size=8), st.data())
def test_best_layers_are_those_of_brute_force(scores, data):
    number = data.draw(st.integers(0, len(scores)))
    found = best_layers(np.array(scores), number)
    assert found == sorted(set(found))
    assert len(found) == number
    # Of all choices that are worth most, the one with the earliest layers.
    best = min(
        combinations(range(len(scores)), number),
        key=lambda chosen: (sorted(-scores[index] for index in chosen), chosen),
    )
    assert tuple(found) == best


def test_ties_go_to_the_earlier_layer():
    assert best_layers(np.array([1.0, 3.0, 3.0, 1.0, 3.0]), 2) == [1, 2]
    assert best_layers(np.array([1.0, 3.0, 3.0, 1.0, 3.0]), 4) == [0, 1, 2, 4]
    assert best_layers(np.zeros(4), 2) == [0, 1]


# ---- the block that turns least ------------------------------------------------------------------


@st.composite
def distances(draw):
    layers = draw(st.integers(2, 8))
    values = draw(st.lists(FEW, min_size=(layers + 1) ** 2, max_size=(layers + 1) ** 2))
    return np.array(values).reshape(layers + 1, layers + 1)


@LAW
@given(distances(), st.data())
def test_the_closest_block_is_that_of_brute_force(angular, data):
    layers = len(angular) - 1
    number = data.draw(st.integers(1, layers - 1))
    kept = closest_block(angular, number)
    gone = sorted(set(range(layers)) - set(kept))
    assert gone == list(range(gone[0], gone[0] + number))
    assert kept == sorted(set(kept))
    smallest = min((angular[start, start + number], start) for start in range(layers + 1 - number))
    assert gone[0] == smallest[1]


def test_the_last_layers_can_be_the_closest_block():
    angular = np.ones((6, 6))
    angular[3, 5] = 0.1
    angular[5, 3] = 0.0  # which is no block
    assert closest_block(angular, 2) == [0, 1, 2]
    angular[0, 2] = 0.05
    assert closest_block(angular, 2) == [2, 3, 4]


# ---- suggestions ---------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """(scores, number, angular, greedy, tolerance)."""
    layers = draw(st.integers(1, 8))
    names = draw(st.sets(st.sampled_from(sorted(set(CRITERIA) - {"max_rank"}))))
    rows = st.lists(FEW, min_size=layers, max_size=layers).map(np.array)
    scores = {name: draw(rows) for name in CRITERIA if name in names}
    if draw(st.booleans()):
        ranks = st.lists(st.sampled_from([1.0, 1.2, 1.6, 2.0, 7.0, 30.0]), min_size=layers, max_size=layers)
        scores["max_rank"] = np.array(draw(ranks))
    angular = draw(st.lists(FEW, min_size=(layers + 1) ** 2, max_size=(layers + 1) ** 2))
    order = draw(st.permutations(range(layers)))
    greedy = None if draw(st.booleans()) else order[: draw(st.integers(0, layers - 1))]
    number = draw(st.integers(1, layers))
    return (
        scores,
        number,
        np.array(angular).reshape(layers + 1, -1),
        greedy,
        draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
    )


@LAW
@given(cases())
def test_suggestions_are_layers_that_could_be_kept(case):
    scores, number, angular, greedy, tolerance = case
    layers = len(angular) - 1
    found = {suggestion.by: suggestion for suggestion in suggest(scores, number, angular, greedy, tolerance)}
    assert len(found) == len(suggest(scores, number, angular, greedy, tolerance))
    for name, suggestion in found.items():
        assert suggestion.keep == sorted(set(suggestion.keep))
        assert suggestion.keep
        assert 0 <= suggestion.keep[0] <= suggestion.keep[-1] < layers
        if name not in ("before_lazy_group", "potent_prefix"):
            assert len(suggestion.keep) == number
        assert suggestion.why
    wanted = {"first", *scores}
    if number < layers:
        wanted.add("angular_block")
        assert found["angular_block"].keep == closest_block(angular, layers - number)
    if greedy is not None and layers - number <= len(greedy):
        wanted.add("greedy")
        assert set(found["greedy"].keep) == set(range(layers)) - set(greedy[: layers - number])
    if "max_rank" in scores:
        depth = layers_before_lazy_group(scores["max_rank"])
        if depth < layers:
            wanted.add("before_lazy_group")
            assert found["before_lazy_group"].keep == list(range(depth))
        prefix = potent_prefix(scores["max_rank"], tolerance)
        if prefix not in (0, depth, layers):
            wanted.add("potent_prefix")
            assert found["potent_prefix"].keep == list(range(prefix))
    assert set(found) == wanted
    assert found["first"].keep == list(range(number))
    for name, values in scores.items():
        assert found[name].keep == best_layers(values, number)
        assert found[name].why == CRITERIA[name]


def test_what_the_ranks_speak_for_is_said():
    ranks = {"max_rank": np.array([30.0, 1.1, 8.0, 1.2, 1.0])}
    found = {each.by: each for each in suggest(ranks, 2, np.ones((6, 6)), None, 0.5)}
    assert found["before_lazy_group"].keep == [0, 1, 2]
    assert found["before_lazy_group"].why.startswith("layers 3 to 4 are a lazy group")
    assert found["potent_prefix"].keep == [0]
    assert found["potent_prefix"].why.startswith("layer 1 is lazy")
    assert found["max_rank"].keep == [0, 2]
    potent = {"max_rank": np.array([30.0, 9.0, 8.0, 4.0, 3.0])}
    found = {each.by: each for each in suggest(potent, 2, np.ones((6, 6)), None, 0.5)}
    assert set(found) == {"first", "max_rank", "angular_block"}  # all layers are potent: nothing to suggest


def test_greedy_removal_that_went_too_short_suggests_nothing():
    for greedy, expected in (([3, 1], None), ([3, 1, 0], [2, 4]), ([3, 1, 0, 2], [2, 4]), (None, None)):
        found = {each.by: each.keep for each in suggest({}, 2, np.ones((6, 6)), greedy, 0.5)}
        assert found.get("greedy") == expected


def test_scores_are_the_criteria_that_were_measured():
    layers = [{"index": 0, "taylor": 2, "removal": 0.5}, {"index": 1, "taylor": 1, "removal": 0.25}]
    found = layer_scores(layers, list(CRITERIA))
    assert list(found) == ["removal", "taylor"]
    assert found["taylor"].tolist() == [2, 1]
