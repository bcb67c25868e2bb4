"""The teacher: a model that looks at the student's tokens and never changes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from scionlm.families import ModelShape
from scionlm.families.logits import LogitScaling, logit_scaling
from scionlm.families.models import layers_of
from scionlm.parallel.placing import place, release
from scionlm.parallel.runtime import Runtime, Stopwatch
from scionlm.train.attention import use_causal_attention
from scionlm.train.head_loss import head_of
from scionlm.train.hidden_loss import LayerOutputs, States
from scionlm.train.layers import compile_layers


class Teacher:
    """A frozen model; no module of the student's, so that nothing that is done to those reaches it.

    Args:
        model: The teacher, with weights in the type to compute in.
        layers: Of which layers the outputs are wanted.
        runtime: Where to put it; None leaves it where it is.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = (), runtime: Runtime | None = None) -> None:
        model.requires_grad_(False).eval()
        self._model = model
        self._body: Any = _Body(model)
        if runtime:
            place(self._body, layers_of(model), runtime, stays=True)
        use_causal_attention(model)
        config = model.config.to_dict()
        self.hidden_size = ModelShape.of(config).hidden_size
        self.scaling: LogitScaling = logit_scaling(config)
        self._outputs = LayerOutputs(model, layers)
        self._watch = Stopwatch()

    @property
    def seconds(self) -> float:
        """The time that its passes have taken."""
        return self._watch.seconds

    @property
    def weight(self) -> torch.Tensor:
        """The head, `[vocab, hidden]`; of shared weights there after a call."""
        return head_of(self._model).detach()

    def compile(self) -> None:
        """Compile its layers."""
        compile_layers(layers_of(self._model))

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> States:
        """Return what the teacher makes of tokens; its head turns that into logits a chunk at a time.

        The time that it takes is added to `seconds`.
        """
        device = self._model.device
        positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
        with torch.no_grad(), self._watch.timing(device):
            hidden = self._body(input_ids.to(device), **positions)
        return States(hidden, self._outputs.take())

    def release(self) -> None:
        """Give its memory back now; it cannot be asked any more."""
        release(self._body)


class _Body(nn.Module):
    """A model without its head's product, but with its head's weight."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        body: Any = self.model.base_model
        return body(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
