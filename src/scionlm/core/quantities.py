"""Types of values that several sections of a recipe have."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from scionlm.core.duration import Duration, parse_count


def _duration(value: Any) -> Any:
    Duration.parse(value)
    return value


Count = Annotated[
    int, BeforeValidator(lambda value: parse_count(value) if isinstance(value, str) else value), Field(gt=0)
]
"""A positive whole number, also written as `20M`."""
Length = Annotated[int | float | str, BeforeValidator(_duration)]
"""A duration: steps, a fraction of the run, `50M tokens`, `10 min`."""


def _steps(value: Any) -> Any:
    if Duration.parse(value).unit == "seconds":
        raise ValueError("a wall-clock duration cannot be turned into steps; give steps, a fraction or tokens")
    return value


Steps = Annotated[int | float | str, BeforeValidator(_steps)]
"""A duration that is a number of steps: not a wall-clock one."""
Beta = Annotated[float, Field(ge=0, lt=1)]
