"""What experience says of a plan of recipe continual: rules of thumb, where a recipe goes against one.

Source: the findings of Gupta et al., arXiv:2308.04014, and Ibrahim et al., arXiv:2403.08763.
"""

from pathlib import Path

import pydantic

from scionlm.core.config import load_yaml
from scionlm.core.errors import ScionError
from scionlm.core.records import Record
from scionlm.recipes.advice_words import say
from scionlm.recipes.config import Recipe
from scionlm.recipes.stages import Stage

_HIGH, _LOW = 1.5, 0.4  # of the source's own peak
_DECAYED = 0.5  # of its peak: above it a rate has hardly come down
_REPLAY = 0.05


def continual_advice(recipe: Recipe) -> list[Record]:
    """Return what a recipe continual might better do, as `advice_words.say` has it."""
    stages = recipe.resolved_stages
    found = [_peak(recipe, stages[0]), _upstream(recipe), _replay(recipe, stages), _warmup(stages)]
    found += [_constant(stages), _sequence(stages), _trunk(stages), _early(recipe)]
    return [one for one in found if one is not None]


def _peak(recipe: Recipe, first: Stage) -> Record | None:
    known = pretraining_peak(recipe)
    if known is None:
        return say(
            "the peak learning rate of the source's pre-training is not known here",
            "re-warming to about that peak is what the papers do; the peak decides how much is learned and forgotten. "
            "scion plan ... --find-lr proposes one",
        )
    ratio = first.optimizer.lr / known
    if ratio > _HIGH:
        return say(
            f"the peak is {ratio:.2g} times that of the source's pre-training ({known:g})",
            "a higher peak learns more of what is new and forgets more of what was known",
            f"optimizer.lr={known:g}",
        )
    if ratio < _LOW and first.schedule.name != "constant":
        return say(
            f"the peak is {ratio:.2g} times that of the source's pre-training ({known:g})",
            "a lower peak forgets less and learns less of what is new",
            f"optimizer.lr={known:g}",
        )
    return None


def pretraining_peak(recipe: Recipe) -> float | None:
    """Return the highest learning rate that the source was trained with, where it is the result of a run of Scion's."""
    path = _run_of(recipe)
    if not recipe.source or not path.is_file():
        return None
    try:
        stages = Recipe.model_validate(load_yaml(path)).resolved_stages
    except (ScionError, pydantic.ValidationError):  # of another version: then it is not known
        return None
    return max(stage.optimizer.lr for stage in stages)


def _run_of(recipe: Recipe) -> Path:
    """Return where the recipe of the run would be whose result the source is."""
    return Path(recipe.source or "").parent / "config.yaml"


def _upstream(recipe: Recipe) -> Record | None:
    replays = recipe.replay is not None and recipe.replay.stage is None
    if recipe.upstream is not None or replays:
        return None
    return say(
        "nothing says what the model knew before",
        "without held-out text of it, forgetting is not measured",
        "upstream.dir=FOLDER",
    )


def _replay(recipe: Recipe, stages: list[Stage]) -> Record | None:
    if any(stage.replay is not None for stage in stages):
        return None
    return say(
        "nothing is replayed",
        "one sequence in a hundred costs next to nothing downstream and saves most of what would be forgotten; the "
        "papers settle on 5 % where the new text is like the old, and 25 % where it is another language",
        _what_to_replay(recipe) if recipe.replay is None else f"replay.fraction={_REPLAY}",
    )


def _what_to_replay(recipe: Recipe) -> str:
    """Return the override that names earlier data: those of the run that made the source, else what stands in."""
    known = recipe.upstream
    if known is None or _run_of(recipe).is_file():
        return "replay.run=RUN"
    if known.dir is not None:
        return f"replay.data={known.dir}"
    if known.domains and recipe.data.mixture is not None:  # else they would be new text too
        return f"replay.domains=[{', '.join(known.domains)}]"
    return "replay.run=RUN"


def _warmup(stages: list[Stage]) -> Record | None:
    abrupt = [stage for stage in stages if not stage.steps(stage.schedule.warmup) and stage.schedule.name != "constant"]
    if not abrupt or all(stage.schedule.start_lr_ratio == 1 for stage in abrupt):
        return None
    return say(
        "there is no warm-up",
        "its length does not matter at the end of a run, but without any the losses jump at the beginning",
        "schedule.warmup=0.01",
    )


def _constant(stages: list[Stage]) -> Record | None:
    if any(stage.schedule.name != "constant" for stage in stages):
        return None
    return say(
        "the learning rate stays the same",
        "a low constant rate forgets least and is good for little text; over a long run it learns less than re-warming "
        "and decaying, and it leaves out what a decay brings at the end",
    )


def _sequence(stages: list[Stage]) -> Record | None:
    mixtures = [set(stage.data.mixture or ()) for stage in stages]
    alone = len(stages) > 1 and all(len(names) == 1 for names in mixtures)
    if not alone or len(set().union(*mixtures)) < len(stages):
        return None
    return say(
        "domains come one after the other",
        "each is forgotten while the next is learned; the same text mixed in one stage forgets less",
        "stages=[]",
    )


def _trunk(stages: list[Stage]) -> Record | None:
    decays = [stage for stage in stages if stage.build_schedule()(stage.total_steps - 1) < _DECAYED]
    if len(stages) < 2 or len(decays) < len(stages):
        return None
    return say(
        "every stage decays its learning rate and the next warms it up again",
        "each re-warming is paid for with forgetting, and three thirds of one text ended lower on a trunk "
        "(docs/results/schedules; of text that shifts that was not tried); schedule.name infinite or wsd, either with "
        "decay 0, keeps one rate, the stages after it go on with that, and only what is released decays, on a branch",
    )


def _early(recipe: Recipe) -> Record | None:
    if recipe.branch is None or recipe.branch.step is None:
        return None
    return say(
        f"the run begins with step {recipe.branch.step} of {recipe.branch.run}",
        "earlier checkpoints adapt worse: the last one before a decay is the one to take",
    )
