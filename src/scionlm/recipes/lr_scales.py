"""`optimizer.lr_scales`: which layers and parts are trained at a rate of their own, checked before anything runs."""

from collections.abc import Sequence
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.families import ModelShape
from scionlm.families.shape import expected_tensors
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_train import OptimizerConfig
from scionlm.recipes.shear_steps import shrinking, target_shape
from scionlm.recipes.targets import config_with
from scionlm.sources import ModelFolder
from scionlm.surgery.depth import parse_keep
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.target import target_config


def scales_of(config: OptimizerConfig) -> dict[int | str, float]:
    """Return the multiplier of each layer and part that has one.

    Raises:
        UsageError: A layer has two.
    """
    scales: dict[int | str, float] = {}
    for where, scale in config.lr_scales.items():
        names: list[Any] = list(parse_keep(where)) if where[:1].isdigit() else [where]
        for one in names:
            if one in scales:
                raise UsageError(f"optimizer.lr_scales names layer {one} twice")
            scales[one] = scale
    return scales


def check_scales(recipe: Recipe, source: ModelFolder, plan: SurgeryPlan) -> None:
    """Refuse scales of layers or parts that a model has not which will be trained, before hours of what comes first.

    Raises:
        UsageError: It names the first such one.
    """
    if not any(stage.optimizer.lr_scales for stage in recipe.resolved_stages):
        return
    result = target_config([source.config], plan, for_a_plan=True)
    trained = [(stage.optimizer, result) for stage in recipe.resolved_stages]
    if recipe.pruning_stage is not None:
        trained += [(recipe.pruning_stage.optimizer, cut) for cut in _while_pruning(recipe, source.config)]
    for optimizer, config in trained:
        places = expected_tensors(config)
        known = {place.spec.role if place.layer is None else place.layer for place in places}
        for name in scales_of(optimizer):
            if name not in known:
                parts = ", ".join(sorted(place for place in known if isinstance(place, str)))
                raise UsageError(
                    f"optimizer.lr_scales: a model of {ModelShape.of(config).num_hidden_layers} layers has no "
                    f"{name!r} (its layers, {parts})"
                )


def _while_pruning(recipe: Recipe, source: dict[str, Any]) -> Sequence[dict[str, Any]]:
    assert recipe.prune is not None
    if recipe.prune.method == "masks":
        return [source]
    return [config_with(source, target_shape(step, source)) for step in shrinking(recipe, source)]
