"""Which rounds a recipe that grows may come to: by how many layers, and what they can take at the most."""

from dataclasses import replace
from typing import Any

from scionlm.core.errors import UsageError
from scionlm.recipes.config import Recipe
from scionlm.recipes.controller import Rule
from scionlm.surgery.plan import SurgeryPlan


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


def check_growth(recipe: Recipe, plan: SurgeryPlan) -> None:
    """Refuse rounds that cannot be.

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
    if grow.max_tokens is not None and grow.max_tokens < recipe.total_tokens:
        raise UsageError(f"grow.max_tokens {grow.max_tokens:,}: one round takes {recipe.total_tokens:,} tokens")


def round_shapes(recipe: Recipe, plan: SurgeryPlan) -> list[SurgeryPlan]:
    """Return a plan of the size of each round's child, the first round's alone where there is one round.

    Which layers the later ones have is not said: only how many.
    """
    if recipe.grow is None:
        return [plan]
    return [plan, *(_of_size(plan, layers) for layers in rule_of(recipe, plan).layers[1:])]


def _of_size(plan: SurgeryPlan, layers: int) -> SurgeryPlan:
    own = plan.layers
    return replace(plan, layers=tuple(own[number % len(own)] for number in range(layers)))


def add_rounds(first: dict[str, Any], largest: dict[str, Any], parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the plan of a recipe that trains several models one after another: at the most, all of them.

    Args:
        first: The plan of its first round: of the curve of the learning rate.
        largest: That of its largest model: of memory.
        parts: The plans of everything that is trained, by name.
    """
    sums = {key: sum(part[key] for part in parts.values()) for key in ("num_tokens", "num_steps", "flops", "seconds")}
    by_part = {name: part["seconds"] for name, part in parts.items()}
    kept = ("num_parameters", "parameters_by_part", "memory_bytes_per_device", "memory_by_part", "checkpoint_bytes")
    rounds = [
        {"name": name} | {key: part[key] for key in ("num_parameters", "num_tokens", "flops", "seconds")}
        for name, part in parts.items()
    ]
    models = len(parts) + first["models_trained"] - 1
    return (
        first
        | {key: largest[key] for key in (*kept, "layout", "micro_batch_size")}
        | sums
        | {"seconds_by_part": by_part, "models_trained": models, "rounds": rounds}
    )
