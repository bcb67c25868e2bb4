"""Which heads and channels to keep: the first ones, or those of the highest scores.

Scores are plain arrays that anything may have made (`analysis.importance` does); this module only chooses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, UsageError
from scionlm.families import FamilySpec, ModelShape
from scionlm.surgery.plan import Indices, LayerPlan, SurgeryPlan

Scores = Mapping[str, NDArray[np.float64]]
"""`hidden`: one for each channel of the residual stream; `heads` and `ffn`: a row of scores for each source layer."""


@dataclass(frozen=True)
class WidthTarget:
    """The sizes asked for, by Hugging Face's names; None keeps the source's."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked for."""
        sizes = (self.hidden_size, self.intermediate_size, self.num_attention_heads, self.num_key_value_heads)
        return sizes == (None, None, None, None)


def random_scores(source: ModelShape, seed: int) -> Scores:
    """Return scores that mean nothing: what choosing has to be better than."""
    generator, layers = np.random.default_rng(seed), source.num_hidden_layers
    sizes = {"hidden": (source.hidden_size,), "heads": (layers, source.num_attention_heads)}
    return {
        name: generator.random(size) for name, size in (sizes | {"ffn": (layers, source.intermediate_size)}).items()
    }


def settle_heads(target: WidthTarget, source: ModelShape) -> tuple[int, int]:
    """Return the numbers of query heads and of key/value heads that a request means.

    With one of them given, the number of query heads in a group stays as it is where it can; else all groups stay.

    Raises:
        UsageError: The heads cannot be divided into equal groups of the source's groups.
    """
    heads, groups = source.num_attention_heads, source.num_key_value_heads
    per_group = heads // groups
    asked, asked_groups = target.num_attention_heads, target.num_key_value_heads
    if asked is None:
        asked = heads if asked_groups is None else asked_groups * per_group
    if asked_groups is None:
        asked_groups = asked // per_group if asked % per_group == 0 else groups
    possible = asked_groups <= groups and asked % asked_groups == 0 and asked // asked_groups <= per_group
    if not possible:
        raise UsageError(
            f"num_attention_heads {asked}, num_key_value_heads {asked_groups} cannot be cut from {heads} and {groups}: "
            f"each key/value head keeps the same number of its {per_group} query heads"
        )
    return asked, asked_groups


def plan_width(
    plan: SurgeryPlan, family: FamilySpec, source: ModelShape, target: WidthTarget, scores: Scores | None, rule: str
) -> SurgeryPlan:
    """Return a plan that also cuts heads and channels.

    Args:
        plan: Which layers to keep.
        family: The source's.
        source: Its sizes.
        target: Sizes asked for.
        scores: What to keep the best of; None keeps the first ones.
        rule: Name of the choice, for the plan.

    Raises:
        UsageError: A size is larger than the source's, not positive, or does not divide.
        DataError: Scores are of other shapes than the source, or not finite.
    """
    if target.is_empty:
        return plan
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        asked, has = getattr(target, name), getattr(source, name)
        if asked is not None and not 1 <= asked <= has:
            raise UsageError(f"{name}: {asked} is not between 1 and the source's {has}")
    equal = (None, target.num_attention_heads or source.num_attention_heads)
    if target.num_key_value_heads not in equal and not family.has_kv_heads:
        raise UsageError(f"num_key_value_heads: {family.model_types[0]} has no grouped heads; set num_attention_heads")
    _check_scores(scores, source)
    heads, groups = settle_heads(target, source)
    cuts_heads = (heads, groups) != (source.num_attention_heads, source.num_key_value_heads)
    layers: list[LayerPlan] = []
    for layer in plan.layers:
        changes: dict[str, Indices] = {}
        if cuts_heads:
            kept, kept_groups = _heads(_row(scores, "heads", layer.index), source, heads, groups)
            changes["heads"] = kept
            if groups != source.num_key_value_heads:
                changes["kv_heads"] = kept_groups
        if target.intermediate_size not in (None, source.intermediate_size):
            changes["ffn"] = _best(_row(scores, "ffn", layer.index), source.intermediate_size, target.intermediate_size)
        layers.append(replace(layer, **changes))
    hidden = plan.hidden
    if target.hidden_size not in (None, source.hidden_size):
        hidden = _best(None if scores is None else scores.get("hidden"), source.hidden_size, target.hidden_size)
    return replace(plan, layers=tuple(layers), hidden=hidden, width=rule)


def _check_scores(scores: Scores | None, source: ModelShape) -> None:
    shapes = {
        "hidden": (source.hidden_size,),
        "heads": (source.num_hidden_layers, source.num_attention_heads),
        "ffn": (source.num_hidden_layers, source.intermediate_size),
    }
    for name, values in (scores or {}).items():
        if name in shapes and values.shape != shapes[name]:
            raise DataError(f"scores of {name} have shape {list(values.shape)}, the source needs {list(shapes[name])}")
        if not np.isfinite(values).all():
            raise DataError(f"scores of {name} hold numbers that are not finite")


def _row(scores: Scores | None, name: str, layer: int) -> NDArray[np.float64] | None:
    return None if scores is None or name not in scores else scores[name][layer]


def _best(scores: NDArray[np.float64] | None, total: int, number: int | None) -> Indices:
    """Return the `number` best in ascending order; ties go to the lower index."""
    assert number is not None
    if scores is None:
        return tuple(range(number))
    order = np.argsort(-scores, kind="stable")
    return tuple(sorted(int(index) for index in order[:number]))


def _heads(scores: NDArray[np.float64] | None, source: ModelShape, heads: int, groups: int) -> tuple[Indices, Indices]:
    """Return (query, key/value heads) to keep: the best groups by the sum of their heads, the best heads of each."""
    per_group, keep = source.num_attention_heads // source.num_key_value_heads, heads // groups
    table = None if scores is None else scores.reshape(source.num_key_value_heads, per_group)
    kept_groups = _best(None if table is None else table.sum(1), source.num_key_value_heads, groups)
    kept = [
        group * per_group + head
        for group in kept_groups
        for head in _best(None if table is None else table[group], per_group, keep)
    ]
    return tuple(kept), kept_groups
