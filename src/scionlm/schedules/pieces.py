"""Stretches of a learning-rate schedule: a multiplier of the peak that goes from one value to another.

A schedule is a chain of such pieces with whole numbers of updates, so that it can be written down, compared and
continued. Time t counts finished updates: update number t, the first being 1, is made with the multiplier at t. The
first update of a warm-up over w is made with 1/w, not with zero, which would spend a step of the budget on nothing.

`cosine`       end + (start - end) / 2 * (1 + cos(pi u))
`linear`       start + (end - start) u
`one_minus_sqrt`  end + (start - end) (1 - sqrt(u)); Haegele et al., arXiv:2405.18392
`exponential`  start * (end / start)**u
`half_life`    start * 0.5**(n / scale); Hu et al. (MiniCPM), arXiv:2404.06395
`inverse_sqrt`  start + (end - start) h(u) / h(1), h(u) = 1 / sqrt(1 + scale u) - 1; Ibrahim et al., arXiv:2403.08763
`decaying_sqrt`  start / sqrt(1 + n / scale), not below end: has no last update that it is made for
`neox_cosine`  max(end, (1 + cos(pi n / whole)) / 2), standing still for the last updates; see `build.neox_cosine`

where u = n / steps and n counts the updates of the piece.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Shape = Literal[
    "constant",
    "linear",
    "cosine",
    "one_minus_sqrt",
    "exponential",
    "half_life",
    "inverse_sqrt",
    "decaying_sqrt",
    "neox_cosine",
]


@dataclass(frozen=True)
class Piece:
    """One stretch.

    Attributes:
        name: What it is for: warmup, cooldown, constant or decay.
        shape: The curve.
        steps: How many updates it lasts.
        start: Multiplier at its beginning.
        end: Multiplier at its end.
        scale: The curve's own constant, where it has one: updates in a half-life, a time scale.
    """

    name: str
    shape: Shape
    steps: int
    start: float
    end: float
    scale: float = 0.0

    def at(self, n: int) -> float:
        """Return the multiplier after `n` of its updates."""
        if n <= 0:
            return self.start
        if n >= self.steps and self.shape not in _OPEN:
            return self.end  # to the last bit, whatever the formula rounds to
        return self._curve(n, n / self.steps)

    def _curve(self, n: int, u: float) -> float:
        match self.shape:
            case "linear":
                return self.start + (self.end - self.start) * u
            case "exponential":
                return self.start * (self.end / self.start) ** u
            case "half_life":
                return self.start * 0.5 ** (n / self.scale)
            case "decaying_sqrt":
                return max(self.end, self.start / math.sqrt(1 + n / self.scale))
            case "neox_cosine":
                moving, whole = min(n, self.steps - int(self.scale)), self.steps + self.scale
                return max(self.end, self.start * 0.5 * (1 + math.cos(math.pi * moving / whole)))
            case _:
                return self.end - (self.end - self.start) * _REMAINING[self.shape](u, self.scale)


def _h(x: float) -> float:
    """1 / sqrt(1 + x) - 1, without losing its digits for small x."""
    return math.expm1(-0.5 * math.log1p(x))


_OPEN = ("half_life", "decaying_sqrt", "neox_cosine")  # curves that need not arrive at their end
# Which share of the way from start to end is still to go, of the part u of the updates and the curve's constant.
_REMAINING: dict[str, Callable[[float, float], float]] = {
    "constant": lambda u, _: 1.0,
    "cosine": lambda u, _: 0.5 * (1 + math.cos(math.pi * u)),
    "one_minus_sqrt": lambda u, _: 1 - math.sqrt(u),
    "inverse_sqrt": lambda u, scale: 1 - _h(scale * u) / _h(scale),
}


@dataclass(frozen=True)
class Schedule:
    """A chain of pieces, or a stretch of one; after the last update it stays where it is.

    Attributes:
        pieces: In order.
        first: Updates of the pieces that are over before this stretch begins.
        stride: Updates of the pieces that one of this stretch stands for: its batches are that much larger.
        steps: Updates of the stretch; None goes on to the end of the pieces.
    """

    pieces: tuple[Piece, ...]
    first: int = 0
    stride: int = 1
    steps: int | None = None

    def __call__(self, step: int) -> float:
        """Return the multiplier for the update that follows `step` finished ones.

        Example:
            >>> rise, fall = Piece("warmup", "linear", 1, 0.0, 1.0), Piece("decay", "linear", 10, 1.0, 0.0)
            >>> schedule = Schedule((rise, fall))
            >>> [schedule(0), schedule(5), schedule(10)]
            [1.0, 0.5, 0.0]
        """
        return self.at(step + 1)

    def at(self, t: int) -> float:
        """Return the multiplier at time `t`, that is for update number `t`."""
        piece, n = self._find(t)
        return piece.at(n)

    def phase(self, t: int) -> str:
        """Return the name of the piece that update number `t` falls into."""
        return self._find(t)[0].name

    def stretch(self, first: int, steps: int, stride: int = 1) -> "Schedule":
        """Return what `steps` updates are made with after `first` of this schedule's, each of which is `stride` of its.

        Example:
            >>> whole = Schedule((Piece("decay", "linear", 10, 1.0, 0.0),))
            >>> part = whole.stretch(4, 3, stride=2)
            >>> [part.at(t) == whole.at(4 + 2 * t) for t in range(4)]
            [True, True, True, True]
        """
        return Schedule(self.pieces, first, stride, steps)

    def _find(self, t: int) -> tuple[Piece, int]:
        t = self.first + self.stride * (t if self.steps is None else min(t, self.steps))
        for piece in self.pieces[:-1]:
            if t <= piece.steps:
                return piece, t
            t -= piece.steps
        return self.pieces[-1], min(t, self.pieces[-1].steps)

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        return sum(piece.steps for piece in self.pieces) if self.steps is None else self.steps

    def to_list(self) -> list[dict[str, Any]]:
        """Return the pieces as plain values, and of a stretch where it lies: the schedule's identity."""
        where = {"first": self.first, "stride": self.stride, "steps": self.steps}
        return [asdict(piece) for piece in self.pieces] + ([] if self.steps is None else [where])
