"""Lengths given as time become steps, once: when a run begins, by the speed that is measured then."""

from scionlm.core.config import validate
from scionlm.core.duration import Duration
from scionlm.core.log import say
from scionlm.recipes.config import Recipe
from scionlm.recipes.lengths import timed_keys


def resolve_times(recipe: Recipe, seconds_per_step: list[float]) -> Recipe:
    """Return a recipe with its times as steps.

    Args:
        recipe: The recipe.
        seconds_per_step: Of each stage; what stands at the top level goes by the first.
    """
    config = recipe.model_dump(mode="json")
    parts = [(config, seconds_per_step[0]), *zip(config["stages"], seconds_per_step, strict=False)]
    for part, seconds in parts:
        for section, key in timed_keys(part):
            time = section["time"] if key == "steps" else section[key]
            section[key] = max(round(Duration.parse(time).amount / seconds), 1)
            say(f"{time} is {section[key]:,} steps at {seconds:.3g} s a step")
    return validate(Recipe, config, "the recipe with its times resolved")
