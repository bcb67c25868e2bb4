"""The target of a recipe that prunes, in sizes, and the recipes of the steps that lead to it."""

import math
from dataclasses import asdict
from typing import Any

from scionlm.core.config import nearest
from scionlm.core.devices import Device, this_machine
from scionlm.core.errors import UsageError
from scionlm.families import ModelShape, family_of
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_inherit import SIZES
from scionlm.recipes.config_shear import BUDGETS, DEPTH, TargetConfig
from scionlm.recipes.model_shapes import KNOWN_SHAPES, TargetShape
from scionlm.recipes.targets import (
    Budget,
    Candidate,
    candidates,
    check_reach,
    complete_target,
    steps_between,
)
from scionlm.sources import ModelFolder

_SHARES = [percent / 100 for percent in range(99, 4, -2)]
# Of hard concrete gates, `train.gates.concrete`, which needs torch; a test compares them.
LOG_LIMIT, LOG_STRETCH = math.log(100), math.log(0.1 / 1.1)


def with_target(recipe: Recipe, source: ModelFolder, device: Device | None = None) -> Recipe:
    """Return a recipe whose target is in sizes, where it was a budget or a known shape; others as they are, checked.

    Args:
        recipe: The recipe.
        source: What it prunes.
        device: Where a time to write a token is meant; None is this machine.

    Raises:
        UsageError: The target cannot be reached from the source; one message says all that is wrong.
    """
    target = recipe.target
    if target is None:
        return recipe
    shape = ModelShape.of(source.config)
    if target.is_settled or not any((target.shape, *(getattr(target, name) for name in BUDGETS))):
        asked: dict[str, int | None] = {name: target.sizes.get(name) for name in (DEPTH, *SIZES)}
    elif target.shape is not None:
        asked = _sizes(_known(target.shape))
        own_size = KNOWN_SHAPES[target.shape].head_dim
        if own_size not in (None, shape.head_dim):
            raise UsageError(
                f"target.shape {target.shape}: its heads have {own_size} channels, those of {source.name} "
                f"{shape.head_dim}, and heads are not cut; name sizes of your own"
            )
    else:
        asked = _sizes(target_candidates(target, source, device)[0].shape)
    if target.shape is not None and asked != _sizes(_known(target.shape)):
        raise UsageError(f"target.shape {target.shape} has other sizes than those beside it; leave one of the two out")
    found = complete_target(asked, shape, family_of(source.config), source.name)
    if recipe.prune is not None and recipe.prune.method == "masks":
        how = recipe.prune.gate_settings(recipe.fidelity)  # pyright: ignore[reportArgumentType]
        low = 1 / (1 + math.exp(LOG_LIMIT + how["temperature"] * LOG_STRETCH))
        check_reach(found, shape, 1.0 if how["constraint"] == "calibrated" else 1 - low)
    by_name = any((target.shape, *(getattr(target, name) for name in BUDGETS)))
    settled = recipe.model_copy(update={"target": target.model_copy(update=_sizes(found))}) if by_name else recipe
    shrinking(settled, source.config)  # refuses a number of steps that cannot be
    return settled


def target_shape(recipe: Recipe, source: dict[str, Any]) -> TargetShape:
    """Return every size of a recipe's target, those included that it leaves as they are in the source."""
    assert recipe.target is not None
    asked: dict[str, int | None] = {name: recipe.target.sizes.get(name) for name in (DEPTH, *SIZES)}
    return complete_target(asked, ModelShape.of(source), family_of(source), "the source")


def target_candidates(target: TargetConfig, source: ModelFolder, device: Device | None = None) -> list[Candidate]:
    """Return the shapes that a target's budget has room for, the best first; none where it has no budget."""
    if not any(getattr(target, name) is not None for name in BUDGETS):
        return []
    device = device or this_machine()
    budget = Budget(
        **{name: getattr(target, name) for name in BUDGETS}, bandwidth=device.bandwidth, peak_flops=device.bf16_flops
    )
    return candidates(source.config, budget)


def _known(name: str) -> TargetShape:
    if name not in KNOWN_SHAPES:
        raise UsageError(
            f"target.shape {name!r} is unknown{nearest(name, list(KNOWN_SHAPES))} (known: {', '.join(KNOWN_SHAPES)})"
        )
    return KNOWN_SHAPES[name]


def _sizes(shape: TargetShape) -> dict[str, Any]:
    return {name: value for name, value in asdict(shape).items() if name in (DEPTH, *SIZES)}


def pruning_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the stretch of training in which a source is pruned."""
    stage, prune = recipe.pruning_stage, recipe.prune
    assert stage is not None
    assert prune is not None
    kept = ("data", "train", "optimizer", "schedule", "reweight", "replay")
    update: dict[str, Any] = {key: getattr(stage, key) for key in kept}
    update |= {"stages": [], "control": False, "average": None, "distill": None}
    if recipe.distill is not None and prune.distill:
        # States of layers are learned by what is left: under masks channels are closed that a teacher has.
        update["distill"] = recipe.distill.model_copy(update={"hidden": None})
    return recipe.model_copy(update=update)


def shrinking(recipe: Recipe, source: dict[str, Any]) -> list[Recipe]:
    """Return the recipes of the steps in which a score prunes a source: each with a target and a budget of its own.

    Args:
        recipe: The recipe, with a settled target.
        source: The source's `config.json`.

    Raises:
        UsageError: The budget has fewer optimizer steps than there are steps of pruning.
    """
    prune = recipe.prune
    assert prune is not None
    if prune.method != "scores" or prune.iterations == 1:
        return [recipe]
    shape, family = ModelShape.of(source), family_of(source)
    last = target_shape(recipe, source)
    shapes = steps_between(shape, last, family=family)
    if isinstance(prune.iterations, int):
        possible = {len(found): found for share in _SHARES if (found := steps_between(shape, last, share, family))}
        if prune.iterations not in possible:
            known = ", ".join(map(str, sorted(possible)))
            raise UsageError(
                f"prune.iterations: {prune.iterations} equal steps cannot be made of these sizes ({known})"
            )
        shapes = possible[prune.iterations]
    stage, number = recipe.pruning_stage, len(shapes)
    budget = 0 if stage is None else stage.total_steps
    if stage is not None and budget < number:
        raise UsageError(
            f"prune.tokens: {budget} optimizer steps are less than one for each of {number} steps of pruning"
        )
    pieces: list[Recipe] = []
    for index, smaller in enumerate(shapes):
        share = budget * (index + 1) // number - budget * index // number
        update: dict[str, Any] = {"target": TargetConfig(**_sizes(smaller))}
        if stage is not None:
            update["prune"] = prune.model_copy(update={"steps": share, "tokens": None})
        piece = recipe.model_copy(update=update)
        if piece.pruning_stage is not None:
            try:
                piece.check_pruning(piece.pruning_stage)
            except ValueError as error:
                raise UsageError(f"prune.iterations: step {index + 1} has {share} optimizer steps; {error}") from error
        pieces.append(piece)
    return pieces
