"""The grid of a sweep: keys of a recipe with several values each, and a run for every combination of them."""

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any, cast

from scionlm.core.config import Mapping
from scionlm.core.errors import UsageError

_LABEL = 16  # characters of a value in a run's name
_NAME = 80  # of the whole name
# Keys that say what a value is only together with their section.
_BY_SECTION = ("name", "fraction", "run", "dir", "weight", "share")


def expand(grid: Mapping) -> list[Mapping]:
    """Return the runs of a grid, the last key moving fastest: the keys of each as a recipe has them, and its name.

    Args:
        grid: As in a recipe, but with a list of values in the place of each value.

    Raises:
        UsageError: A value is no list, or an empty one.
    """
    paths, choices = [], []
    for path, values in _axes(grid, ()):
        paths.append(path)
        choices.append(list(zip(values, _texts(values), strict=True)))
    runs: list[Mapping] = []
    for chosen in itertools.product(*choices):
        keys: Mapping = {}
        for path, (value, _) in zip(paths, chosen, strict=True):
            here = keys
            for section in path[:-1]:
                here = here.setdefault(section, {})
            here[path[-1]] = value
        name = "-".join(_label(path) + text for path, (_, text) in zip(paths, chosen, strict=True))
        runs.append({"name": _short(name)} | keys)
    return runs


def _axes(grid: Mapping, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, value in grid.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            yield from _axes(cast("Mapping", value), here)
        elif isinstance(value, list) and value:
            yield here, cast("list[Any]", value)
        else:
            raise UsageError(f"grid.{'.'.join(here)}: {value!r} is no list of values; write [{value}, ...]")


def _label(path: tuple[str, ...]) -> str:
    *sections, key = path
    return (sections[-1] if sections and key in _BY_SECTION else key).replace("_", "")


def _texts(values: list[Any]) -> list[str]:
    """Return values as parts of a folder's name; another one that reads as an earlier one does gets a number."""
    found: list[str] = []
    for number, value in enumerate(values):
        text = _text(value)
        found.append(f"{text}_{number + 1}" if text in found and value not in values[:number] else text)
    return found


def _text(value: Any) -> str:
    """Return a value as a part of a folder's name: 0.05 is 0p05, and a run's RUN/model is RUN."""
    if value is None:
        return "none"
    text = (
        f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").removesuffix("/model").rsplit("/", 1)[-1]
    )
    return re.sub(r"[^A-Za-z0-9]+", "_", text.replace(".", "p"))[-_LABEL:].strip("_")


def _short(name: str) -> str:
    """Return a name, the end of one that is too long replaced by a hash of all of it."""
    return name if len(name) <= _NAME else f"{name[: _NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
