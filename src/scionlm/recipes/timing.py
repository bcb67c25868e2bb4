"""Lengths given as time become steps, once: when a run begins, by the speed that is measured then."""

from scionlm.core.config import validate
from scionlm.core.duration import Duration
from scionlm.core.log import say
from scionlm.recipes.config import Recipe
from scionlm.recipes.lengths import set_at, timed_paths, value_at


def resolve_times(recipe: Recipe, seconds_per_step: list[float]) -> Recipe:
    """Return a recipe with its times as steps.

    Args:
        recipe: The recipe.
        seconds_per_step: Of each stage; what stands at the top level goes by the first.
    """
    config = recipe.model_dump(mode="json")
    for path in timed_paths(config):
        seconds = seconds_per_step[path[1] if path[0] == "stages" and isinstance(path[1], int) else 0]
        time = value_at(config, (*path[:-1], "time") if path[-1] == "steps" else path)
        steps = max(round(Duration.parse(time).amount / seconds), 1)
        set_at(config, path, steps)
        say(f"{time} is {steps:,} steps at {seconds:.3g} s a step")
    return validate(Recipe, config, "the recipe with its times resolved")
