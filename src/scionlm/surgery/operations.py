"""One operation for each tensor of the target: which tensor of which donor, what is cut from it, what it is scaled by.

Pure data from configurations and plan; nothing is read. What executes them is `surgery.apply`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any, Literal

import numpy as np

from scionlm.families import FamilySpec, ModelShape, family_of
from scionlm.families.shape import TensorPlace, axis_size, expected_tensors
from scionlm.surgery.plan import LayerPlan, SurgeryPlan

Index = np.ndarray[Any, np.dtype[np.int64]]
Fill = Literal["source", "random", "zero"]


@dataclass(frozen=True)
class Scale:
    """Multiply `offset + w` by `factor` and take the offset off again, along a stretch of one axis or everywhere."""

    factor: float
    offset: float = 0.0
    axis: int = 0
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Operation:
    """How one tensor of the target is made.

    Attributes:
        place: The tensor.
        fill: `source` takes it from a donor; `random` and `zero` are fresh.
        donor: Which donor.
        source: Its name there.
        index: For each axis the places to keep, None for all.
        scale: What the result is multiplied by.
        padding: Rows behind the others that hold their mean.
    """

    place: TensorPlace
    fill: Fill
    donor: int = 0
    source: str = ""
    index: tuple[Index | None, ...] = ()
    scale: Scale | None = None
    padding: int = 0

    @property
    def kind(self) -> str:
        """In a word: `copied`, `cut`, `scaled` or `fresh`."""
        if self.fill != "source":
            return "fresh"
        if self.scale is not None:
            return "scaled"
        return "cut" if self.padding or any(index is not None for index in self.index) else "copied"

    @property
    def num_rows(self) -> int:
        """Rows of the result, those of padding left out."""
        return self.place.shape[0] - self.padding

    def narrowed(self, rows: list[int]) -> "Operation":
        """Return the operation that makes only these rows of the result."""
        kept = self.index[0]
        first: Index = np.asarray(rows, dtype=np.int64) if kept is None else kept[rows]
        scale = self.scale
        if scale is not None and scale.axis == 0 and scale.stop is not None:
            inside = [row for row in rows if scale.start <= row < scale.stop]
            scale = replace(scale, start=0, stop=len(inside)) if inside else None
        return replace(self, index=(first, *self.index[1:]), scale=scale, padding=0)

    @property
    def num_elements(self) -> int:
        """Elements of the result."""
        return prod(self.place.shape)


def axis_index(axis: str, config: dict[str, Any], plan: SurgeryPlan, layer: LayerPlan | None) -> Index | None:
    """Return the places of a donor's axis that the plan keeps; None for all of them."""
    family, shape = family_of(config), ModelShape.of(config)
    size = shape.head_dim
    kept: dict[str, tuple[Sequence[int] | None, int]] = {
        "hidden": (plan.hidden, 1),
        "vocab": (plan.vocab, 1),
        "heads": (layer.heads if layer else None, size),
        "kv_heads": (layer.kv_heads if layer else None, size),
        "qkv_heads": (layer.heads if layer else None, 3 * size),
        "ffn": (layer.ffn if layer else None, 1),
    }
    segments = axis.split("+")
    if all(kept.get(segment, (None, 1))[0] is None for segment in segments):
        return None
    pieces: list[Index] = []
    start = 0
    for segment in segments:
        length = axis_size(segment, family, config, shape)
        units, width = kept.get(segment, (None, 1))
        if units is None:
            pieces.append(np.arange(start, start + length))
        else:
            firsts = start + np.asarray(units, dtype=np.int64) * width
            pieces.append((firsts[:, None] + np.arange(width)).reshape(-1))
        start += length
    return np.concatenate(pieces)


def operations(configs: list[dict[str, Any]], target: dict[str, Any], plan: SurgeryPlan) -> list[Operation]:
    """Return the operations for every tensor of the target, in its storage order.

    Args:
        configs: `config.json` of each donor.
        target: `config.json` of the target (`surgery.target.target_config`).
        plan: What to make.
    """
    family = family_of(target)
    return [_operation(place, family, configs, target, plan) for place in expected_tensors(target)]


def _operation(
    place: TensorPlace, family: FamilySpec, configs: list[dict[str, Any]], target: dict[str, Any], plan: SurgeryPlan
) -> Operation:
    spec = place.spec
    layer = None if place.layer is None else plan.layers[place.layer]
    if layer is not None and layer.init == "zero_output" and spec.role in ("attention_output", "mlp_output"):
        return Operation(place, "zero")
    if spec.part in plan.fresh or (layer is not None and layer.init != "source"):
        return Operation(place, "random", padding=plan.vocab_padding if spec.axes[0] == "vocab" else 0)
    donor = 0 if layer is None else layer.donor
    name = place.name
    if layer is not None:
        inner = spec.name
        if place.head is not None:
            kept = layer.heads if spec.repeat == "heads" else layer.kv_heads
            inner = inner.replace("{head}", str(place.head if kept is None else kept[place.head]))
        name = f"{family.layers}.{layer.index}.{inner}"
    index = tuple(axis_index(axis, configs[donor], plan, layer) for axis in spec.axes)
    padding = plan.vocab_padding if spec.axes[0] == "vocab" else 0
    return Operation(place, "source", donor, name, index, _scale(place, family, configs, target, plan), padding)


def _scale(
    place: TensorPlace, family: FamilySpec, configs: list[dict[str, Any]], target: dict[str, Any], plan: SurgeryPlan
) -> Scale | None:
    """Return what makes up for a factor that the architecture derives from a size or a place that the plan changes."""
    role = place.spec.role
    if family.embedding_scaled and plan.hidden is not None:
        # Embeddings are multiplied by the root of hidden_size, which is smaller now. Where the head shares them, the
        # norm in front of it takes the factor back.
        source, now = ModelShape.of(configs[0]), ModelShape.of(target)
        factor = sqrt(source.hidden_size / now.hidden_size)
        if role == "embedding":
            return Scale(factor)
        if role == "final_norm" and source.tie_word_embeddings and "embedding" not in plan.fresh:
            return Scale(1 / factor, offset=family.norm_offset)
    inverse = family.inverse_layer_scale
    if inverse and configs[0].get(inverse) and place.layer is not None and role in ("query", "qkv"):
        # Scores are divided by the layer's number: its queries carry the old one along.
        factor = (place.layer + 1) / (plan.layers[place.layer].index + 1)
        axis = next(i for i, name in enumerate(place.spec.axes) if name.startswith("heads"))
        shape = ModelShape.of(target)
        return None if factor == 1 else Scale(factor, 0.0, axis, 0, shape.num_attention_heads * shape.head_dim)
    return None


def summarize(found: list[Operation], source_names: list[set[str]], bytes_each: int) -> dict[str, Any]:
    """Return how many tensors and bytes are copied, cut, scaled and fresh, and which of the donors' are left behind.

    Args:
        found: The operations.
        source_names: Names of each donor's tensors.
        bytes_each: Bytes of one element.
    """
    kinds: dict[str, dict[str, int]] = {}
    for operation in found:
        entry = kinds.setdefault(operation.kind, {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += operation.num_elements
    used = {(op.donor, op.source) for op in found if op.fill == "source"}
    dropped = sum(len(names) for names in source_names) - len(used)
    total = sum(op.num_elements for op in found)
    return {"tensors": kinds, "dropped_tensors": dropped, "num_parameters": total, "bytes": total * bytes_each}
