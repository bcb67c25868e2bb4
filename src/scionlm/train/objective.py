"""What is trained: a module that turns a batch into (loss_sum, num_tokens, extras).

The weights stay in float32. For a bf16 run each is cast on the way into the forward pass, inside the graph, so that
gradients arrive at the float32 weights and add up there: the same arithmetic as FSDP2's mixed precision, and on a CPU
faster than autocast, which leaves the residual stream in float32.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from scionlm.data.mixing.windows import IGNORE


class Objective(nn.Module):
    """Next-token cross-entropy of a model.

    Args:
        model: The model, with float32 weights.
        compute_dtype: Type of the forward and backward pass.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._compute_dtype = compute_dtype

    def token_nll(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return each label's negative log-likelihood, `[sequences, length]`, float32; 0 where it is ignored.

        Where `position_ids` begin anew, transformers keeps attention inside each part.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids.to(self.model.device), "use_cache": False}
        if position_ids is not None:
            arguments["position_ids"] = position_ids.to(self.model.device)
        if self._compute_dtype == torch.float32:
            logits = self.model(**arguments).logits
        else:
            weights = {name: p.to(self._compute_dtype) for name, p in self.model.named_parameters()}
            logits = functional_call(self.model, weights, kwargs=arguments).logits
        # In training the kernel computes the softmax in float32 without a float32 copy of the logits, and rounds only
        # the reported loss; in evaluation the loss itself is the result.
        logits = logits if torch.is_grad_enabled() else logits.float()
        nll = functional.cross_entropy(
            logits.flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=IGNORE, reduction="none"
        )
        return nll.float().view_as(labels)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss, the number of predicted tokens, and what else is worth knowing.

        The extras: `sequence_nll`, the summed loss of each sequence, `[sequences]`.
        """
        nll = self.token_nll(input_ids, labels, position_ids)
        return nll.sum(), (labels != IGNORE).sum(), {"sequence_nll": nll.detach().sum(dim=1)}
