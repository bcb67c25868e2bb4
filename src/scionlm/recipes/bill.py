"""What a plan comes to beside memory and time: passes over the text, room on the disk, device hours and their price."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from scionlm.core.duration import Duration
from scionlm.core.records import Record
from scionlm.data import DataFolder
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_distill import SOURCE
from scionlm.recipes.demo_data import DEMO_DOMAINS
from scionlm.recipes.order import sampling_of
from scionlm.recipes.stages import Stage

Config = dict[str, Any]
Part = Literal["model", "pruning", "control"]
"""What a model is in its run: what comes out, a step on the way there, or what that is compared with."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_HOUR = 3600


def epochs_of(recipe: Recipe, rounds: int = 1) -> dict[str, float]:
    """Return how often a recipe goes through the training part of each domain, as far as that is known beforehand.

    Weights that follow the losses are taken as they begin, and what is replayed is left out. Empty where the text is
    not there yet.

    Args:
        recipe: The recipe.
        rounds: How many times it goes on with its stages, on other text each time: rounds of a student that grows.

    Raises:
        UsageError: A domain is not there.
        DataError: The data folder is broken.
    """
    found: dict[str, float] = {}
    for stage in [*recipe.trained_stages, *recipe.resolved_stages * (rounds - 1)]:
        if stage.data.dir is None or not (Path(stage.data.dir) / "index.json").exists():
            return {}  # a plan may be made before the text is
        data = DataFolder(Path(stage.data.dir))
        sampling = sampling_of(stage.model_copy(update={"replay": None}), data, recipe.seed, Path())
        demand = sampling.mixture.demand()
        slots = stage.total_steps * stage.sequences_per_step
        share = 1 - (stage.replay.fraction if stage.replay else 0.0)
        for index, name in enumerate(sampling.domains):
            windows = share * float(demand.total(index, slots)) / demand.scale
            tokens = windows * stage.data.seq_len
            found[name] = found.get(name, 0.0) + tokens / data.num_tokens(name, "train")
    return found


def text_sizes(recipe: Recipe) -> dict[str, int]:
    """Return the training tokens of every domain that a recipe draws from; empty where its stages have other ones."""
    asked = {(stage.data.dir, _drawn_from(stage)) for stage in recipe.trained_stages}
    place, names = next(iter(asked))
    if len(asked) > 1 or place is None or not (Path(place) / "index.json").exists():
        return {}
    data = DataFolder(Path(place))
    return {name: data.num_tokens(name, "train") for name in names or data.domains}


def _drawn_from(stage: Stage) -> tuple[str, ...]:
    """Return the domains that a stage names; none where it takes all."""
    start = stage.data.ramp.start if stage.data.ramp else {}
    return tuple({**stage.data.mixture, **start}) if stage.data.mixture else ()


def evaluated_tokens(
    recipe: Recipe, source: Config, target: Config, with_source: bool, part: Part = "model"
) -> list[tuple[Config, int]]:
    """Return how many held-out tokens go through which models while one is trained.

    Losses are measured at the start, on the way and at the end, those of the source once. Where rounds are compared
    with the source, each is measured once more on the text that decides; where weights of domains move, a model is
    measured at each move; what is pruned is measured once more before its recovery. A control, which decides nothing,
    is measured at its start, on its way and at its end alone.

    Args:
        recipe: The recipe.
        source: The source's `config.json`.
        target: The model's.
        with_source: Count the source's own.
        part: What of the run the model is.
    """
    every, stages = recipe.steps(recipe.evaluate.every), recipe.resolved_stages
    times = 2 + (math.ceil(recipe.total_steps / every) - 1 if every else 0) + len(stages) - 1
    if recipe.evaluates_densely:
        times += sum(min(every or stage.total_steps, stage.total_steps).bit_length() for stage in stages)
    domains = list(_held_out(recipe).values())
    once = _within(domains, recipe.evaluate.tokens_per_domain)
    deciding = 0 if recipe.grow is None else _within(domains, recipe.grow.tokens_per_domain)
    references = {
        stage.reweight.tokens_per_domain for stage in stages if stage.reweight and stage.reweight.reference == SOURCE
    }
    others = sum(_within(domains, budget) for budget in references - {recipe.evaluate.tokens_per_domain})
    of_source = (once + deciding + others) if with_source and recipe.recipe != "scratch" else 0
    own = (1 + recipe.control) * times * once
    if part != "control":
        own += deciding + sum(_moving_tokens(stage, part == "pruning") for stage in stages)
    if recipe.prune is not None and part == ("pruning" if recipe.prune.method == "masks" else "model"):
        own += once  # under masks, or as it was cut
    return [(target, own), (source, of_source)]


def _moving_tokens(stage: Stage, hands_on: bool) -> int:
    """Return the held-out tokens that a stage measures to move the weights of its domains, for what follows it too."""
    if stage.reweight is None:
        return 0
    moves = (stage.total_steps - (not hands_on)) // max(stage.steps(stage.reweight.every), 1)
    domains = _tokens_of(stage.data.dir, list(stage.data.mixture or []))
    return moves * _within(list(domains.values()), stage.reweight.tokens_per_domain)


def _within(domains: list[int | None], budget: int | None) -> int:
    """Return the tokens of all domains, at most `budget` of each; nothing where neither is known."""
    return sum(min(known for known in (there, budget) if known is not None) for there in domains if there or budget)


def _held_out(recipe: Recipe) -> dict[tuple[str, str], int | None]:
    """Return the held-out tokens of every domain that is evaluated, None where there is no text yet."""
    asked = [(stage.data.dir, list(stage.data.mixture or [])) for stage in recipe.trained_stages]
    if recipe.upstream is not None:
        asked.append((recipe.upstream.dir or recipe.data.dir, recipe.upstream.domains or []))
    elif recipe.recipe == "continual" and recipe.replay is not None and recipe.replay.run is None:
        asked.append((recipe.replay.data or recipe.data.dir, recipe.replay.domains or []))
    return {key: tokens for place, names in asked for key, tokens in _tokens_of(place, names).items()}


def _tokens_of(place: str | None, names: list[str]) -> dict[tuple[str, str], int | None]:
    """Return the held-out tokens of domains of a data folder, of all where none is named."""
    data = DataFolder(Path(place)) if place and (Path(place) / "index.json").exists() else None
    found: dict[tuple[str, str], int | None] = {}
    for name in names or (data.domains if data else DEMO_DOMAINS if place is None else [""]):
        there = data is not None and name in data.domains
        found[place or "", name] = data.num_tokens(name, "held_out") if data and there else None
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
