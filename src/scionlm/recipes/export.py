"""`scion export`: a checkpoint of a run, finished or not, as a plain Hugging Face model folder."""

from pathlib import Path
from typing import Any

import torch

from scionlm.core.config import dump_yaml, load_yaml, validate
from scionlm.core.errors import UsageError
from scionlm.core.files import staged_folder
from scionlm.families.models import random_model
from scionlm.recipes.card import front_matter
from scionlm.recipes.child import control_recipe
from scionlm.recipes.config import Recipe
from scionlm.recipes.inputs import open_teacher
from scionlm.recipes.origin import open_source
from scionlm.recipes.pruned import PRUNE
from scionlm.recipes.rounds import CONTROL
from scionlm.recipes.selection import plan_of, recorded_plan
from scionlm.recipes.training import average_in, export_type, provenance_of
from scionlm.sources import open_folder
from scionlm.surgery.export import save_model
from scionlm.surgery.proof import Proof
from scionlm.surgery.target import target_config
from scionlm.surgery.verify import verify_export
from scionlm.train.checkpoint import Checkpoint, CheckpointStore, find_checkpoint, open_checkpoint

_CARD = """---
{front}---
# {name}, step {steps}

A checkpoint of a training run of Scion: {layers} layers of **{source}**{random}, {weights}. `provenance.json` says
what was made from what.
"""


def export_checkpoint(run: Path, out: Path, step: int | None, last: int, averaged: bool) -> Path:
    """Write a checkpoint as a model folder; see `scionlm.api.export`."""
    newest = find_checkpoint(run, step)
    folder = newest.path.parent.parent  # RUN/checkpoints/step-N
    home = next((place for place in (folder, *folder.parents[:2]) if (place / "config.yaml").exists()), None)
    if home is None:
        raise UsageError(f"{folder} has no config.yaml: not a run folder")
    recipe = validate(Recipe, load_yaml(home / "config.yaml"), str(home / "config.yaml"))
    source = open_source(recipe, home)
    if folder == home / CONTROL:
        recipe = control_recipe(recipe, source)
    elif folder.parent == home / PRUNE and (before := _step_before(folder)) is not None:
        source = open_folder(before / "model", source.name)
    plan = recorded_plan(folder) or plan_of(recipe, source)  # a run of before has none, and nothing was measured
    model: Any = random_model(target_config([source.config], plan), recipe.seed)
    steps = _put_weights(model, newest, recipe, last, averaged)
    how = "the average that the run kept" if averaged else "the mean of these" if len(steps) > 1 else "as they were"
    names = ", ".join(map(str, steps))
    front = dump_yaml(front_matter(source.license, source.base_model))
    told = {"steps": names, "layers": len(plan.keep), "source": source.name, "weights": how}
    told["random"] = " in shape, from random weights" if recipe.from_random else ""
    card = _CARD.format(front=front, name=folder.name, **told)
    facts = {"run": folder.name, "steps": steps, "averaged": averaged}
    dtype = export_type(recipe, source)
    provenance = provenance_of(recipe, source, plan, open_teacher(recipe, source, weights=False))
    with staged_folder(out) as stage:
        save_model(model, stage, source, plan, card, provenance | {"checkpoint": facts}, dtype)
        verify_export(model, stage, Proof(), dtype)
    return out


def _step_before(folder: Path) -> Path | None:
    """Return the folder of the step of pruning whose model this one began with; None for the first."""
    number = int(folder.name.removeprefix("step-"))
    return folder.with_name(f"step-{number - 1:02d}") if number > 1 else None


def _put_weights(model: torch.nn.Module, newest: Checkpoint, recipe: Recipe, last: int, averaged: bool) -> list[int]:
    """Put what is asked for into the model; return the steps that it comes from."""
    if averaged and last > 1:
        raise UsageError("--averaged takes the run's own average; leave --last out")
    newest.load_weights(model)
    if averaged:
        mean = average_in(recipe, newest)
        if mean is None:
            raise UsageError(f"{newest.path} holds no average, or none yet: the recipe's `average` section makes one")
        _copy(model, mean)
        return [newest.state["step"]]
    paths = CheckpointStore(newest.path.parent, keep=1).all()
    chosen = paths[: paths.index(newest.path) + 1][-last:]
    if len(chosen) < last:
        raise UsageError(f"--last {last}: there are {len(chosen)} checkpoints up to step {newest.state['step']}")
    mean = {name: p.detach().double() / last for name, p in model.named_parameters()}
    for path in chosen[:-1]:
        for name, weights in open_checkpoint(path).tensors("weights").items():
            mean[name] += weights.double() / last
    if last > 1:
        _copy(model, mean)
    return [open_checkpoint(path).state["step"] for path in chosen]


@torch.no_grad()
def _copy(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
