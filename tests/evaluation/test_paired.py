"""The paired difference of two losses: its arithmetic, its interval, and what it refuses."""

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest

from factories import tiny_model
from scionlm.core.errors import UsageError
from scionlm.evaluation.loss import DomainLoss, domain_losses, model_token_nll
from scionlm.evaluation.paired import paired_difference
from scionlm.evaluation.paired_scores import paired_scores
from scionlm.evaluation.task_record import item_record


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


def items(scores, sha256="a", metric="acc"):
    return item_record(metric, scores, sha256)


def test_the_difference_of_scores_and_its_interval_by_hand():
    found = paired_scores(items([1, 1, 1, 0, 0, 1]), items([1, 0, 0, 0, 1, 0]), 0.9)
    gaps = [0, 1, 1, 0, -1, 1]
    stderr = stdev(gaps) / math.sqrt(6)
    half = NormalDist().inv_cdf(0.95) * stderr
    assert found.difference == pytest.approx(1 / 3)
    assert found.stderr == pytest.approx(stderr)
    assert (found.low, found.high) == (pytest.approx(1 / 3 - half), pytest.approx(1 / 3 + half))
    assert (found.num_items, found.num_better, found.num_worse) == (6, 3, 1)


def test_pairing_is_surer_than_two_scores_on_their_own():
    hard = [0, 0, 1, 1, 1, 0, 1, 0, 1, 1] * 10  # both find the same items hard
    better = [1, *hard[1:]]
    found = paired_scores(items(better), items(hard))
    alone = math.sqrt(2) * stdev(hard) / math.sqrt(len(hard))
    assert found.stderr < alone / 4


def test_scores_that_are_no_right_or_wrong_survive_the_record():
    mine, theirs = items([0.25, 1.5], metric="nll"), items([0.5, 1.0], metric="nll")
    assert paired_scores(mine, theirs).difference == pytest.approx(0.125)
    assert paired_scores(items([1]), items([0])).stderr is None


@pytest.mark.parametrize("other", [items([1, 0], "b"), items([1, 0], metric="acc_norm"), items([1, 0, 1])])
def test_scores_on_other_items_are_not_compared(other):
    with pytest.raises(UsageError, match="other items"):
        paired_scores(items([1, 0]), other)
