"""Which keys of a recipe hold lengths that become steps, and which of them are still times."""

from typing import Any

from scionlm.core.config import Mapping
from scionlm.core.duration import Duration

# Lengths that are a number of steps in the end, by section.
_LENGTHS = {
    "schedule": ("warmup", "decay", "half_life", "cooldown"),
    "evaluate": ("every",),
    "reweight": ("every",),
    "average": ("start", "every"),
    "checkpoint": ("keep_every",),
    "ramp": ("over",),
}


def has_times(config: Mapping) -> bool:
    """Return whether some length of a recipe, as plain values, still has to be turned into steps."""
    return any(timed_keys(part) for part in (config, *(config.get("stages") or [])))


def timed_keys(config: Mapping) -> list[tuple[dict[str, Any], str]]:
    """Return each section that holds a time, and the key that it is to be resolved into."""
    sections = {name: config.get(name) or {} for name in ("train", *_LENGTHS)}
    sections["ramp"] = (config.get("data") or {}).get("ramp") or {}
    found = [
        (sections[name], key) for name, keys in _LENGTHS.items() for key in keys if is_time(sections[name].get(key))
    ]
    train = sections["train"]
    if train.get("time") is not None and train.get("steps") is None:
        found.append((train, "steps"))
    return found


def is_time(value: Any) -> bool:
    """Return whether a value is a wall-clock duration."""
    try:
        return isinstance(value, str) and Duration.parse(value).unit == "seconds"
    except ValueError:
        return False
