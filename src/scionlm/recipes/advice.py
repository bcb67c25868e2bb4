"""What experience says of a plan: where a recipe goes against what was found, by the papers or in docs/results."""

from collections.abc import Mapping

from scionlm.core.records import Record
from scionlm.families import ModelShape
from scionlm.recipes.advice_continual import continual_advice
from scionlm.recipes.advice_words import say
from scionlm.recipes.bill import text_sizes
from scionlm.recipes.config import Recipe
from scionlm.recipes.measured import MEASURED
from scionlm.recipes.origin import REFERENCE
from scionlm.recipes.rounds import CONTROL, goes_on

_EPOCHS = 4
"""Passes up to which text repeated is nearly as good as new. Source: Muennighoff et al. 2023, arXiv:2305.16264."""
_DEEP_CUT = 0.3  # of the source's parameters
_TOKENS_EACH = 5.0  # a parameter, passes counted
_WIDE = 768
_PEAKS = (1e-4, 6e-4)
"""Peak rates of the papers for models at least so wide: GPT-2, Pythia-410M, Inheritune, Sheared-LLaMA, TinyLlama."""
_FAR = 2.5


def advice(recipe: Recipe, config: Mapping[str, object], planned: Record) -> list[Record]:
    """Return what a recipe might better do: `what`, `why`, and `set`, the override that does it, or null.

    Args:
        recipe: The recipe.
        config: The model's `config.json`.
        planned: The plan, with `epochs`, and `source_parameters` where there is a source.
    """
    found = continual_advice(recipe) if recipe.recipe == "continual" else []
    more = [_epochs(recipe, planned), _first_layers(recipe, planned), _teacher(recipe), _tokens(recipe, planned)]
    more += [_evaluation(recipe, planned), _measuring(recipe), _tasks(recipe)]
    more += [_rate(recipe, config)] if recipe.recipe != "continual" else []
    return found + [one for one in more if one is not None]


def _epochs(recipe: Recipe, planned: Record) -> Record | None:
    often = {name: times for name, times in planned["epochs"].items() if times > _EPOCHS}
    if not often:
        return None
    named = ", ".join(f"{name} {times:.1f} times" for name, times in often.items())
    return say(
        f"text is gone through again and again: {named}",
        f"up to {_EPOCHS} times is nearly as good as new text (arXiv:2305.16264), more is worth less and less",
        _less_often(recipe, planned["epochs"]),
    )


def _less_often(recipe: Recipe, epochs: Mapping[str, float]) -> str | None:
    """Return the override with which no text is seen too often: others in its place, else fewer tokens."""
    sizes = text_sizes(recipe)
    room = _EPOCHS * sum(size - 1 for size in sizes.values())  # the last token is only predicted
    if sizes and sum(times * sizes[name] for name, times in epochs.items()) < room:
        return f"data.max_epochs={_EPOCHS} data.exhausted=redistribute"
    if any(stage.train and stage.train.keys() & {"tokens", "steps", "time"} for stage in recipe.stages):
        return None  # each stage has a budget of its own
    pruning = recipe.pruning_stage
    before = 0 if pruning is None else pruning.total_steps * pruning.train.global_batch_tokens
    batch, parts = recipe.train.global_batch_tokens, len(recipe.resolved_stages)
    fitting = (recipe.total_tokens + before) * _EPOCHS / max(epochs.values()) - before
    tokens = int(fitting / parts) // batch * batch
    return f"train.tokens={tokens}" if tokens > 0 else None


def _first_layers(recipe: Recipe, planned: Record) -> Record | None:
    inherit = recipe.inherit
    if recipe.recipe != "inheritune" or inherit is None or recipe.grow is not None or inherit.init == "random":
        return None
    if (inherit.strategy or "first") != "first" or inherit.keep or planned["source_parameters"] is None:
        return None
    if planned["num_parameters"] >= planned["source_parameters"]:
        return None
    return say(
        "the first layers are kept, as Inheritune does",
        "evenly spaced ones (inherit.strategy=spaced) ended lower wherever both were tried, by 0.05 to 0.8 nats "
        "(docs/results/inheritance, docs/results/layers); of a model trained for long, layers chosen by what is lost "
        "without them by 1.3 to 1.5 (docs/results/analysis.md, docs/results/layers; a block by angular_block by 0.07 "
        "more, two seeds: docs/results/layers-again), and those of greedy removal with narrower MLPs and a teacher, at "
        "1.6 times the operations, closed 96 % of what the first ones leave open (docs/results/factors; preset "
        "inheritune-taught)",
        "inherit.strategy=removal",
    )


def _teacher(recipe: Recipe) -> Record | None:
    has_source = recipe.source is not None or recipe.reference is not None
    if recipe.recipe not in ("inheritune", "shear") or recipe.distill is not None or not has_source:
        return None
    return say(
        "the source is not used as a teacher",
        "distillation was worth 0.08 to 0.15 nats at the same tokens (docs/results/shears, docs/results/inheritance), "
        "for 1.5 to 2.3 times the operations: where time is short, not text, more tokens without a teacher did more "
        "(docs/results/distillation.md)",
        "distill.teacher=source",
    )


def _tokens(recipe: Recipe, planned: Record) -> Record | None:
    whole = planned["source_parameters"]
    if recipe.recipe not in ("inheritune", "shear") or whole is None:
        return None
    kept, each = planned["num_parameters"] / whole, _childs_tokens(recipe, planned) / planned["num_parameters"]
    deep = kept < _DEEP_CUT
    if kept >= 1 or each >= _TOKENS_EACH:
        return None
    example = (
        "Sheared-LLaMA kept a fifth of its source and trained on 39 tokens a parameter"
        if deep
        else "Inheritune, the leanest there is, kept half of its source and went eight times through 0.7 tokens a "
        "parameter"
    )
    return say(
        f"{100 * kept:.0f} % of the source's parameters are kept, and trained on {each:.2g} tokens each",
        f"{example}; with fewer, expect a model that still improves with every token",
    )


def _childs_tokens(recipe: Recipe, planned: Record) -> int:
    """Return the tokens that the result's own weights are trained on."""
    parts = [one for one in planned.get("rounds", []) if one["name"] not in (REFERENCE, CONTROL)]
    if recipe.grow is not None and not goes_on(recipe):
        parts = parts[-1:]
    return sum(one["num_tokens"] for one in parts) if parts else planned["num_tokens"]


def _evaluation(recipe: Recipe, planned: Record) -> Record | None:
    seconds = planned["seconds_by_part"]
    share = seconds["evaluation"] / (sum(seconds.values()) or 1.0)
    if share <= 0.5:
        return None
    every = recipe.steps(recipe.evaluate.every)
    often = 0 < every < recipe.total_steps // 2
    return say(
        f"held-out losses take {100 * share:.0f} % of the time, more than training",
        f"{recipe.evaluate.tokens_per_domain:,} tokens a domain are measured "
        + (f"every {every} of {recipe.total_steps} steps" if often else "at the start and at the end at least"),
        "evaluate.every=0.5" if often else None,
    )


def _measuring(recipe: Recipe) -> Record | None:
    rule = (recipe.inherit.strategy or "").partition(":")[0] if recipe.inherit else ""
    if recipe.inherit is None or rule not in MEASURED or recipe.inherit.analysis is not None:
        return None
    each = " once for every layer that is left, for each one that goes" if rule == "greedy" else ""
    return say(
        f"the time of measuring layers for {rule} is not in this plan",
        f"the source is passed over some text before it is cut{each}; scion analyze does it once for many runs, and "
        "inherit.analysis takes what it found",
    )


def _tasks(recipe: Recipe) -> Record | None:
    if not recipe.evaluate.tasks:
        return None
    return say(
        "the time of evaluate.tasks is not in this plan",
        "source, result and control are scored on them at the end; what they take hangs on their items: "
        "scion evaluate MODEL --tasks ... --limit 20 shows it",
    )


def _rate(recipe: Recipe, config: Mapping[str, object]) -> Record | None:
    width = ModelShape.of(dict(config)).hidden_size
    peak = max(stage.optimizer.lr for stage in recipe.resolved_stages)
    low, high = _PEAKS
    if width < _WIDE or recipe.optimizer.name != "adamw" or low / _FAR <= peak <= high * _FAR:
        return None
    return say(
        f"the peak learning rate is {peak:g}",
        f"for models at least {_WIDE} wide the papers take {low:g} to {high:g}; scion plan ... --find-lr proposes one",
    )
