"""Two models on the same held-out windows: how far apart they are, and how sure that is.

What both find hard cancels out when each window of the one is set against the same window of the other, so that far
fewer tokens decide than two losses on their own would need.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.evaluation.loss import DomainLoss


@dataclass(frozen=True)
class Difference:
    """Loss of one model less that of another, nats; the mean over domains, each of which counts the same.

    Attributes:
        mean: The difference.
        low: Lower end of its confidence interval; None where a domain has one window only.
        high: Upper end.
        confidence: Of the interval.
        num_sequences: Windows that were compared.
        domains: The difference in each domain.
    """

    mean: float
    low: float | None
    high: float | None
    confidence: float
    num_sequences: int
    domains: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def paired_difference(
    mine: Mapping[str, DomainLoss], theirs: Mapping[str, DomainLoss], confidence: float = 0.95
) -> Difference:
    """Return how far one model's losses are from another's, window by window.

    The interval is the normal one of a mean over domains whose windows are drawn independently. Windows of one long
    document are alike, so it is a little too narrow where documents are many windows long.

    Args:
        mine: Loss by domain, of the same windows as `theirs`.
        theirs: The other model's.
        confidence: Of the interval, between 0 and 1.

    Raises:
        UsageError: They are of other domains or windows.
    """
    variance, domains, count = 0.0, dict[str, float](), 0
    if mine.keys() != theirs.keys() or not mine:
        raise UsageError(f"losses of {', '.join(mine)} cannot be compared with losses of {', '.join(theirs)}")
    for name, own in mine.items():
        other = theirs[name]
        if (own.num_tokens, own.seq_len, len(own.windows)) != (other.num_tokens, other.seq_len, len(other.windows)):
            raise UsageError(f"the losses on {name!r} are of other windows: measure both in the same way")
        sums = [a - b for a, b in zip(own.windows, other.windows, strict=True)]
        mean = domains[name] = math.fsum(sums) / own.num_tokens
        n = len(sums)
        count += n
        if n == 1:
            variance = math.inf  # one window says nothing about how windows differ
            continue
        lengths = [own.seq_len] * (n - 1) + [own.num_tokens - own.seq_len * (n - 1)]
        # The ratio estimator's residuals: the last window may be short, and counts for its tokens only.
        squares = math.fsum((value - mean * length) ** 2 for value, length in zip(sums, lengths, strict=True))
        variance += n / (n - 1) * squares / own.num_tokens**2
    mean = math.fsum(domains.values()) / len(domains)
    if math.isinf(variance):
        return Difference(mean, None, None, confidence, count, domains)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance) / len(domains)
    return Difference(mean, mean - half, mean + half, confidence, count, domains)
