"""From masks to a plan: which layers, heads and channels a pruned model has of its source."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scionlm.families import ModelShape
from scionlm.surgery.plan import Indices, LayerPlan, SurgeryPlan

Kept = Mapping[str, Sequence[Sequence[bool]]]
"""Which units stay by axis (`train.gates.axes`), `[rows, units]`; an axis without gates is left out."""


def plan_of_masks(kept: Kept, source: ModelShape, name: str, rule: str) -> SurgeryPlan:
    """Return the plan that cuts what masks close.

    Args:
        kept: The masks.
        source: Sizes of the model that is cut.
        name: Of that model.
        rule: How they were chosen, for the plan.
    """
    layers, groups = source.num_hidden_layers, source.num_key_value_heads
    inside = source.num_attention_heads // groups
    depth = kept.get("layers", kept.get("attention"))
    plans: list[LayerPlan] = []
    for layer in range(layers) if depth is None else _indices(depth[0]):
        cuts: dict[str, Any] = {}
        if "groups" in kept or "heads" in kept:
            mine = _indices(kept["groups"][layer]) if "groups" in kept else tuple(range(groups))
            rows = kept.get("heads", [[True] * inside] * (layers * groups))
            cuts["heads"] = tuple(
                group * inside + head for group in mine for head in _indices(rows[layer * groups + group])
            )
            if "groups" in kept:
                cuts["kv_heads"] = mine
        if "ffn" in kept:
            cuts["ffn"] = _indices(kept["ffn"][layer])
        plans.append(LayerPlan(layer, **cuts))
    hidden = _indices(kept["hidden"][0]) if "hidden" in kept else None
    plan = SurgeryPlan((name,), (layers,), tuple(plans), hidden=hidden, strategy="explicit" if depth is None else rule)
    return replace(plan, width=rule) if plan.cuts_width else plan


def _indices(row: Sequence[bool]) -> Indices:
    return tuple(index for index, stays in enumerate(row) if stays)
