"""The teacher: a model that looks at the student's tokens and never changes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.families import ModelShape
from scionlm.families.logits import LogitScaling, logit_scaling
from scionlm.train.head_loss import head_of
from scionlm.train.hidden_loss import LayerOutputs, States


class Teacher:
    """A frozen model; no module of the student's, so that nothing that is done to those reaches it.

    Args:
        model: The teacher, with weights in the type to compute in, on its device.
        layers: Of which layers the outputs are wanted.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        model.requires_grad_(False).eval()
        self._body: Any = model.base_model
        self.weight = head_of(model).detach()
        config = model.config.to_dict()
        self.hidden_size = ModelShape.of(config).hidden_size
        self.scaling: LogitScaling = logit_scaling(config)
        self._outputs = LayerOutputs(model, layers)
        self.seconds = 0.0

    def compile(self) -> None:
        """Compile its forward pass."""
        self._body = torch.compile(self._body)

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> States:
        """Return what the teacher makes of tokens; its head turns that into logits a chunk at a time.

        The time that it takes is added to `seconds`.
        """
        device = self.weight.device
        started = time.perf_counter()
        positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
        with torch.no_grad():
            hidden = self._body(input_ids=input_ids.to(device), use_cache=False, **positions).last_hidden_state
        if hidden.is_cuda:
            hidden[0, 0, 0].item()  # waits for it: the time is that of the work, and not of handing it over
        self.seconds += time.perf_counter() - started
        return States(hidden, self._outputs.take())
