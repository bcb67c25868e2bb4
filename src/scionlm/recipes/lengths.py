"""Which keys of a recipe hold lengths that become steps, and which of them are still times."""

from typing import Any

from scionlm.core.config import Mapping
from scionlm.core.duration import Duration

# Lengths that are a number of steps in the end, by section.
_LENGTHS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("schedule",): ("warmup", "decay", "half_life", "cooldown"),
    ("evaluate",): ("every",),
    ("reweight",): ("every",),
    ("average",): ("start", "every"),
    ("checkpoint",): ("keep_every",),
    ("data", "ramp"): ("over",),
    ("distill",): ("until",),
}


Path = tuple[str | int, ...]


def has_times(config: Mapping) -> bool:
    """Return whether some length of a recipe, as plain values, still has to be turned into steps."""
    return bool(timed_paths(config))


def timed_paths(config: Mapping) -> list[Path]:
    """Return the place of every value that a time is still to be resolved into."""
    stages = config.get("stages") or []
    own = [stage.get("train") or {} for stage in stages]
    unused = bool(own) and all(train.keys() & {"tokens", "steps", "time"} for train in own)
    found = [path for path in _timed_keys(config) if not (unused and path == ("train", "steps"))]
    for number, stage in enumerate(stages):
        found += [("stages", number, *path) for path in _timed_keys(stage)]
    return found


def _timed_keys(config: Mapping) -> list[Path]:
    found: list[Path] = []
    for section, keys in _LENGTHS.items():
        for key in keys:
            path = (*section, key)
            if is_time(value_at(config, path)):
                found.append(path)
    train = config.get("train") or {}
    if train.get("time") is not None and train.get("steps") is None:
        found.append(("train", "steps"))
    return found


def value_at(config: Any, path: Path) -> Any:
    """Return the value at a place; None where there is nothing."""
    for key in path:
        if isinstance(config, list):
            config = config[key] if isinstance(key, int) and key < len(config) else None
        else:
            config = config.get(key) if isinstance(config, dict) else None
    return config


def set_at(config: Any, path: Path, value: Any) -> None:
    """Set the value at a place that is there."""
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def is_time(value: Any) -> bool:
    """Return whether a value is a wall-clock duration."""
    try:
        return isinstance(value, str) and Duration.parse(value).unit == "seconds"
    except ValueError:
        return False
