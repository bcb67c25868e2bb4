"""Typed looks into JSON that may lack a key or hold another type: then the answer is None, never an exception."""

import math
from collections.abc import Mapping
from typing import Any


def mapping(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a mapping (its keys as text), else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def number(record: Mapping[str, Any], key: str) -> float | None:
    """Return the number under `key`; an integer beyond any float is infinite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def integer(record: Mapping[str, Any], key: str) -> int | None:
    """Return the whole number under `key`."""
    value = number(record, key)
    return int(value) if value is not None and math.isfinite(value) else None


def text(record: Mapping[str, Any], key: str) -> str | None:
    """Return the text under `key` if there is any in it."""
    value = record.get(key)
    return value if isinstance(value, str) and value.strip() else None
