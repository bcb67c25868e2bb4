"""Watches over the updates: what is not finite is not applied, and what leaps is reported."""

import math
from collections import deque

from scionlm.core.errors import DivergenceError
from scionlm.core.log import warn
from scionlm.core.records import Record

_WINDOW, _ENOUGH = 128, 32
_SIGMAS = 6.0

HOW_TO_CALM = "lower optimizer.lr or raise schedule.warmup"


class Guard:
    """Counts updates that were left out, and finds losses that stand out from the last ones.

    Args:
        limit: Updates in a row that may be left out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self.skipped = 0
        self.spikes = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    @property
    def is_calm(self) -> bool:
        """Whether the last update was applied: else the weights may be broken, and should not replace good ones."""
        return self._in_a_row == 0

    def left_out(self, step: int, nll: float, grad_norm: float, samples: str) -> None:
        """Note that an update was not applied.

        Raises:
            DivergenceError: That was one too many in a row.
        """
        self._in_a_row += 1
        self.skipped += 1
        what = f"loss {nll}, gradient norm {grad_norm}: not finite at step {step} (samples {samples})"
        if self._in_a_row > self._limit:
            row = f", {self._in_a_row} updates in a row" if self._in_a_row > 1 else ""
            raise DivergenceError(f"{what}{row}; {HOW_TO_CALM}")
        warn(f"{what}; the update was left out, {self._limit - self._in_a_row} more may be")

    def applied(self, step: int, nll: float, samples: str) -> float | None:
        """Note the loss of an update; return by how many standard deviations it stands out, where that is many."""
        self._in_a_row = 0
        height, kept = None, nll
        if len(self._losses) >= _ENOUGH:
            mean = sum(self._losses) / len(self._losses)
            deviation = math.sqrt(sum((loss - mean) ** 2 for loss in self._losses) / len(self._losses))
            if nll > mean + _SIGMAS * deviation and deviation > 0:
                height = (nll - mean) / deviation
                kept = mean + _SIGMAS * deviation  # one spike must not hide the next
                self.spikes += 1
                warn(f"loss {nll:.3f} at step {step} is {height:.0f} standard deviations above the last {_WINDOW} "
                     f"(samples {samples})")  # fmt: skip
        self._losses.append(kept)
        return height

    def state(self) -> Record:
        """Return what is needed to go on."""
        counts = {"in_a_row": self._in_a_row, "skipped": self.skipped, "spikes": self.spikes}
        return counts | {"losses": list(self._losses)}

    def restore(self, state: Record) -> None:
        """Go on from a state."""
        self._in_a_row, self.skipped, self.spikes = state["in_a_row"], state["skipped"], state["spikes"]
        self._losses = deque(state["losses"], maxlen=_WINDOW)
