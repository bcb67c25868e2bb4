"""The learning rate as a pure function of the step.

The multiplier of the peak rises in a straight line over the warm-up, reaches one at its end, and then follows the named
curve down to `min_lr_ratio` at the last step. The first update has multiplier 1 / warm-up rather than zero: an update
with a rate of zero would be a step of the budget spent on nothing.
"""

import math
from dataclasses import dataclass
from typing import Literal

Name = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A schedule with its boundaries as integers.

    Attributes:
        name: Shape of the decay.
        total_steps: Updates in the run.
        warmup_steps: Updates of warm-up.
        min_lr_ratio: Multiplier at the end.
    """

    name: Name
    total_steps: int
    warmup_steps: int
    min_lr_ratio: float

    def __call__(self, step: int) -> float:
        """Return the multiplier of update `step`, counted from 0.

        Example:
            >>> linear = Schedule("linear", total_steps=11, warmup_steps=1, min_lr_ratio=0.0)
            >>> [linear(0), linear(5), linear(10)]
            [1.0, 0.5, 0.0]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        # The peak stands at the last update of the warm-up, the floor at the last update of all.
        first = max(self.warmup_steps - 1, 0)
        progress = min((step - first) / max(self.total_steps - 1 - first, 1), 1.0)
        curve = 1.0 - progress if self.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * curve
