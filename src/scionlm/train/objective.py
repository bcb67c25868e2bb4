"""What is trained: a module that turns a batch into (loss_sum, num_tokens, extras).

The weights stay in float32. For a bf16 run each is cast on the way into the forward pass, inside the graph, so that
gradients arrive at the float32 weights and add up there: the same arithmetic as FSDP2's mixed precision, and on a CPU
faster than autocast, which leaves the residual stream in float32. The model's own head is not called: its weight is
used where the losses are made, chunk by chunk (`head_loss`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from scionlm.data.mixing.windows import IGNORE
from scionlm.families import family_of
from scionlm.families.logits import logit_scaling
from scionlm.families.models import layers_of
from scionlm.parallel.placing import Trained, place, release
from scionlm.parallel.runtime import Runtime
from scionlm.train.attention import use_causal_attention
from scionlm.train.distillation import Distillation
from scionlm.train.gates.pruner import Pruner
from scionlm.train.head_loss import HeadSettings, head_losses, head_of
from scionlm.train.hidden_loss import States
from scionlm.train.layers import Checkpointing, compile_layers, layerwise

Extras = dict[str, torch.Tensor]
FROM_TEACHER = ("divergence_nats", "hidden_error_ratio")
"""Parts of the loss that a teacher adds."""
PROJECTIONS = "projections."
"""Begins the name of what is trained beside the model."""


class Objective(nn.Module):
    """Next-token cross-entropy of a model, with what a teacher adds to it.

    Args:
        model: The model, with float32 weights.
        compute_dtype: Type of the forward and backward pass.
        z_loss: Weight of the squared logarithm of the softmax's normalizer.
        distillation: A teacher's part.
        checkpointing: What of the layers' activations is made again on the way back; see `layers.layerwise`.
        runtime: Where to put it; None leaves it where it is.
        pruner: The masks that are learned of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute_dtype: torch.dtype,
        z_loss: float = 0.0,
        distillation: Distillation | None = None,
        checkpointing: Checkpointing = "none",
        runtime: Runtime | None = None,
        pruner: Pruner | None = None,
    ) -> None:
        super().__init__()
        self.model, self.distillation, self.pruner = model, distillation, pruner
        self._first_row = 0
        self._compute_dtype = compute_dtype
        self._layers = layers_of(model)
        self._inside = family_of(model.config.to_dict()).layers.removeprefix(f"{model.base_model_prefix}.") + "."
        self._settings = HeadSettings(logit_scaling(model.config.to_dict()), z_loss)
        if distillation:
            own = distillation.settings
            self._settings = replace(
                self._settings, divergence=own.divergence, temperature=own.temperature, top_k=own.top_k
            )
        self._head_losses = head_losses
        several, shared = (runtime.ranks.world > 1, runtime.shards > 1) if runtime else (False, False)
        self._checkpointing: Checkpointing = checkpointing
        self._casts = compute_dtype != torch.float32 and not shared
        self._layerwise = False
        if several or checkpointing != "none":
            self._go_layerwise()
        if runtime:
            place(self, self._layers, runtime, compute_dtype, ("token_nll",))
        use_causal_attention(model)
        self.trained = Trained(self, runtime)

    def _go_layerwise(self) -> None:
        self._layerwise = True
        layerwise(self._layers, self._compute_dtype if self._casts else None, self._checkpointing)

    @property
    def projections(self) -> dict[str, nn.Parameter]:
        """What is trained beside the model and is no part of it, by name."""
        if self.distillation is None:
            return {}
        return {f"{PROJECTIONS}{name}": p for name, p in self.distillation.projections.named_parameters()}

    @property
    def teacher_seconds(self) -> float:
        """The time that the teacher has taken so far."""
        return self.distillation.teacher.seconds if self.distillation else 0.0

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers of student and teacher, one by one, and on a GPU the losses.

        transformers finds out what kind of attention a batch needs outside of what is compiled: inside it would always
        hand over a mask. On a CPU the losses stay as they are written: a compiler would undo the blocks that a cache
        holds, and go through memory several times more.
        """
        if not self._layerwise:
            self._go_layerwise()
        compile_layers(self._layers, *args, **kwargs)
        if self.model.device.type != "cpu":
            self._head_losses = torch.compile(head_losses, *args, **kwargs)
        if self.distillation:
            self.distillation.teacher.compile()

    def release(self) -> None:
        """Give the memory of model and teacher back now; neither can be used any more."""
        release(self)
        if self.distillation:
            self.distillation.teacher.release()

    def at_step(self, step: int) -> None:
        """Take the weights and masks of an update that `step` others came before."""
        if self.distillation:
            self.distillation.at_step(step)
        if self.pruner:
            self.pruner.at_step(step)

    def at_row(self, row: int) -> None:
        """Take the place in the global batch of the first sequence of the pass to come: masks are drawn by it."""
        self._first_row = row

    def token_nll(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return each label's negative log-likelihood, `[sequences, length]`, float32; 0 where it is ignored.

        Where `position_ids` begin anew, transformers keeps attention inside each part.
        """
        if self.pruner:
            self.pruner.settle()
        # Windows are of other lengths than training sequences: not worth compiling for.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            states = self._states(input_ids, position_ids)
            labels = labels.to(states.last.device)
            found = head_losses(states.last.flatten(0, 1), self._head, labels.flatten(), self._settings)
        return found.nll.float().view_as(labels)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Extras]:
        """Return the summed loss, the number of predicted tokens, and what else is worth knowing.

        The extras: `sequence_nll`, the summed cross-entropy of each sequence, `[sequences]`; and, summed over tokens,
        what there is of `divergence_nats`, `hidden_error_ratio`, `z_loss_nats`, and `loss_nats` where the loss is not
        cross-entropy alone.
        """
        taught = None
        if self.pruner:
            self.pruner.draw(self._first_row)
        if self.distillation and self.distillation.is_active:
            taught = self.distillation.teacher(input_ids, position_ids)
        return self._losses(input_ids, labels, position_ids, taught)

    @property
    def _head(self) -> torch.Tensor:
        return head_of(self.model)

    def _states(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> States:
        body: Any = self.model.base_model
        arguments: dict[str, Any] = {"input_ids": input_ids.to(self.model.device), "use_cache": False}
        if position_ids is not None:
            arguments["position_ids"] = position_ids.to(self.model.device)
        if not self._casts:
            last = body(**arguments).last_hidden_state
        else:
            own = [(n, p) for n, p in body.named_parameters() if not (self._layerwise and n.startswith(self._inside))]
            weights = {name: p.to(self._compute_dtype) for name, p in own}
            last = functional_call(body, weights, kwargs=arguments).last_hidden_state
        return States(last, self.distillation.outputs.take() if self.distillation else {})

    def _losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None, taught: States | None
    ) -> tuple[torch.Tensor, torch.Tensor, Extras]:
        mine = self._states(input_ids, position_ids)
        labels = labels.to(mine.last.device)
        targets = hidden = None
        if self.distillation and taught:
            targets = self.distillation.head_targets(taught)
            hidden = self.distillation.hidden_loss(mine, taught, labels != IGNORE)
        found = self._head_losses(mine.last.flatten(0, 1), self._head, labels.flatten(), self._settings, targets)
        loss = found.loss
        extras = {"sequence_nll": found.nll.view_as(labels).sum(dim=1)}
        if targets:
            extras["divergence_nats"] = found.divergence
        if hidden:
            loss = loss + hidden[0]
            extras["hidden_error_ratio"] = hidden[1]
        if self._settings.z_loss:
            extras["z_loss_nats"] = found.z_loss
        if len(extras) > 1:
            extras["loss_nats"] = loss.detach()
        return loss, (labels != IGNORE).sum(), extras
