"""Learning from a teacher: how much of what it gives out goes into the student's loss, and when.

Source: Hinton, Vinyals and Dean, arXiv:1503.02531; hidden states: Sanh et al. (DistilBERT), arXiv:1910.01108, and Jiao
et al. (TinyBERT), arXiv:1909.10351.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.families import ModelShape
from scionlm.schedules import Schedule
from scionlm.train import hidden_loss
from scionlm.train.divergence import Name as DivergenceName
from scionlm.train.head_loss import HeadTargets
from scionlm.train.hidden_loss import LayerOutputs, States, hidden_error
from scionlm.train.teacher import Teacher


@dataclass(frozen=True)
class DistillSettings:
    """What is learned from a teacher.

    Attributes:
        weight: Share of the divergence in the loss; the rest is cross-entropy.
        schedule: Multiplier of `weight` and `hidden_weight` by finished steps of the run.
        divergence: Between the two distributions of the next token.
        temperature: Of both softmaxes.
        top_k: How many of the teacher's tokens are told apart; None tells all.
        hidden_weight: Of the hidden states' error, which is added to the loss.
        hidden_error: See `hidden_loss.hidden_error`.
        layers: Layer of the student to the layer of the teacher whose output it is to give.
    """

    weight: float
    schedule: Schedule
    divergence: DivergenceName = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None
    hidden_weight: float = 0.0
    hidden_error: hidden_loss.Name = "mse"
    layers: Mapping[int, int] | None = None


class Distillation(nn.Module):
    """A teacher's part in an objective; its parameters are the projections of hidden states, where widths differ.

    Args:
        student: The model that learns.
        teacher: The model that it learns from, made with the layers of `settings.layers`.
        settings: What it learns.
    """

    factor: torch.Tensor

    def __init__(self, student: PreTrainedModel, teacher: Teacher, settings: DistillSettings) -> None:
        super().__init__()
        self.teacher, self.settings = teacher, settings
        layers = settings.layers or {}
        self.outputs = LayerOutputs(student, list(layers))
        self.register_buffer("factor", torch.ones(()), persistent=False)
        self.is_active = True
        width = ModelShape.of(student.config.to_dict()).hidden_size
        self.projections = nn.ParameterDict()
        if width != teacher.hidden_size:
            for pair in layers.items():
                empty = torch.empty(teacher.hidden_size, width)
                self.projections[_name(*pair)] = nn.Parameter(nn.init.orthogonal_(empty))

    def at_step(self, step: int) -> None:
        """Take the weights of an update that `step` others came before."""
        factor = self.settings.schedule.at(step)
        self.factor.fill_(factor)
        self.is_active = factor > 0 and (self.settings.weight > 0 or self.settings.hidden_weight > 0)

    def head_targets(self, theirs: States) -> HeadTargets | None:
        """Return the teacher's side of the losses of the head; None where the divergence has no weight."""
        if not self.settings.weight:
            return None
        share = self.settings.weight * self.factor
        return HeadTargets(theirs.last.flatten(0, 1), self.teacher.weight, self.teacher.scaling, share)

    def hidden_loss(
        self, mine: States, theirs: States, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the weighted error of the hidden states and the bare one, summed over tokens; None without a weight.

        Args:
            mine: The student's states.
            theirs: The teacher's.
            counts: Which tokens count, `[sequences, length]`.
        """
        if not self.settings.hidden_weight:
            return None
        errors: list[torch.Tensor] = []
        for index, taught in (self.settings.layers or {}).items():
            states = mine.layers[index]
            if _name(index, taught) in self.projections:
                states = nn.functional.linear(states, self.projections[_name(index, taught)].to(states.dtype))
            errors.append(hidden_error(self.settings.hidden_error, states, theirs.layers[taught]))
        error = (torch.stack(errors).mean(0) * counts).sum()
        return self.settings.hidden_weight * self.factor * error, error.detach()


def _name(layer: int, taught: int) -> str:
    """Return the name of a projection: learned for other layers, it is another one."""
    return f"{layer}-{taught}"
