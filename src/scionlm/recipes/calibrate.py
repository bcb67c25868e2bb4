"""`scion plan --calibrate`: the speed of this machine on this very shape, from a few passes with random weights."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scionlm.core.log import Progress
from scionlm.core.records import Record
from scionlm.data import Batch
from scionlm.families.models import random_model
from scionlm.parallel.runtime import Runtime, start_runtime
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import plan_of
from scionlm.recipes.planning import plan_recipe
from scionlm.recipes.timing import resolve_times
from scionlm.sources import resolve
from scionlm.surgery.target import target_config
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

_PASSES = 3  # measured, after one that is not


def calibrated(recipe: Recipe) -> Record:
    """Return a plan with its time, and its memory, as measured here."""
    seconds, runtime = measure_steps(recipe)
    recipe = resolve_times(recipe, seconds)
    planned = plan_recipe(recipe)
    return _with_seconds(recipe, planned, seconds) | {
        "device": runtime.name,
        "precision": runtime.precision,
        "seconds_known_from": f"{_PASSES} passes measured here",
        "memory_measured_bytes": runtime.peak_memory(),
    }


def _with_seconds(recipe: Recipe, planned: Record, seconds_per_step: list[float]) -> Record:
    """Return a plan whose times follow from the seconds of a step in each stage."""
    steps = [stage.total_steps for stage in recipe.resolved_stages]
    once = sum(number * seconds for number, seconds in zip(steps, seconds_per_step, strict=True))
    slower = once / (planned["flops"] / (planned["peak_flops"] * planned["utilization"]))
    training = once * planned["models_trained"]
    evaluation = planned["seconds_by_part"]["evaluation"] * slower
    return planned | {
        "seconds": training + evaluation,
        "seconds_by_part": {"training": training, "evaluation": evaluation},
        "tokens_per_s": planned["num_tokens"] / once,
    }


def measure_steps(recipe: Recipe) -> tuple[list[float], Runtime]:
    """Return the seconds of a step in each stage, and the device, from passes with random weights.

    A step is measured as micro-batches and an update apart, since a global batch may be many of the former.
    """
    source = resolve(recipe.source, weights=False)
    runtime = start_runtime(recipe.train.precision)
    target = target_config([source.config], plan_of(recipe, source))
    model: Any = random_model(target, recipe.seed).to(runtime.device)  # pyright: ignore[reportArgumentType]
    objective = Objective(model, runtime.compute_dtype)
    if recipe.train.compile is True:
        objective.compile()
    optimizer = Optimizer(model, OptimizerSettings(name=recipe.optimizer.name))
    found: list[float] = []
    with Progress("calibrating", len(recipe.resolved_stages) * (_PASSES + 1)) as progress:
        for number, stage in enumerate(recipe.resolved_stages):
            rows = min(stage.train.micro_batch_size, stage.sequences_per_step)
            ids = np.random.default_rng(0).integers(0, int(target["vocab_size"]), (rows, stage.data.seq_len + 1))
            batch = Batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]))
            passing, whole = [], []
            for turn in range(_PASSES + 1):
                passing.append(_seconds(lambda batch=batch: _pass(objective, optimizer, batch)))
                whole.append(
                    _seconds(lambda batch=batch, rows=rows: train_step(objective, optimizer, batch, rows, 0.0, 1.0))
                )
                progress.update(number * (_PASSES + 1) + turn + 1)
            one, all_of_it = float(np.median(passing[1:])), float(np.median(whole[1:]))
            found.append(one * stage.sequences_per_step / rows + max(all_of_it - one, 0.0))
    return found, runtime


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _pass(objective: Objective, optimizer: Optimizer, batch: Batch) -> None:
    loss, _, _ = objective(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels))
    loss.backward()
    loss.item()  # waits for a GPU
    optimizer.zero_grad()
