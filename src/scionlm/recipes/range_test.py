"""`scion plan --find-lr`: the peak learning rate of a recipe's model, from a few dozen steps at a rate that rises.

What is trained is what the recipe would train first: its model, data, batch size, optimizer and teacher. AdamW begins
without a state, or with the one that a branch takes over, as a run does. Its first update moves each weight by the
learning rate, whatever the gradient's size: at 1e-6 that does nothing, and by the time the rate matters both moments
have seen dozens of gradients. So the rise is the warm-up, and no other is needed.
"""

import contextlib
import math
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from scionlm.core.errors import BrokenModelError, UsageError
from scionlm.core.log import Progress
from scionlm.core.records import Record
from scionlm.core.signals import StopRequest
from scionlm.data import Batch, SamplePlan
from scionlm.data.mixing.windows import IGNORE
from scionlm.parallel.ranks import ALONE
from scionlm.parallel.runtime import check_attention, start_runtime
from scionlm.planning.range_curve import is_over, range_rates, read_curve
from scionlm.recipes.beginning import branching
from scionlm.recipes.calibrate import step_seconds
from scionlm.recipes.child import make_model
from scionlm.recipes.config import Recipe
from scionlm.recipes.inheritune import with_selection
from scionlm.recipes.inputs import open_inputs
from scionlm.recipes.layout import with_rows
from scionlm.recipes.lengths import has_times
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.setting import Setting
from scionlm.recipes.stages import Stage
from scionlm.recipes.timing import resolve_times
from scionlm.recipes.training import objective_of, optimizer_settings
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer
from scionlm.train.step import micro_batches, own_batch, train_step

_WATCHED_TOKENS = 16384  # at most, and no more than a step has: watching costs a third of training at the most


def range_test(recipe: Recipe) -> Record:
    """Return what training at a rising rate does to the loss of a recipe's model, and the peak that this suggests.

    The loss is that of the same windows after each step: the first ones of the stage's order, which are set aside and
    not trained on. Nothing is written, and the model is thrown away.

    Returns:
        `steps` taken, their `lrs`, `losses` and `smoothed` losses (nats), the loss `before` the first, the tokens
        `watched`; `lr_lowest`, `lr_diverges`, `proposal` and `why` as in `planning.range_curve.Reading`.

    Raises:
        UsageError: The recipe names no data, or its model is not there before the run.
        DataError: Source and data are broken or do not fit.
    """
    _check(recipe)
    lrs: list[float] = []
    losses: list[float] = []
    with _opened(_settled(recipe)) as (learner, plan, stage):
        rows, clip = stage.rows(), stage.optimizer.grad_clip
        watched = _take(plan, min(stage.sequences_per_step, max(_WATCHED_TOKENS // stage.data.seq_len, 1)))
        before = _loss(learner.objective, watched, rows)
        if not math.isfinite(before):
            raise BrokenModelError(f"the loss before the first step is {before}: the model's weights are broken")
        rates = range_rates()
        with Progress("trying learning rates", len(rates)) as progress:
            for number, lr in enumerate(rates):
                batch = _take(plan, stage.sequences_per_step)
                learner.objective.at_step(number)
                learner.objective.train()
                applied = train_step(learner.objective, learner.optimizer, batch, rows, lr, clip).applied
                lrs.append(lr)
                losses.append(_loss(learner.objective, watched, rows) if applied else math.inf)
                progress.update(number + 1, f"lr {lr:.2g}  loss {losses[-1]:.3f}")
                if is_over(before, losses):
                    break
    return as_record(before, lrs, losses) | {"watched_tokens": int((watched.labels != IGNORE).sum())}


def as_record(before: float, lrs: list[float], losses: list[float]) -> Record:
    """Return a curve and what it says as plain values: see `range_test`."""
    reading = read_curve(before, lrs, losses)
    finite = losses if math.isfinite(losses[-1]) else losses[:-1]  # JSON has no other numbers; the test ended there
    return {
        "steps": len(losses),
        "before": before,
        "lrs": lrs[: len(finite)],
        "losses": finite,
        "smoothed": reading.smoothed,
        "lr_lowest": reading.lr_lowest,
        "lr_diverges": reading.lr_diverges,
        "proposal": reading.proposal,
        "why": reading.why,
    }


def _check(recipe: Recipe) -> None:
    if recipe.grow is not None or recipe.reference is not None or recipe.prune is not None:
        raise UsageError(
            "--find-lr trains the one model that a recipe begins with; leave it out where a recipe grows, prunes, or "
            "trains its reference, or name what that makes as the source of another"
        )
    if recipe.resolved_stages[0].data.dir is None:
        raise UsageError("--find-lr trains on the recipe's text: set data.dir=FOLDER, one that scion prepare has made")


def _settled(recipe: Recipe) -> Recipe:
    """Return a recipe with what it leaves to the machine."""
    if has_times(recipe.model_dump(mode="json")):
        recipe = resolve_times(recipe, step_seconds(recipe))
    if recipe.resolved_stages[0].train.micro_batch_size == "auto":
        recipe = with_rows(recipe, plan_recipe(recipe)["micro_batch_size"])
    return recipe


class _Trial(NamedTuple):
    """What is trained, the order of its samples, and the stage that they are of."""

    learner: Learner
    plan: SamplePlan
    stage: Stage


@contextlib.contextmanager
def _opened(recipe: Recipe) -> Generator[_Trial, None, None]:
    """Give what a recipe trains in its first stage, before its first step; take its memory back."""
    stop = StopRequest()  # never asked for: there is nothing to save, so a signal ends the test where it is
    with tempfile.TemporaryDirectory(prefix="scion-") as folder:
        out = Path(folder)  # stands for the run folder; what is measured to choose layers goes there
        inputs = open_inputs(recipe.model_copy(update={"stages": recipe.stages[:1]}), out)
        if recipe.inherit is not None:
            inputs = with_selection(inputs, out, stop, ALONE)
        runtime = start_runtime(recipe.train.precision)
        check_attention(recipe.train.attention, runtime)
        runtime.seed(recipe.seed)
        opened: dict[str, Any] = vars(inputs) | {
            "recipe": recipe
        }  # all of it: a teacher's weight goes by the whole run
        setting = Setting(**opened, runtime=runtime, stop=stop, folder=out)
        inputs = setting.stages[0]
        objective = objective_of(setting, make_model(setting))
        try:
            if recipe.train.compile is True:
                objective.compile()
            settings = optimizer_settings(inputs.stage.optimizer)
            optimizer = Optimizer(objective.model, settings, objective.projections)
            learner, position = Learner(objective, optimizer, Guard(0)), Position()
            branching(setting)(learner, position)
            sampling, start = inputs.sampling.going_on(position.cursors)
            yield _Trial(learner, sampling.plan(start), inputs.stage)
        finally:
            objective.release()


def _take(plan: SamplePlan, sequences: int) -> Batch:
    return own_batch(plan, plan.take(sequences), ALONE)


def _loss(objective: Objective, batch: Batch, rows: int) -> float:
    """Return the mean cross-entropy of a batch's predicted tokens, nats."""
    objective.eval()
    sums = [objective.token_nll(*arrays).double().sum().item() for arrays in micro_batches(batch, rows)]
    return sum(sums) / int((batch.labels != IGNORE).sum())
