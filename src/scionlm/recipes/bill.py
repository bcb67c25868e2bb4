"""What a plan comes to beside memory and time: passes over the text, room on the disk, device hours and their price."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scionlm.core.duration import Duration
from scionlm.core.errors import ScionError
from scionlm.core.records import Record
from scionlm.data import DataFolder
from scionlm.recipes.config import Recipe
from scionlm.recipes.order import sampling_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HOUR = 3600


def epochs_of(recipe: Recipe) -> dict[str, float]:
    """Return how often a recipe goes through the training part of each domain, as far as that is known beforehand.

    Weights that follow the losses are taken as they begin, and what is replayed is left out. Empty where the text is
    not there yet.
    """
    found: dict[str, float] = {}
    for stage in recipe.resolved_stages:
        try:
            if stage.data.dir is None:
                return {}
            data = DataFolder(Path(stage.data.dir))
            sampling = sampling_of(stage.model_copy(update={"replay": None}), data, recipe.seed, Path())
        except ScionError:  # a plan may be made before the text is
            return {}
        demand = sampling.mixture.demand()
        slots = stage.total_steps * stage.sequences_per_step
        share = 1 - (stage.replay.fraction if stage.replay else 0.0)
        for index, name in enumerate(sampling.domains):
            windows = share * float(demand.total(index, slots)) / demand.scale
            tokens = windows * stage.data.seq_len
            found[name] = found.get(name, 0.0) + tokens / data.num_tokens(name, "train")
    return found


def disk_bytes(recipe: Recipe, source: Mapping[str, Any], checkpoint: int, parameters: int, seconds: float) -> int:
    """Return the bytes that training one model has on the disk at the most: its checkpoints and the model.

    Args:
        recipe: The recipe.
        source: The source's `config.json`, for the type of the weights.
        checkpoint: Bytes of a checkpoint.
        parameters: How many the model has.
        seconds: How long it is trained.
    """
    config = recipe.checkpoint
    every = Duration.parse(config.every)
    if every.unit == "seconds":
        saves = seconds / every.amount
    else:
        saves = recipe.total_steps / max(recipe.steps(config.every), 1)
    for_good = recipe.total_steps // max(recipe.steps(config.keep_every), 1) if config.keep_every else 0
    ends = len(recipe.resolved_stages)  # of stages; they stay
    kept = min(config.keep, math.ceil(saves)) + ends + for_good
    dtype = recipe.export.dtype
    if dtype == "source":
        dtype = str(source.get("dtype") or source.get("torch_dtype") or "float32")
    return kept * checkpoint + parameters * _BYTES.get(dtype, 4)


def with_price(planned: Record, price: float | None) -> Record:
    """Return a plan with `device_hours`, and `cost` where the price of a device's hour is known."""
    hours = planned["seconds"] * planned.get("devices", 1) / _HOUR
    cost = {} if price is None else {"price_per_device_hour": price, "cost": hours * price}
    return planned | {"device_hours": hours} | cost
