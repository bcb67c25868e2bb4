"""Which rounds a recipe that grows may come to: by how many layers, and what they can take at the most."""

from dataclasses import replace
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.recipes.config import Recipe
from scionlm.recipes.controller import Rule
from scionlm.recipes.measured import DEPTHS
from scionlm.recipes.selection import plan_of
from scionlm.sources import ModelFolder
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.plan import LayerPlan, SurgeryPlan

_IN_LAYERS = ("attention_norm", "attention", "mlp_norm", "mlp")
CONTROL = "control"
"""What the plan calls a model of the result's shape from random weights."""
STUDENT = "student"
"""What a trained child is called where it is grown."""


def rule_of(recipe: Recipe, plan: SurgeryPlan) -> Rule:
    """Return when a recipe grows and stops.

    Args:
        recipe: The recipe.
        plan: The layers of its first round.
    """
    grow, first = recipe.grow, len(plan.layers)
    assert grow is not None
    return Rule(
        first=first,
        by=grow.by,
        most=max(grow.max_layers or plan.num_source_layers, first),
        round_tokens=recipe.total_tokens,
        most_rounds=grow.max_rounds,
        most_tokens=grow.max_tokens,
        until=grow.until,
        tolerance=grow.tolerance,
        criterion=grow.criterion,
    )


def check_growth(recipe: Recipe, plan: SurgeryPlan, source: ModelFolder) -> None:
    """Refuse rounds that cannot be.

    Args:
        recipe: The recipe.
        plan: The layers of its first round.
        source: The source.

    Raises:
        UsageError: There is no room for a second round, or no budget for the first.
    """
    grow, first, total = recipe.grow, len(plan.layers), plan.num_source_layers
    if grow is None:
        return
    if grow.max_layers is not None and grow.max_layers < first:
        raise UsageError(f"grow.max_layers {grow.max_layers}: the first round has {first} layers already")
    if grow.init == "source_next" and max(grow.max_layers or total, first) > total:
        raise UsageError(
            f"grow.max_layers {grow.max_layers}: the source has {total} layers; another grow.init has more"
        )
    _dry_run(recipe, plan, source)
    if grow.max_tokens is not None and grow.max_tokens < recipe.total_tokens:
        raise UsageError(f"grow.max_tokens {grow.max_tokens:,}: one round takes {recipe.total_tokens:,} tokens")


def _dry_run(recipe: Recipe, plan: SurgeryPlan, source: ModelFolder) -> None:
    """Work out what every round that may come begins with, as far as that is known before anything is measured."""
    first = plan
    for layers in rule_of(recipe, plan).layers[1:]:
        if chooses_anew(recipe):
            plan_of(_with_layers(recipe, layers), source)
            continue
        if goes_on(recipe):
            plan = in_terms_of_source(plan, growth_of(recipe, plan, layers, plan.donors[0]))
        else:
            in_terms_of_source(first, growth_of(recipe, first, layers, plan.donors[0]))


def goes_on(recipe: Recipe) -> bool:
    """Return whether each round goes on with the weights, and the text, of the one before."""
    return recipe.grow is not None and recipe.grow.base == STUDENT


def chooses_anew(recipe: Recipe) -> bool:
    """Return whether a deeper child has the layers that the recipe would choose for it, whatever the one before had."""
    grow, inherit = recipe.grow, recipe.inherits
    from_source = grow is not None and grow.base == "source" and grow.init == "source_next"
    return from_source and inherit.keep is None and inherit.strategy not in DEPTHS


def _with_layers(recipe: Recipe, layers: int) -> Recipe:
    return recipe.model_copy(update={"inherit": recipe.inherits.model_copy(update={"layers": layers})})


def growth_of(recipe: Recipe, plan: SurgeryPlan, layers: int, source: str) -> SurgeryPlan:
    """Return how a model with the layers of a plan grows.

    Args:
        recipe: The recipe.
        plan: The layers that it has, in terms of the source.
        layers: How many it is to have.
        source: Name of the source.

    Raises:
        UsageError: It cannot be grown in the way asked for.
    """
    grow = recipe.grow
    assert grow is not None
    takes = grow.init == "source_next"
    if takes and grow.base == "student" and recipe.from_random:
        raise UsageError("grow.init source_next: the child began at random, the source's layers do not; choose another")
    if takes and grow.base == "student" and set(plan.fresh) & set(_IN_LAYERS):
        raise UsageError(
            "grow.init source_next: the source's layers would bring what inherit.fresh leaves out; choose "
            "another, or grow from the source"
        )
    if takes and any(layer.init != "source" for layer in plan.layers):
        raise UsageError("grow.init source_next: the child has layers that are none of the source's; choose another")
    if takes and plan.cuts_width:
        raise UsageError("grow.init source_next: the source's layers are wider than the child's; choose another")
    names = [STUDENT, source] if takes else [STUDENT]
    return plan_growth(names, len(plan.layers), layers, grow.init, plan.keep, plan.num_source_layers, recipe.seed)


def in_terms_of_source(plan: SurgeryPlan, growth: SurgeryPlan) -> SurgeryPlan:
    """Return a plan of the source's layers that has the shape and the origins of a grown child.

    Args:
        plan: The child's before it grew.
        growth: How it grows; its second donor is the source.
    """

    def origin(layer: LayerPlan) -> LayerPlan:
        if layer.donor == 1:
            return LayerPlan(layer.index)
        before = plan.layers[layer.index]
        return before if layer.init == "source" else replace(before, init=layer.init)

    return replace(
        plan,
        layers=tuple(origin(layer) for layer in growth.layers),
        seed=growth.seed,
        strategy=f"{plan.strategy}, {growth.strategy}",
    )


def round_shapes(recipe: Recipe, plan: SurgeryPlan) -> list[SurgeryPlan]:
    """Return a plan of the size of each model that is trained, in the order of their sizes: of each round's child.

    Which layers the later ones have is not said: only how many. What is trained while a source is pruned is at most as
    large as the source, which is then the last one.
    """
    if recipe.pruning_stage is not None:
        return [plan, plan_depth(plan.num_source_layers, plan.num_source_layers, name=plan.donors[0])]
    if recipe.grow is None:
        return [plan]
    return [plan, *(_of_size(plan, layers) for layers in rule_of(recipe, plan).layers[1:])]


def _of_size(plan: SurgeryPlan, layers: int) -> SurgeryPlan:
    own = plan.layers
    return replace(plan, layers=tuple(own[number % len(own)] for number in range(layers)))


def add_rounds(first: dict[str, Any], largest: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the plan of a recipe that trains several models one after another: at the most, all of them.

    Tokens, steps and operations leave the control out, as in the plan of one model; seconds and bytes have it.

    Args:
        first: The plan of its first round: of the curve of the learning rate.
        largest: That of its largest model: of memory.
        parts: The plans of everything that is trained, by name.
    """
    sums = {key: sum(part[key] for part in parts.values()) for key in ("seconds", "disk_bytes")}
    own = [part for name, part in parts.items() if name != CONTROL]
    sums |= {key: sum(part[key] for part in own) for key in ("num_tokens", "num_steps", "flops")}
    evaluation = {name: part["seconds_by_part"]["evaluation"] for name, part in parts.items()}
    by_part = {name: part["seconds"] - evaluation[name] for name, part in parts.items()}
    kept = ("num_parameters", "parameters_by_part", "memory_bytes_per_device", "memory_by_part", "checkpoint_bytes")
    rounds = [
        {"name": name, "seconds": by_part[name]} | {key: part[key] for key in ("num_parameters", "num_tokens", "flops")}
        for name, part in parts.items()
    ]
    models = len(parts) + first["models_trained"] - 1
    return (
        first
        | {key: largest[key] for key in (*kept, "layout", "micro_batch_size")}
        | sums
        | {
            "seconds_by_part": by_part | {"evaluation": sum(evaluation.values())},
            "models_trained": models,
            "rounds": rounds,
        }
    )
