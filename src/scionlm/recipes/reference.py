"""The recipe of a reference: what is trained from scratch first, so that others can inherit from it and be measured."""

from typing import Any

from scionlm.core.config import validate
from scionlm.core.errors import UsageError
from scionlm.recipes.config import Recipe
from scionlm.recipes.lengths import has_times
from scionlm.recipes.stages import left_of

OF_REFERENCE = ("data", "train", "optimizer", "schedule", "evaluate", "checkpoint", "track", "seed", "init")
"""What a reference has of the recipe that it is for; the rest is about children."""

OWN_OF_REFERENCE = ("data", "train", "optimizer", "schedule")
"""Sections of which a reference may have keys of its own."""


def reference_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of a recipe's reference: its own keys, and else those of the child.

    Raises:
        UsageError: A key is not there, or a value is wrong.
    """
    assert recipe.reference is not None
    top = recipe.model_dump(mode="json")
    config: dict[str, Any] = {"recipe": "scratch", "model": recipe.reference.model}
    config |= {key: top[key] for key in OF_REFERENCE}
    for name in OWN_OF_REFERENCE:
        own = getattr(recipe.reference, name) or {}
        config[name] = left_of(name, config[name], own) | own
    if has_times(config):
        raise UsageError("reference: its lengths are steps, tokens or shares; times are resolved for the child alone")
    return validate(Recipe, config | {"export": {"dtype": "float32"}}, "reference")
