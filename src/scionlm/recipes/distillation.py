"""The teacher of a run, made a part of the objective."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from scionlm.parallel.runtime import Runtime
from scionlm.recipes.config_distill import DistillConfig
from scionlm.schedules import Schedule
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
        student: The model that learns.
        teacher: The model that it learns from, in the type to compute in.
        layers: Layer of the student to the layer of the teacher, for what layers give out.
        runtime: Where both compute.
    """
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
    taught = Teacher(teacher, sorted(set(layers.values())), runtime)
    return Distillation(student, taught, settings)
