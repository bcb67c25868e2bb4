"""What is read of a pruning: its axes, the shapes before and after, and which units of each layer stay."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scionlm.report.collect import Pruning, Run
from scionlm.report.values import integer, mapping, number, text
from scionlm.report.wording import NONE

AXES = {
    "layers": "layers",
    "attention": "attention blocks",
    "mlp": "MLP blocks",
    "hidden": "hidden channels",
    "groups": "key/value heads",
    "heads": "query heads",
    "ffn": "MLP channels",
}
"""Name of an axis to what its units are."""
SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden channels",
    "intermediate_size": "MLP channels",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads",
}
_METHODS = {
    "masks": "by learned masks",
    "scores": "by importance scores",
    "first": "to its first units",
    "random": "by lot",
}
_FIDELITY = {"recommended": "Scion's own", "paper": "as in the paper", "code": "as in the published code"}
_RANGE = re.compile(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", re.ASCII)
_MAX_AXES, _MAX_LAYERS, _MAX_HEADS = 12, 400, 512


@dataclass(frozen=True)
class Axis:
    """Where the masks of one kind ended: shares of units, and None where one is not recorded.

    Attributes:
        open: Units that the masks left open on average.
        goal: Units that are to stay.
        dead: Of the units that stay, those whose mask was as good as closed.
        fractional: Those whose mask was half open.
        distance: Of the row that is furthest from the goal.
        margin: Probability to be open of the last unit that stays, less that of the first that goes.
        folded: Whether soft masks were multiplied into the weights.
    """

    name: str
    rows: float | None
    units: float | None
    target: float | None
    open: float | None
    dead: float | None
    fractional: float | None
    distance: float | None
    margin: float | None
    folded: bool

    @property
    def words(self) -> str:
        """What its units are."""
        return AXES.get(self.name, self.name[:40])

    @property
    def goal(self) -> float | None:
        """The share of units that is to stay."""
        return self.target / self.units if self.target is not None and self.units else None

    def exceeds(self, value: float | None, limit: float) -> bool:
        """Return whether a share is known and beyond a limit."""
        return value is not None and not value <= limit

    def shown(self, share: float | None) -> str:
        """Return a share in percent with one decimal."""
        return NONE if share is None or not math.isfinite(100 * share) else f"{100 * share:.1f}%"


def axes_of(record: Mapping[str, Any]) -> list[Axis]:
    """Return the axes of the masks; none where nothing was learned."""
    found = record.get("axes")
    listed = [mapping(one) for one in found] if isinstance(found, list) else []
    return [_axis(one) for one in listed if text(one, "name")][:_MAX_AXES]


def _axis(one: Mapping[str, Any]) -> Axis:
    rows, units, target = (number(one, key) for key in ("rows", "units", "target"))
    return Axis(
        name=text(one, "name") or "",
        rows=rows,
        units=units,
        target=target,
        open=number(one, "open_share"),
        dead=number(one, "dead_share"),
        fractional=number(one, "fractional_share"),
        distance=number(one, "distance"),
        margin=number(one, "margin"),
        folded=one.get("folded") is True,
    )


def method_of(run: Run, pruning: Pruning) -> str:
    """Return the method's name, empty where none is recorded."""
    return text(pruning.record, "method") or text(mapping(run.config.get("prune")), "method") or ""


def method_words(method: str) -> str:
    """Return how was pruned: "by learned masks"; of a method that is not known, nothing is claimed."""
    return _METHODS.get(method, "by another method")


def fidelity_words(fidelity: str) -> str | None:
    """Return what a fidelity is."""
    return _FIDELITY.get(fidelity)


def shape_of(run: Run, pruning: Pruning) -> Mapping[str, Any]:
    """Return the shape that is left; before it is there, the one that is asked for."""
    return mapping(pruning.record.get("shape")) or run.shape or mapping(run.config.get("target"))


def source_sizes(run: Run, pruning: Pruning) -> dict[str, float]:
    """Return the sizes of the source, as far as they are known from what was cut of it."""
    shape, axes = shape_of(run, pruning), {axis.name: axis.units for axis in axes_of(pruning.record)}
    known = bool(axes) or run.inherit.cut is not None  # then what was not cut is as it was
    found = {key: value for key in SIZES if known and (value := number(shape, key)) is not None}
    if axes:
        groups, heads = found.get("num_key_value_heads"), found.get("num_attention_heads")
        inside = axes.get("heads") or (heads / groups if heads and groups else None)
        groups = axes.get("groups") or groups
        of_axes = {
            "hidden_size": axes.get("hidden"),
            "intermediate_size": axes.get("ffn"),
            "num_key_value_heads": groups,
            "num_attention_heads": groups * inside if groups and inside else None,
        }
        found |= {key: value for key, value in of_axes.items() if value is not None}
    found |= {key: value for key, value in (run.inherit.cut or {}).items() if key in SIZES}
    layers = integer(mapping(pruning.record.get("plan")), "num_source_layers")
    layers = run.source.num_layers if layers is None and run.source else layers
    found |= {"num_hidden_layers": float(layers)} if layers is not None else {}
    parameters = run.source.num_parameters if run.source else None
    return found | ({"num_parameters": parameters} if parameters else {})


def total_tokens(run: Run, pruning: Pruning) -> float | None:
    """Return the tokens of pruning and recovery together; None before the end."""
    both = number(run.child.training, "tokens")
    return both if both is not None and math.isfinite(both) and both >= pruning.tokens else None


@dataclass(frozen=True)
class Layer:
    """What stays of a layer of the source: query heads, and in words key/value heads and MLP channels; None is all."""

    index: int
    heads: frozenset[int] | None
    groups: frozenset[int] | None
    channels: int | None


def layers_of(record: Mapping[str, Any]) -> list[Layer]:
    """Return the layers that stay, as the plan has them; those that are not of the source are left out."""
    listed = mapping(record.get("plan")).get("layers")
    found: list[Layer] = []
    for one in (mapping(each) for each in listed[:_MAX_LAYERS]) if isinstance(listed, list) else []:
        index = integer(one, "index")
        if index is not None and 0 <= index < _MAX_LAYERS:
            heads, groups, channels = (text(one, key) for key in ("heads", "kv_heads", "ffn"))
            found.append(
                Layer(
                    index,
                    frozenset(_indices(heads)) if heads else None,
                    frozenset(_indices(groups)) if groups else None,
                    _number_of(channels) if channels else None,
                )
            )
    return found


def _ranges(listed: str) -> Iterable[tuple[int, int]]:
    for part in listed.split(","):
        match = _RANGE.fullmatch(part)
        if match:
            yield int(match[1]), int(match[2] or match[1])


def _indices(listed: str) -> Iterable[int]:
    for first, last in _ranges(listed):
        yield from range(min(first, _MAX_HEADS), min(last + 1, _MAX_HEADS))


def _number_of(listed: str) -> int:
    return sum(max(0, last - first + 1) for first, last in _ranges(listed))
