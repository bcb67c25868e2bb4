"""Soft gates made part of the weights, so that a model without gates gives the same.

Each factor goes into one place only: hidden channels into embeddings, norms and what attention and MLP add; heads and
MLP channels into what reads them. A tied head shares the embedding's factor, so the last norm does without; an untied
head has none at all.

Differs: the published code also multiplies the head, on top of the last norm, which is right for gates of zero and one
alone (Sheared LLaMA's repository, `prune_params`).
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.families import ModelShape, family_of
from scionlm.families.shape import TensorPlace, expected_tensors
from scionlm.families.spec import FamilySpec
from scionlm.train.gates.masks import Values, norms_output


@torch.no_grad()
def fold_gates(model: PreTrainedModel, values: Values) -> None:
    """Multiply gates into a model's weights, in place; where a gate is zero, what it closes is left to be cut.

    Args:
        model: The model, whole, without gates on it.
        values: Gates by axis, `[rows, units]`.
    """
    config: dict[str, Any] = model.config.to_dict()
    family, shape = family_of(config), ModelShape.of(config)
    weights = dict(model.named_parameters())
    for place in expected_tensors(config):
        weight = weights.get(place.name)
        if weight is not None:
            for axis, factor in _factors(place, family, shape, values).items():
                _multiply(weight, axis, factor, family.norm_offset if "norm" in place.spec.role else 0.0)


def _factors(place: TensorPlace, family: FamilySpec, shape: ModelShape, values: Values) -> dict[int, torch.Tensor]:
    """Return what each axis of a tensor is multiplied by, by the axis' number."""
    spec, layer, found = place.spec, place.layer, dict[int, torch.Tensor]()
    hidden = _or_ones(values, "hidden", shape.hidden_size).view(-1)
    if spec.role in ("embedding", "position"):
        return {spec.axes.index("hidden"): hidden}
    if spec.role == "final_norm":
        return {} if shape.tie_word_embeddings else {0: hidden}
    if layer is None:
        return {}
    part = spec.part.removesuffix("_norm")
    depth = values.get(part if part in values else "layers")
    added = hidden if depth is None else hidden * depth.view(-1)[layer]
    if spec.role in ("attention_norm", "mlp_norm"):
        behind = norms_output(family, f"{part}_output") and _stands_behind(family, spec.name, f"{part}_output")
        return {0: added if behind else hidden}
    if spec.role not in ("attention_output", "mlp_output"):
        return {}
    if not norms_output(family, spec.role):
        found[spec.axes.index("hidden")] = added
    if len(spec.axes) > 1:
        inner = next(axis for axis in spec.axes if axis != "hidden")
        found[spec.axes.index(inner)] = _inner(inner, layer, shape, values)
    return found


def _inner(axis: str, layer: int, shape: ModelShape, values: Values) -> torch.Tensor:
    """Return the gates of what an output projection of a layer reads."""
    if axis == "ffn":
        return _or_ones(values, "ffn", shape.intermediate_size, shape.num_hidden_layers)[layer]
    groups, heads = shape.num_key_value_heads, shape.num_attention_heads
    outer = _or_ones(values, "groups", groups, shape.num_hidden_layers)[layer]
    inner = _or_ones(values, "heads", heads // groups, shape.num_hidden_layers * groups)
    inner = inner.view(shape.num_hidden_layers, groups, heads // groups)[layer]
    return (outer.unsqueeze(-1) * inner).reshape(-1).repeat_interleave(shape.head_dim)


def _or_ones(values: Values, name: str, units: int, rows: int = 1) -> torch.Tensor:
    return values[name].detach().cpu() if name in values else torch.ones(rows, units)


def _stands_behind(family: FamilySpec, name: str, role: str) -> bool:
    """Return whether a tensor of a layer comes after the one with a role."""
    specs = list(family.layer)
    names = [spec.name for spec in specs]
    return names.index(name) > next(index for index, spec in enumerate(specs) if spec.role == role)


def _multiply(weight: torch.Tensor, axis: int, factor: torch.Tensor, offset: float) -> None:
    shape = [1] * weight.dim()
    shape[axis] = -1
    factor = factor.to(weight).view(shape)
    weight.add_(offset).mul_(factor).sub_(offset)
