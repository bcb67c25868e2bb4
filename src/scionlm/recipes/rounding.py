"""Budgets in tokens that whole steps of a batch cannot meet, said before they are trained on."""

from collections.abc import Sequence

from scionlm.core.log import warn
from scionlm.recipes.config import PRUNING, Recipe
from scionlm.recipes.stages import MAIN, Stage

_FAR = 1.1
"""Times the budget from which on rounding up to whole steps is another budget."""


def warn_of_rounding(recipes: Sequence[Recipe]) -> None:
    """Say where whole steps train on far more tokens than a recipe asks for; what several share is said once."""
    for message in dict.fromkeys(message for recipe in recipes for message in rounded_budgets(recipe)):
        warn(message)


def rounded_budgets(recipe: Recipe) -> list[str]:
    """Return, in words, the budgets of a recipe that grow by more than a tenth where they become whole steps."""
    found = [_rounded(stage) for stage in recipe.trained_stages]
    return [message for message in found if message is not None]


def _rounded(stage: Stage) -> str | None:
    asked, batch = stage.train.tokens, stage.train.global_batch_tokens
    trained = stage.total_steps * batch
    if asked is None or trained <= _FAR * asked:
        return None
    key = {MAIN: "train.tokens", PRUNING: "prune.tokens"}.get(stage.name, f"stage {stage.name!r}: train.tokens")
    less = "less than one step" if asked < batch else "no whole number of steps"
    # Sequences stay whole, and a tenth of the budget is the most that rounding can then add.
    smaller = stage.data.seq_len * max(1, int((_FAR - 1) * asked) // stage.data.seq_len)
    lower = f"train.global_batch_tokens (e.g. {smaller})" if smaller < batch else "data.seq_len"
    return (
        f"{key} {asked:,} is {less} of train.global_batch_tokens {batch:,}: {trained:,} are trained on; lower {lower}"
    )
