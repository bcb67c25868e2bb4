"""The arithmetic under a drawing: ticks at round numbers, linear scales, labels that keep their distance."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# Beyond it a number is a fault, not something to draw; and sums of two numbers below it stay finite.
LARGEST = 1e300

# The unit of an axis, and the largest tick from which it is used: 5,000 reads better than 5k, 50k than 50,000.
_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e4))


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to the coordinates [start, end]; either may run downwards."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of `value`."""
        share = (value - self.low) / (self.high - self.low) if self.high != self.low else 0.5
        return self.start + share * (self.end - self.start)


def drawable(value: float) -> bool:
    """Return whether `value` can have a place on an axis."""
    return abs(value) <= LARGEST  # NaN is not


def nice_ticks(low: float, high: float, intervals: int = 5) -> list[float]:
    """Return increasing round numbers that cover [low, high]: about `intervals` apart, at most ten.

    An empty range is widened around its value. The steps are 1, 2 or 5 times a power of ten.

    Example:
        >>> nice_ticks(3.6, 10.9)
        [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]

    Raises:
        ValueError: An end is not finite or beyond 1e300.
    """
    if not (drawable(low) and drawable(high)):
        raise ValueError(f"no axis from {low} to {high}")
    low, high = _widened(min(low, high), max(low, high))
    # Exact fractions: in floats a tick could fall short of the range by a rounding error.
    raw = (Fraction(high) - Fraction(low)) / min(intervals, 8)
    power = Fraction(10) ** math.floor(math.log10(high / intervals - low / intervals) - 1)
    step = next(power * m for m in (1, 2, 5, 10, 20, 50, 100, 200) if power * m >= raw)
    first, last = math.floor(Fraction(low) / step), math.ceil(Fraction(high) / step)
    return [float(k * step) for k in range(first, last + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range so narrow that neighboring ticks would be the same float is made wider."""
    magnitude = max(abs(low), abs(high))
    if high - low >= max(magnitude * 1e-9, 1e-290):
        return low, high
    margin = magnitude * 0.05 if magnitude >= 1e-280 else 1.0
    return low - margin, high + margin


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the labels of an axis: one unit (k, M, B, T) and one number of decimals for all of them.

    Example:
        >>> tick_labels([0.0, 5e6, 1e7]), tick_labels([4.5, 5.0, 5.5])
        (['0', '5M', '10M'], ['4.5', '5.0', '5.5'])
    """
    largest, step = max(abs(tick) for tick in ticks), ticks[1] - ticks[0]
    if largest >= 1e16 or step < 1e-9:
        return [f"{tick:g}" for tick in ticks]
    unit, size = next((pair for pair in _UNITS if largest >= pair[1]), ("", 1.0))
    size = size / 10 if unit == "k" else size
    # A step such as 0.25 needs more decimals than its power of ten says.
    decimals = next(
        d for d in range(13) if round(step / size, d) > 0 and abs(round(step / size, d) * size / step - 1) < 1e-6
    )
    return [f"{tick / size:,.{decimals}f}{unit}" if tick else "0" for tick in ticks]


def spread(wanted: Sequence[float], gaps: Sequence[float], low: float, high: float) -> list[float]:
    """Return positions near the wanted ones, at least `gaps[k]` between the k-th and the next in their order.

    They stay in [low, high] as long as there is room for them.

    Example:
        >>> spread([10, 11, 50], [6, 6], 0, 100)
        [10, 16, 50]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    placed = [min(max(wanted[k], low), high) for k in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gaps[k - 1])
    for k in range(len(placed) - 1, -1, -1):
        ceiling = high if k == len(placed) - 1 else placed[k + 1] - gaps[k]
        placed[k] = min(placed[k], ceiling)
    result = [0.0] * len(placed)
    for position, k in zip(placed, order, strict=True):
        result[k] = position
    return result


def text_width(text: str, size: float) -> float:
    """Return roughly how wide `text` is drawn at a font size, whatever the font: too much rather than too little."""
    return sum(1.05 if unicodedata.east_asian_width(c) in "WF" else 0.57 for c in text) * size
