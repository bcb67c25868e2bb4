"""The paired difference of two losses: its arithmetic, its interval, and what it refuses."""

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest

from factories import tiny_model
from scionlm.core.errors import UsageError
from scionlm.evaluation.loss import DomainLoss, domain_losses, model_token_nll
from scionlm.evaluation.paired import paired_difference


def loss(windows, seq_len=4, tokens=None):
    return DomainLoss(math.fsum(windows), tokens or seq_len * len(windows), 100, tuple(windows), seq_len)


def test_the_difference_and_its_interval_by_hand():
    mine, theirs = loss([8.0, 10.0, 9.0, 13.0]), loss([7.0, 8.0, 8.0, 9.0])
    found = paired_difference({"a": mine}, {"a": theirs}, 0.9)
    by_window = [d / 4 for d in (1.0, 2.0, 1.0, 4.0)]
    half = NormalDist().inv_cdf(0.95) * stdev(by_window) / math.sqrt(4)
    assert found.mean == pytest.approx(fmean(by_window)) == pytest.approx(0.5)
    assert (found.low, found.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert (found.num_sequences, found.confidence) == (4, 0.9)


def test_domains_count_the_same_whatever_their_size():
    mine = {"a": loss([4.0, 4.0]), "b": loss([8.0] * 20)}
    theirs = {"a": loss([0.0, 0.0]), "b": loss([8.0] * 20)}
    found = paired_difference(mine, theirs)
    assert found.domains == {"a": 1.0, "b": 0.0}
    assert found.mean == 0.5
    assert found.low == found.high == 0.5  # windows do not differ among themselves


def test_a_short_last_window_counts_for_its_tokens():
    mine, theirs = loss([5.0, 5.0, 2.5], tokens=10), loss([1.0, 1.0, 0.5], tokens=10)
    found = paired_difference({"a": mine}, {"a": theirs})
    assert found.mean == pytest.approx(1.0)
    assert found.low == pytest.approx(1.0)  # each token is one nat worse: nothing varies


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        draw = {n: loss([4 * rng.gauss(0.1, 0.5) for _ in range(60)]) for n in ("a", "b")}
        none = {n: loss([0.0] * 60) for n in ("a", "b")}
        found = paired_difference(draw, none, 0.9)
        covered += found.low <= 0.1 <= found.high
    assert 0.86 <= covered / 400 <= 0.94


def test_one_window_says_nothing_about_the_spread():
    found = paired_difference({"a": loss([4.0])}, {"a": loss([3.0])})
    assert (found.mean, found.low, found.high) == (0.25, None, None)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"a": loss([1.0, 2.0])}, {"b": loss([1.0, 2.0])}),
        ({"a": loss([1.0, 2.0])}, {"a": loss([1.0, 2.0, 3.0])}),
        ({"a": loss([1.0, 2.0], seq_len=4)}, {"a": loss([1.0, 2.0], seq_len=8, tokens=8)}),
        ({}, {}),
    ],
)
def test_what_was_measured_otherwise_is_refused(mine, theirs):
    with pytest.raises(UsageError):
        paired_difference(mine, theirs)


def test_windows_of_a_real_model_add_up(data_folder):
    found = domain_losses(model_token_nll(tiny_model()), data_folder, ["alpha"], 16, 100)["alpha"]
    assert len(found.windows) == math.ceil(found.num_tokens / 16)
    assert math.fsum(found.windows) == found.nll_sum
    first = domain_losses(model_token_nll(tiny_model()), data_folder, ["alpha"], 16, 16)["alpha"]
    assert found.windows[0] == pytest.approx(first.nll_sum, rel=1e-6)
