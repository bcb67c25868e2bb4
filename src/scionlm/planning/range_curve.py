"""What a learning-rate range test says: the loss after each step of training with a rate that rises from step to step.

Source: the range test is Smith's (arXiv:1506.01186); a tenth of the rate with the lowest loss, the steepest fall, and
a point inside the longest fall are how others, fastai first of all, read a rate off it.
Differs: the losses are those of the same few windows after each step, not of the batch that the step was made on. A
trained model moves by hundredths of a nat where the losses of two batches lie tenths apart. And the proposal is taken
from the upper edge of the valley, not from its slope: it is the peak of a schedule that comes down again, and what a
rate costs while it is high is mostly won back then.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_FIRST, _PER_DECADE, _COUNT = 1e-6, 12, 72  # up to 0.83; a recipe's rate is below 1
_WEIGHTS = (1, 2, 3, 2, 1)  # of a loss and its neighbours
_RISE, _LEAST_RISE = 0.1, 0.2  # of the fall, and in nats: what is clearly above the lowest
_AGAIN = 3  # losses in a row that have to be: one may be an accident
_EDGE, _LEAST_EDGE = 0.03, 0.05  # of the fall, and in nats: what still belongs to the valley
_BELOW = 1.5  # the edge, by which the proposal is lower
_TIE = 1e-9  # nats: what rounding may make of equal losses
_SIGMAS, _NOTHING = 4.0, 1e-3  # of the noise, and in nats: what is no fall


@dataclass(frozen=True)
class Reading:
    """What the curve of a range test says.

    Attributes:
        smoothed: Each loss averaged with its neighbours, nats; as many as there are losses.
        lr_lowest: The rate at which that is lowest; None where it never fell.
        lr_diverges: The rate from which on the losses are clearly above it; None where the test has not come so far.
        proposal: A peak learning rate, of two digits; None where the curve shows none.
        why: How it came about, in words.
    """

    smoothed: list[float]
    lr_lowest: float | None
    lr_diverges: float | None
    proposal: float | None
    why: str


def range_rates() -> list[float]:
    """Return the learning rates of a range test: from 1e-6 on, each a fifth above the one before."""
    return [_FIRST * 10 ** (number / _PER_DECADE) for number in range(_COUNT)]


def is_over(before: float, losses: Sequence[float]) -> bool:
    """Return whether a test has seen enough: the last losses are clearly above the lowest one, or one is not finite.

    Args:
        before: The loss before the first step, nats.
        losses: After each step so far, nats.
    """
    return _first_high(before, losses) is not None


def read_curve(before: float, lrs: Sequence[float], losses: Sequence[float]) -> Reading:
    """Return what a curve says; a constant added to all losses changes nothing of it.

    Args:
        before: The loss before the first step, nats.
        lrs: The rate of each step, rising.
        losses: The loss after each, nats; all finite but maybe the last.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    smoothed = _smoothed(finite)
    high = _first_high(before, losses)
    diverges = None if high is None else lrs[high]
    bottom = min(smoothed, default=0.0)
    at = next((number for number, loss in enumerate(smoothed) if loss <= bottom + _TIE), 0)
    fall = before - smoothed[at] if smoothed else 0.0
    if fall <= max(_SIGMAS * _noise(finite, smoothed), _NOTHING):
        return Reading(smoothed, None, diverges, None, _no_fall(diverges, lrs))
    lowest = lrs[at]
    if diverges is None:
        why = f"the loss was lowest at {lowest:.2g} and at the last rate, {lrs[-1]:.2g}, not clearly higher yet"
        return Reading(smoothed, lowest, None, None, why)
    limit = smoothed[at] + max(_EDGE * fall, _LEAST_EDGE)
    edge = at
    while edge + 1 < len(smoothed) and smoothed[edge + 1] <= limit:
        edge += 1
    proposal = float(f"{lrs[edge] / _BELOW:.1e}")
    why = (
        f"the loss fell by {fall:.3g} nats, to its lowest at {lowest:.2g}; it was within {limit - smoothed[at]:.2g} of "
        f"that up to {lrs[edge]:.2g}, and clearly higher from {diverges:.2g} on; the proposal is {lrs[edge]:.2g} over "
        f"{_BELOW:g}"
    )
    return Reading(smoothed, lowest, diverges, proposal, why)


def _first_high(before: float, losses: Sequence[float]) -> int | None:
    """Return the first of the last losses that are all clearly above the lowest; None before there are enough."""
    lowest = min([before, *(loss for loss in losses if math.isfinite(loss))])
    limit = lowest + max(_RISE * (before - lowest), _LEAST_RISE)
    high = 0
    while high < len(losses) and not losses[-1 - high] <= limit:  # what is no number is not below anything
        high += 1
    broken = bool(losses) and not math.isfinite(losses[-1])
    return len(losses) - high if high >= _AGAIN or broken else None


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Return each loss averaged with its neighbours on both sides, so that nothing moves to higher rates."""
    reach = len(_WEIGHTS) // 2
    found: list[float] = []
    for at in range(len(losses)):
        near = [(losses[i], w) for i, w in enumerate(_WEIGHTS, at - reach) if 0 <= i < len(losses)]
        found.append(sum(loss * weight for loss, weight in near) / sum(weight for _, weight in near))
    return found


def _noise(losses: Sequence[float], smoothed: Sequence[float]) -> float:
    """Return the standard deviation of losses about the smoothed ones: from the median, since the last ones leap."""
    return 1.4826 * statistics.median(abs(a - b) for a, b in zip(losses, smoothed, strict=True)) if losses else 0.0


def _no_fall(diverges: float | None, lrs: Sequence[float]) -> str:
    if diverges is not None and diverges <= lrs[0]:
        return f"the loss was clearly higher after the first step, at {diverges:.2g}: look at model, data and precision"
    rose = "" if diverges is None else f", and was clearly higher from {diverges:.2g} on"
    return f"the loss never fell{rose}: what this text would teach is too little to tell one rate from another by"
