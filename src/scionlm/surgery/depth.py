"""Which layers of the source become the target's: by number, by list, by strategy."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scionlm.core.config import nearest
from scionlm.core.errors import UsageError


@dataclass(frozen=True)
class DepthPlan:
    """The layers to keep, in the target's order, and how they were chosen.

    Attributes:
        keep: Index in the source of each of the target's layers.
        num_source_layers: Layers of the source.
        strategy: Name of the rule, or `explicit`.
    """

    keep: tuple[int, ...]
    num_source_layers: int
    strategy: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {"keep": list(self.keep), "num_source_layers": self.num_source_layers, "strategy": self.strategy}


# On a 30-layer source three recovered best at 8 layers kept and did well at 15 (docs/results/demo-strategy.md).
_LAST_LAYERS = 3


def _first(layers: int, total: int) -> list[int]:
    return list(range(layers))


def _first_last(layers: int, total: int) -> list[int]:
    last = min(_LAST_LAYERS, layers // 2)
    return [*range(layers - last), *range(total - last, total)]


def _spaced(layers: int, total: int) -> list[int]:
    if layers == 1:
        return [0]
    return [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


STRATEGIES: dict[str, tuple[Callable[[int, int], list[int]], str]] = {
    "first": (_first, "the first N layers, as Inheritune does"),
    "first_last": (_first_last, "the last three of N (at most half) from the end, the others from the start"),
    "spaced": (_spaced, "N layers evenly spaced, the first and the last among them"),
}
"""Name to (rule, what it does)."""


def parse_keep(text: str) -> list[int]:
    """Return the layer indices that `0-7,12` names, in the order written.

    Raises:
        UsageError: It is not a list of indices and ranges, or names a layer twice.
    """
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"keep {text!r}: {part.strip()!r} is neither a layer nor a range such as 0-7")
        indices += range(int(match[1]), int(match[2] or match[1]) + 1)
    return indices


def plan_depth(
    num_source_layers: int, layers: int | None = None, keep: list[int] | None = None, strategy: str | None = None
) -> DepthPlan:
    """Return the plan for a source of `num_source_layers`.

    Args:
        num_source_layers: Layers of the source, numbered from 0.
        layers: How many to keep.
        keep: Which to keep, in order; excludes the others.
        strategy: How to choose `layers` of them; `first` when not given.

    Raises:
        UsageError: Neither or both of `layers` and `keep`, a number out of range, a layer twice, an unknown strategy.
    """
    valid = f"the source has {num_source_layers} layers, 0 to {num_source_layers - 1}"
    if (layers is None) == (keep is None):
        raise UsageError("say either how many layers to keep (layers) or which (keep)")
    if keep is not None:
        if strategy is not None:
            raise UsageError("keep names the layers already; leave strategy out")
        outside = [index for index in keep if not 0 <= index < num_source_layers]
        if outside:
            raise UsageError(f"keep: layer {outside[0]} does not exist; {valid}")
        if len(set(keep)) != len(keep):
            raise UsageError("keep: a layer stands twice; each layer can be inherited once")
        if not keep:
            raise UsageError("keep: no layer is kept")
        return DepthPlan(tuple(keep), num_source_layers, "explicit")
    assert layers is not None
    strategy = strategy or "first"
    if strategy not in STRATEGIES:
        raise UsageError(
            f"strategy {strategy!r} is unknown{nearest(strategy, list(STRATEGIES))} (known: {', '.join(STRATEGIES)})"
        )
    if not 1 <= layers <= num_source_layers:
        raise UsageError(f"layers: {layers} cannot be kept; {valid}")
    return DepthPlan(tuple(STRATEGIES[strategy][0](layers, num_source_layers)), num_source_layers, strategy)
