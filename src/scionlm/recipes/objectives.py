"""What a recipe minimizes of a model: the loss, its kernel of attention, its teacher and its masks put together."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from scionlm.parallel.runtime import Runtime
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_distill import DistillConfig
from scionlm.schedules import Schedule
from scionlm.train.distillation import Distillation, DistillSettings
from scionlm.train.gates.pruner import Pruner
from scionlm.train.objective import Objective
from scionlm.train.teacher import Teacher

_ATTENTION = {"sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention"}  # transformers'


def open_objective(
    recipe: Recipe,
    runtime: Runtime,
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    layers: Mapping[int, int],
    schedule: Schedule | None,
    pruner: Pruner | None = None,
) -> Objective:
    """Return what a recipe trains of a model.

    Args:
        recipe: It; a teacher counts where it has `distill`.
        runtime: Where all compute.
        model: The model, with float32 weights.
        teacher: The model that it learns from, in the type to compute in.
        layers: Layer of the model to the layer of the teacher, for what layers give out.
        schedule: Multiplier of the teacher's weights by finished steps; None where there is no teacher.
        pruner: The masks that are learned of the model.
    """
    train, distillation = recipe.train, None
    for each in (model, teacher):
        if each is not None and train.attention != "auto":
            each.set_attn_implementation(_ATTENTION[train.attention])
    if teacher is not None and recipe.distill is not None and schedule is not None:
        distillation = open_distillation(recipe.distill, schedule, model, teacher, layers, runtime)
    again = train.activation_checkpointing
    return Objective(model, runtime.compute_dtype, train.z_loss, distillation, again, runtime, pruner)


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
