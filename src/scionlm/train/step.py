"""One optimizer step over one global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scionlm.core.errors import DivergenceError
from scionlm.data import Batch
from scionlm.data.mixing.plan import IGNORE
from scionlm.train.objective import Objective


@dataclass(frozen=True)
class StepResult:
    """What a step measured: mean loss of its tokens in nats, gradient norm before clipping, predicted tokens."""

    nll: float
    grad_norm: float
    num_tokens: int


def micro_batches(batch: Batch, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a batch in pieces of `size` sequences as (input_ids, labels)."""
    ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    yield from zip(ids.split(size), labels.split(size), strict=True)


def train_step(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, micro_batch_size: int, lr: float, clip: float
) -> StepResult:
    """Update the weights once.

    Each token counts the same, whatever micro-batch it stands in: gradients are of the summed loss over the number of
    predicted tokens in the whole batch.

    Raises:
        DivergenceError: The loss or the gradient is not finite; the weights are left as they were.
    """
    num_tokens = int((batch.labels != IGNORE).sum())
    loss_sum = torch.zeros((), dtype=torch.float32)
    for input_ids, labels in micro_batches(batch, micro_batch_size):
        loss, _ = objective(input_ids, labels)
        (loss / num_tokens).backward()
        loss_sum += loss.detach().cpu()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf))
    nll = float(loss_sum) / num_tokens
    if not (math.isfinite(nll) and math.isfinite(grad_norm)):
        optimizer.zero_grad()
        raise DivergenceError(f"loss {nll}, gradient norm {grad_norm}: not finite")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(nll, grad_norm, num_tokens)
