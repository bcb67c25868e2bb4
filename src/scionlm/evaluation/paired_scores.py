"""Two models on the same items of a task: how far apart they are, and how sure that is. Without torch."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.evaluation.task_record import item_scores


@dataclass(frozen=True)
class ScoreDifference:
    """Score of one model on a task less that of another.

    Attributes:
        difference: Of the means over items.
        stderr: Its standard error, over items; None where there is one item only.
        low: Lower end of the normal confidence interval; None likewise.
        high: Upper end.
        num_items: Items that were compared.
        num_better: Items on which the first scores higher.
        num_worse: Items on which it scores lower.
    """

    difference: float
    stderr: float | None
    low: float | None
    high: float | None
    num_items: int
    num_better: int
    num_worse: int


def paired_scores(mine: Record, theirs: Record, confidence: float = 0.95) -> ScoreDifference:
    """Return how far one model's scores on a task are from another's, item by item.

    The interval is the normal one of a mean of differences; of right and wrong that is McNemar's.

    Args:
        mine: `items[TASK]` of one evaluation: metric, scores and hash.
        theirs: The same of the other model.
        confidence: Of the interval, between 0 and 1.

    Raises:
        UsageError: They are of other items or another metric.
    """
    if any(mine[key] != theirs[key] for key in ("metric", "sha256")) or len(mine["scores"]) != len(theirs["scores"]):
        raise UsageError(
            "the scores are of other items: evaluate both models with the same tasks, data, seed and limit"
        )
    gaps = [a - b for a, b in zip(item_scores(mine), item_scores(theirs), strict=True)]
    count = len(gaps)
    if not count:
        raise UsageError("there are no items to compare")
    mean = math.fsum(gaps) / count
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    if count == 1:
        return ScoreDifference(mean, None, None, None, 1, better, worse)
    stderr = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (count - 1) / count)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * stderr
    return ScoreDifference(mean, stderr, mean - half, mean + half, count, better, worse)
