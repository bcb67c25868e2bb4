"""The recipe of a reference: what is trained from scratch first, so that others can inherit from it and be measured."""

from typing import Any

from scionlm.core.config import validate
from scionlm.recipes.config import Recipe
from scionlm.recipes.stages import overlaid

# What a reference has of the recipe that it is for; the rest is about children.
_SHARED = ("data", "train", "optimizer", "schedule", "evaluate", "checkpoint", "track", "seed")


def reference_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of a recipe's reference: its own keys, and else those of the child.

    Raises:
        UsageError: A key is not there, or a value is wrong.
    """
    assert recipe.reference is not None
    top = recipe.model_dump(mode="json")
    config: dict[str, Any] = {"recipe": "scratch", "model": recipe.reference.model}
    config |= {key: top[key] for key in _SHARED}
    for name in ("train", "optimizer", "schedule"):
        config[name] = overlaid(name, config[name], getattr(recipe.reference, name) or {})
    return validate(Recipe, config | {"export": {"dtype": "float32"}}, "reference")
