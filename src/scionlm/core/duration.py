"""Durations as a recipe writes them: `200`, `0.1`, `50M tokens`, `10 min`.

An integer is steps, a number below 1 a fraction of the run, and a string carries its unit; 1.0, which could be either,
is refused. They become integers of steps once, when the run is resolved; a wall-clock duration stays in seconds.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["steps", "fraction", "tokens", "seconds"]

_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([kKMGBT]?)")
_SCALE = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_SECONDS = {"s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600}


def parse_count(text: str | int) -> int:
    """Return a whole number written as `20_000_000` or `20M` (k, M, B or G, T).

    Raises:
        ValueError: It is not a whole number of at least 0.
    """
    if isinstance(text, bool):
        raise ValueError(f"{text} is not a count")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"{text} is negative")
        return text
    match = _COUNT.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a count such as 20_000_000 or 20M")
    value = Decimal(match[1].replace("_", "")) * _SCALE[match[2]]
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


@dataclass(frozen=True)
class Duration:
    """A length of training: an amount and its unit."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, value: str | float) -> "Duration":
        """Read a duration.

        Raises:
            ValueError: It has none of the known forms.
        """
        if isinstance(value, str):
            match = re.fullmatch(r"(.*?)\s*([A-Za-z]+)", value.strip())
            word = match[2].lower() if match else ""
            singular = word.removesuffix("s") if len(word) > 1 else word
            if match and singular in ("token", "step"):
                return cls(parse_count(match[1]), "tokens" if singular == "token" else "steps")
            if match and singular in _SECONDS:
                number = float(match[1]) if re.fullmatch(r"\d+(\.\d*)?", match[1]) else math.nan
                if math.isfinite(number):
                    return cls(number * _SECONDS[singular], "seconds")
            raise ValueError(f"{value!r} is not a duration such as 200, 0.1, '50M tokens' or '10 min'")
        if isinstance(value, bool) or value < 0 or not math.isfinite(value):
            raise ValueError(f"{value} is not a duration: it must be at least 0")
        if isinstance(value, float) and value == 1.0:
            raise ValueError("1.0 could be one step or the whole run: write 1 for a step, or the steps of the run")
        if isinstance(value, int) or value >= 1:
            if value != int(value):
                raise ValueError(f"{value} is neither a whole number of steps nor a fraction below 1")
            return cls(int(value), "steps")
        return cls(value, "fraction")

    def in_steps(self, total_steps: int, tokens_per_step: int) -> int:
        """Return this duration in optimizer steps, rounded to the nearest, for a run of `total_steps`.

        Raises:
            ValueError: It is a wall-clock duration, which has no fixed number of steps.
        """
        match self.unit:
            case "steps":
                return int(self.amount)
            case "fraction":
                return round(self.amount * total_steps)
            case "tokens":
                return round(self.amount / tokens_per_step)
            case "seconds":
                raise ValueError("a wall-clock duration cannot be turned into steps")
