"""`scion plan --calibrate`: the speed of this machine on this very shape, from a few passes with random weights."""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from scionlm.core.devices import this_machine
from scionlm.core.errors import UsageError
from scionlm.core.log import Progress, say, silenced, warn
from scionlm.core.records import Record
from scionlm.data import Batch
from scionlm.families.models import random_model
from scionlm.parallel.placing import release
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.parallel.runtime import Runtime, check_attention, resolve_compile, start_runtime
from scionlm.recipes.budgets import with_budgets
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import match_layers, open_teacher
from scionlm.recipes.layout import with_rows
from scionlm.recipes.lengths import has_times
from scionlm.recipes.objectives import open_objective
from scionlm.recipes.origin import open_source
from scionlm.recipes.planning import plan_recipe, table_seconds
from scionlm.recipes.selection import plan_of
from scionlm.recipes.shear_steps import with_target
from scionlm.recipes.timing import resolve_times
from scionlm.schedules import Piece, Schedule
from scionlm.sources import ModelFolder
from scionlm.surgery.target import target_config
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

_PASSES = 3  # measured, after one that is not
_WORTH_IT = 0.98  # of the time: a larger pass has to save so much


class Speed(NamedTuple):
    """What passes took.

    Attributes:
        seconds: Of a step in each stage, the teacher's part included.
        teacher_seconds: The teacher's part.
        runtime: Where that was measured.
    """

    seconds: list[float]
    teacher_seconds: list[float]
    runtime: Runtime


def calibrated(recipe: Recipe) -> Record:
    """Return a plan with its time, and its memory, as measured here: of each model of another size that is trained.

    A step under masks is measured without them: gates cost less than steps differ (docs/results/shearing.md).
    """
    if has_times(recipe.model_dump(mode="json")):
        recipe = resolve_times(recipe, step_seconds(recipe))
    runtime = replace(start_runtime(recipe.train.precision, ALONE), ranks=ALONE)
    known: dict[str, Speed] = {}

    def timed(part: Recipe, target: dict[str, Any], planned: Record) -> Record:
        alone = part.model_copy(update={"control": False}).model_dump(mode="json")
        alone["train"] |= {"steps": None, "tokens": None, "time": None}  # a control's budget may be another
        key = json.dumps([alone, target], sort_keys=True)
        if key not in known:
            compiled = resolve_compile(part.train.compile, runtime, planned["flops"])  # as the run will be
            closed = with_rows(part, planned["micro_batch_size"])
            closed = closed.model_copy(update={"train": closed.train.model_copy(update={"compile": compiled})})
            known[key] = measure_steps(closed, ALONE, target)
        return _with_seconds(part, planned, known[key])

    planned = plan_recipe(recipe, timed=timed)
    if "rounds" not in planned:
        once = sum(planned["seconds_by_part"].get(part, 0.0) for part in ("training", "teacher"))
        planned["tokens_per_s"] = planned["models_trained"] * planned["num_tokens"] / once
    return with_budgets(recipe, planned) | {
        "device": runtime.name,
        "precision": runtime.precision,
        "seconds_known_from": f"{_PASSES} passes measured here",
        "memory_measured_bytes": runtime.peak_memory(),
    }


def _with_seconds(recipe: Recipe, planned: Record, speed: Speed) -> Record:
    """Return the plan of a model whose times follow from those of a step in each stage."""
    training = taught = 0.0
    asked = recipe.teacher_steps
    for stage, seconds, teacher in zip(recipe.resolved_stages, speed.seconds, speed.teacher_seconds, strict=True):
        training += stage.total_steps * (seconds - teacher)
        taught += min(asked, stage.total_steps) * teacher
        asked -= min(asked, stage.total_steps)
    models, once = planned["models_trained"], training + taught
    by_table = sum(planned["seconds_by_part"].get(part, 0.0) for part in ("training", "teacher")) / models
    slower = once / by_table
    parts = {"training": models * training} | ({"teacher": models * taught} if recipe.has_teacher else {})
    parts["evaluation"] = planned["seconds_by_part"]["evaluation"] * slower
    return planned | {"seconds": sum(parts.values()), "seconds_by_part": parts}


def choose_rows(recipe: Recipe, sizes: list[int], runtime: Runtime) -> int:
    """Return the sequences in a pass at which a device is fastest.

    Where weights are shared out no device can try alone: then the largest size that is expected to fit is taken.

    Args:
        recipe: The recipe.
        sizes: Those that are expected to fit, smallest first.
        runtime: The device.
    """
    if runtime.shards > 1 or len(sizes) == 1:
        return sizes[-1]
    with _trial(recipe, replace(runtime, ranks=ALONE)) as (objective, optimizer):
        return _fastest(recipe, sizes, runtime, objective, optimizer)


def _fastest(recipe: Recipe, sizes: list[int], runtime: Runtime, objective: Objective, optimizer: Optimizer) -> int:
    longest = max(stage.data.seq_len for stage in recipe.resolved_stages)
    best, fastest, vain = sizes[0], float("inf"), 0
    with Progress("choosing the micro-batch", len(sizes)) as progress:
        for number, rows in enumerate(sizes):
            batch = _batch(objective.model, rows, longest)
            try:
                if number == 0:  # a step that changes nothing: what fits has to fit beside the optimizer's state
                    train_step(objective, optimizer, batch, rows, 0.0, 1.0)
                work = partial(_pass, objective, optimizer, batch)
                times = [_seconds(work, runtime) for _ in range(_PASSES)]
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                break
            each = min(times[1:]) / rows
            vain = 0 if each < _WORTH_IT * fastest else vain + 1
            best, fastest = (rows, each) if vain == 0 else (best, fastest)
            progress.update(number + 1, f"{rows} sequences: {longest / each:.0f} tokens/s")
            if vain == 2:
                break  # larger ones take longer to try, and gain nothing
    say(f"micro_batch_size: {best}, the fastest of those that fit ({longest / fastest:.0f} tokens/s)")
    return best


def measure_steps(recipe: Recipe, ranks: Ranks = ALONE, target: dict[str, Any] | None = None) -> Speed:
    """Return the time of a step in each stage on one device, from passes with random weights.

    A step is measured as micro-batches and an update apart, since a global batch may be many of the former.

    Args:
        recipe: The recipe.
        ranks: The processes that run it.
        target: `config.json` of the model that is trained; None takes what the recipe makes in the end.
    """
    runtime = replace(start_runtime(recipe.train.precision, ranks), ranks=ALONE)
    recipe = _closed(recipe, runtime)
    with _trial(recipe, runtime, target) as (objective, optimizer):
        return _speed(recipe, runtime, objective, optimizer)


def _closed(recipe: Recipe, runtime: Runtime) -> Recipe:
    """Return a recipe with what its run will settle: the size of a pass, and whether layers are compiled."""
    open_rows = any(stage.train.micro_batch_size == "auto" for stage in recipe.resolved_stages)
    if not open_rows and recipe.train.compile != "auto":
        return recipe
    try:
        with silenced():  # lengths that are given as time are by the table here, and measured in a moment
            planned = plan_recipe(recipe)
    except UsageError:
        if open_rows:
            raise
        planned = {"flops": 0}  # by the table they do not go together
    compiled = resolve_compile(recipe.train.compile, runtime, planned["flops"])
    recipe = with_rows(recipe, planned["micro_batch_size"]) if open_rows else recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": compiled})})


def step_seconds(recipe: Recipe, ranks: Ranks = ALONE) -> list[float]:
    """Return the time of a step in each stage on one device, as lengths that are given as time go by it.

    It is measured; where one device has no room for a trial, it is by the table of devices.

    Args:
        recipe: The recipe.
        ranks: The processes that run it.
    """
    device = this_machine()
    try:
        return measure_steps(recipe, ranks).seconds
    except torch.OutOfMemoryError:
        if start_runtime(recipe.train.precision, ranks).kind != device.kind:  # a card that is in no table
            raise
    warn(f"one device has no room to measure a step on; lengths go by what {device.name} is known to do")
    source = open_source(recipe, None, weights=False)
    recipe = with_target(recipe, source)
    teacher = open_teacher(recipe, source, weights=False)
    target = target_config([source.config], plan_of(recipe, source), for_a_plan=True)
    return table_seconds(recipe, target, teacher and teacher.config, device)


def _speed(recipe: Recipe, runtime: Runtime, objective: Objective, optimizer: Optimizer) -> Speed:
    found, taught = [], []
    with Progress("calibrating", len(recipe.resolved_stages) * (_PASSES + 1)) as progress:
        for number, stage in enumerate(recipe.resolved_stages):
            rows = stage.rows()
            batch = _batch(objective.model, rows, stage.data.seq_len)
            passing, whole = [], []
            before = 0.0
            for turn in range(_PASSES + 1):
                before = objective.teacher_seconds if turn == 1 else before
                passing.append(_seconds(partial(_pass, objective, optimizer, batch), runtime))
                step = partial(train_step, objective, optimizer, batch, rows, 0.0, 1.0)
                whole.append(_seconds(step, runtime))
                progress.update(number * (_PASSES + 1) + turn + 1)
            one, all_of_it = float(np.median(passing[1:])), float(np.median(whole[1:]))
            passes = stage.sequences_per_step / rows
            found.append(one * passes + max(all_of_it - one, 0.0))
            taught.append((objective.teacher_seconds - before) / (2 * _PASSES) * passes)
    return Speed(found, taught, runtime)


@contextlib.contextmanager
def _trial(
    recipe: Recipe, runtime: Runtime, target: dict[str, Any] | None = None
) -> Generator[tuple[Objective, Optimizer], None, None]:
    """Give the objective of a recipe on one device, with random weights, and an optimizer; take their memory back."""
    check_attention(recipe.train.attention, runtime)
    source = open_source(recipe, None, weights=False)
    recipe = with_target(recipe, source)
    model = random_model(target or target_config([source.config], plan_of(recipe, source)), recipe.seed)
    taught, layers = _teacher(recipe, source, runtime)
    always = Schedule((Piece("constant", "constant", 1, 1.0, 1.0),))
    try:
        objective = open_objective(recipe, runtime, model, taught, layers, always)
        if recipe.train.compile is True:
            objective.compile()
        yield objective, Optimizer(model, OptimizerSettings(name=recipe.optimizer.name))
    finally:
        for each in (model, taught):  # also where one of them did not fit
            if each is not None:
                release(each)


def _batch(model: PreTrainedModel, rows: int, seq_len: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, int(model.config.vocab_size), (rows, seq_len + 1))
    return Batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]))


def _teacher(recipe: Recipe, source: ModelFolder, runtime: Runtime) -> tuple[PreTrainedModel | None, Mapping[int, int]]:
    """Return a model of the teacher's shape and which of its layers are learned from; None and nothing without one."""
    teacher = open_teacher(recipe, source, weights=False)
    if teacher is None or recipe.distill is None:
        return None, {}
    layers = match_layers(recipe, source, teacher, plan_of(recipe, source))
    return random_model(teacher.config, recipe.seed, runtime.compute_dtype), layers


def _seconds(work: Callable[[], object], runtime: Runtime) -> float:
    """Return the time that work takes, with what it gives the device to do."""
    runtime.wait()
    started = time.perf_counter()
    work()
    runtime.wait()
    return time.perf_counter() - started


def _pass(objective: Objective, optimizer: Optimizer, batch: Batch) -> None:
    loss, _, _ = objective(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels))
    loss.backward()
    optimizer.zero_grad()
