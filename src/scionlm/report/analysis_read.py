"""Typed looks into an analysis: any key may be missing, of another type, or hold more than a page can show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scionlm.report.axes import drawable
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.svg import MAX_LAYERS
from scionlm.report.values import integer, mapping, number, text
from scionlm.report.wording import exact

# What a page shows at most; the whole is in analysis.json.
MAX_HEADS, MAX_ROWS = 512, 40


def rows(record: Mapping[str, Any], key: str, most: int = MAX_ROWS) -> list[Mapping[str, Any]]:
    """Return the mappings in the list under `key`; what is none becomes an empty one and keeps its place."""
    found = record.get(key)
    return [mapping(item) for item in found[:most]] if isinstance(found, list) else []


def numbers(value: object, most: int = MAX_LAYERS + 1) -> list[float | None]:
    """Return the numbers of a list, None for what is no finite number."""
    return [finite({"": item}, "") for item in value[:most]] if isinstance(value, list) else []


def finite(record: Mapping[str, Any], key: str) -> float | None:
    """Return the number under `key`; one that no axis can hold is a fault, and taken as missing."""
    value = number(record, key)
    return value if value is not None and drawable(value) else None


def matrix(value: object, most: int = MAX_LAYERS + 1) -> list[list[float | None]]:
    """Return a list of lists of numbers."""
    return [numbers(row, most) for row in value[:most]] if isinstance(value, list) else []


def indices(value: object) -> list[int]:
    """Return the whole numbers of a list that can be layers."""
    return [int(item) for item in numbers(value) if item is not None and 0 <= item < MAX_LAYERS]


def named_indices(written: str | None, total: int) -> list[int] | None:
    """Return the layers that `0-7,12` names, below `total`; None where it is no such list."""
    parts = (written or "").split(",")
    if len(parts) > MAX_LAYERS or total > MAX_LAYERS:
        return None
    found: list[int] = []
    for part in parts:
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not all(one.isascii() and one.isdigit() and len(one) < 6 for one in (first, last)):
            return None
        if not int(first) <= int(last) < total:
            return None
        found += range(int(first), int(last) + 1)
    return found


@dataclass(frozen=True)
class Look:
    """A model as analysed: the record itself, or the other model's beside it."""

    record: Mapping[str, Any]

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """Return what model it is."""
        return mapping(self.record.get("model"))

    @property
    def name(self) -> str:
        """Return the model's name."""
        return text(self.model, "name") or "a model without a name"

    @cached_property
    def overall(self) -> Mapping[str, Any]:
        """Return what is said of the whole model."""
        return mapping(self.record.get("overall"))

    @cached_property
    def layers(self) -> list[Mapping[str, Any]]:
        """Return what is said of each layer, of the first `MAX_LAYERS`."""
        return rows(self.record, "layers", MAX_LAYERS)

    @property
    def labels(self) -> list[str]:
        """Return the layers' numbers."""
        return [str(k) for k in range(len(self.layers))]

    @property
    def lazy(self) -> list[int]:
        """Return the lazy layers."""
        return sorted({k for k in indices(self.overall.get("lazy_layers")) if k < len(self.layers)})

    @property
    def num_layers(self) -> int:
        """Return how many layers the model has."""
        stored = self.record.get("layers")
        return len(stored) if isinstance(stored, list) else integer(self.model, "num_hidden_layers") or 0

    def column(self, key: str) -> list[float | None]:
        """Return a number of each layer."""
        return [finite(layer, key) for layer in self.layers]

    def heads(self, key: str) -> list[list[float | None]]:
        """Return a number of each head, a row a head and a column a layer."""
        stored = self.record.get("heads")
        found: dict[tuple[int, int], float | None] = {}
        for item in stored if isinstance(stored, list) else []:
            one = mapping(item)
            layer, head = integer(one, "layer"), integer(one, "head")
            if layer is not None and head is not None and 0 <= layer < len(self.layers) and 0 <= head < MAX_HEADS:
                found[head, layer] = finite(one, key)
        count = max((head for head, _ in found), default=-1) + 1
        return [[found.get((head, layer)) for layer in range(len(self.layers))] for head in range(count)]

    @property
    def seq_len(self) -> str:
        """Return how long the sequences were, in words: ranks and masses say nothing without it."""
        length = integer(self.record, "seq_len")
        return of(length, "token") if length else "a length that is not recorded"


def known(values: Sequence[float | None]) -> list[float]:
    """Return the numbers that are there."""
    return [value for value in values if value is not None]


def figure(title: str, picture: Content, note: Content = None) -> Markup:
    """Return a drawing with its title above and a note below it, on a card."""
    below = tag("figcaption", note, class_="note") if note is not None else None
    return tag("figure", tag("h3", title), picture, below, class_="card plot")


def small_figure(title: str, picture: Content, note: Content = None) -> Markup:
    """Return a drawing for half the page."""
    below = tag("figcaption", note, class_="note") if note is not None else None
    return tag("figure", tag("h3", title), picture, below, class_="plot")


def of(count: int, noun: str) -> str:
    """Return a count with its noun: 1 layer, 30 layers."""
    return f"{exact(count)} {noun}{'' if count == 1 else 's'}"


def short(name: str) -> str:
    """Return a name on few characters."""
    return clip(name, 48)
