"""Types of values that several sections of a recipe have."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from scionlm.core.duration import Duration, parse_count


def _parsed(value: Any) -> Duration:
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value} is not a duration such as 200, 0.1, '50M tokens' or '10 min'")
    return Duration.parse(value)


def _duration(value: Any) -> Any:
    _parsed(value)
    return value


Count = Annotated[
    int, BeforeValidator(lambda value: parse_count(value) if isinstance(value, str) else value), Field(gt=0)
]
"""A positive whole number, also written as `20M`."""
Length = Annotated[int | float | str, BeforeValidator(_duration)]
"""A duration: steps, a fraction of the run, `50M tokens`, `10 min`."""


def _time(value: Any) -> Any:
    if _parsed(value).unit != "seconds":
        raise ValueError("not a time such as 30 min or 6 hours")
    return value


Steps = Length
"""A duration that becomes a number of steps when the run begins; a time by the speed that is measured then."""
Time = Annotated[str, BeforeValidator(_time)]
"""A time: `30 min`, `6 hours`."""
Beta = Annotated[float, Field(ge=0, lt=1)]
