"""The teacher of a run: opened, matched layer by layer with the student, and made a part of the objective."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from scionlm.core.errors import UsageError
from scionlm.families import ModelShape
from scionlm.parallel.runtime import Runtime
from scionlm.recipes.config_distill import DistillConfig
from scionlm.schedules import Schedule
from scionlm.sources import ModelFolder
from scionlm.surgery.lineage import Origins
from scionlm.train.distillation import Distillation, DistillSettings
from scionlm.train.teacher import Teacher


def open_distillation(
    config: DistillConfig,
    schedule: Schedule,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Mapping[int, int],
    runtime: Runtime,
) -> Distillation:
    """Return a teacher's part in the objective.

    Args:
        config: Says what is learned.
        schedule: Multiplier of its weights by finished steps.
        student: The model that learns, on its device.
        teacher: The model that it learns from, in the type to compute in.
        layers: Layer of the student to the layer of the teacher, for what layers give out.
        runtime: Where both compute.
    """
    model: Any = teacher
    settings = DistillSettings(
        weight=config.weight,
        schedule=schedule,
        divergence=config.loss,
        temperature=config.temperature,
        top_k=config.top_k,
        hidden_weight=config.hidden.weight if config.hidden else 0.0,
        hidden_error=config.hidden.loss if config.hidden else "mse",
        layers=layers,
    )
    taught = Teacher(model.to(runtime.device), sorted(set(layers.values())))
    return Distillation(student, taught, settings).to(runtime.device)


def layer_map(config: DistillConfig, teacher: ModelFolder, origins: Origins) -> dict[int, int]:
    """Return which layer of the student learns from which of the teacher's.

    Args:
        config: Says how they are matched.
        teacher: The teacher.
        origins: Where the student's layers come from.

    Raises:
        UsageError: A layer is not there.
    """
    if config.hidden is None:
        return {}
    wanted, mine, theirs = config.hidden.layers, len(origins), ModelShape.of(teacher.config).num_hidden_layers
    if not isinstance(wanted, str):
        for layer, taught in wanted:
            if not (0 <= layer < mine and 0 <= taught < theirs):
                raise UsageError(
                    f"distill.hidden.layers [{layer}, {taught}]: the student has layers 0-{mine - 1}, the teacher "
                    f"0-{theirs - 1}"
                )
        return dict(wanted)
    known = [next((step["index"] for step in steps if step["name"] == teacher.name), None) for steps in origins]
    if wanted == "uniform" or not any(index is not None for index in known):
        return {layer: (layer + 1) * theirs // mine - 1 for layer in range(mine) if (layer + 1) * theirs >= mine}
    if wanted == "next":
        # What the next layer was made to read: the output of the layer before it in the teacher.
        known = [*(None if index is None else index - 1 for index in known[1:]), theirs - 1]
    return {layer: index for layer, index in enumerate(known) if index is not None and index >= 0}
