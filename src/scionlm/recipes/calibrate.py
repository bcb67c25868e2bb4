"""`scion plan --calibrate`: the speed of this machine on this very shape, from a few passes with random weights."""

import time
from typing import Any

import numpy as np
import torch

from scionlm.core.log import Progress
from scionlm.core.records import Record
from scionlm.data import Batch
from scionlm.parallel.runtime import start_runtime
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import plan_of
from scionlm.sources import resolve
from scionlm.surgery.models import random_model
from scionlm.surgery.target import target_config
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

_PASSES = 3  # measured, after one that is not


def calibrated(recipe: Recipe, planned: Record) -> Record:
    """Return a plan with its time, and its memory, as measured here.

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
    seconds = 0.0
    with Progress("calibrating", len(recipe.resolved_stages) * (_PASSES + 1)) as progress:
        done = 0
        for stage in recipe.resolved_stages:
            rows = min(stage.train.micro_batch_size, stage.sequences_per_step)
            ids = np.random.default_rng(0).integers(0, int(target["vocab_size"]), (rows, stage.data.seq_len + 1))
            batch = Batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]))
            whole, passing = [], []
            for number in range(_PASSES + 1):
                started = time.perf_counter()
                loss, _, _ = objective(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels))
                loss.backward()
                loss.item()
                passing.append(time.perf_counter() - started)
                optimizer.zero_grad()
                started = time.perf_counter()
                train_step(objective, optimizer, batch, rows, lr=0.0, clip=1.0)
                whole.append(time.perf_counter() - started)
                done += 1
                progress.update(done, f"pass {number}")
            passes = stage.sequences_per_step / rows
            step = float(np.median(passing[1:])) * passes + max(float(np.median(whole[1:]) - np.median(passing[1:])), 0)
            seconds += stage.total_steps * step
    training = seconds * planned["models_trained"]
    speed = planned["flops"] / seconds
    evaluation = planned["seconds_by_part"]["evaluation"] * planned["peak_flops"] * planned["utilization"] / speed
    return planned | {
        "device": runtime.name,
        "precision": runtime.precision,
        "seconds": training + evaluation,
        "seconds_by_part": {"training": training, "evaluation": evaluation},
        "seconds_known_from": f"{_PASSES} passes measured here",
        "tokens_per_s": planned["num_tokens"] / seconds,
        "memory_measured_bytes": runtime.peak_memory(),
    }
