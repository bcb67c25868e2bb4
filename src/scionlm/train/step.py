"""One optimizer step over one global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scionlm.data import Batch
from scionlm.data.mixing.windows import IGNORE
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What a step measured.

    Attributes:
        nll: Mean cross-entropy of its predicted tokens, nats.
        grad_norm: Gradient norm before clipping.
        num_tokens: Predicted tokens.
        sequence_nll: Summed cross-entropy of each sequence, nats.
        sequence_tokens: Predicted tokens of each.
        parts: Means of what the loss is made of beside cross-entropy, over its predicted tokens, by name.
        applied: Whether the weights were updated: not where the loss or a gradient is not finite.
    """

    nll: float
    grad_norm: float
    num_tokens: int
    sequence_nll: list[float]
    sequence_tokens: list[int]
    parts: dict[str, float]
    applied: bool


def micro_batches(batch: Batch, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield a batch in pieces of `size` sequences as (input_ids, labels), and position_ids where there are some."""
    arrays = [batch.input_ids, batch.labels, *([] if batch.position_ids is None else [batch.position_ids])]
    yield from zip(*(torch.from_numpy(array).split(size) for array in arrays), strict=True)


def train_step(
    objective: Objective, optimizer: Optimizer, batch: Batch, micro_batch_size: int, lr: float, clip: float
) -> StepResult:
    """Update the weights once, unless the loss or a gradient is not finite.

    Each token counts the same, whatever micro-batch it stands in: gradients are of the summed loss over the number of
    predicted tokens in the whole batch.
    """
    sequence_tokens = (batch.labels != IGNORE).sum(axis=1).tolist()
    num_tokens = sum(sequence_tokens)
    sums: dict[str, float] = {}
    loss_sum = 0.0
    sequence_nll: list[torch.Tensor] = []
    for arrays in micro_batches(batch, micro_batch_size):
        loss, _, extras = objective(*arrays)
        (loss / num_tokens).backward()
        loss_sum += float(loss.detach())
        sequence_nll.append(extras.pop("sequence_nll"))
        for name, part in extras.items():
            sums[name] = sums.get(name, 0.0) + float(part)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(optimizer.parameters, clip or math.inf))
    applied = math.isfinite(loss_sum) and math.isfinite(grad_norm)
    if applied:
        optimizer.step(lr)
    optimizer.zero_grad()
    by_sequence = torch.cat(sequence_nll).tolist()
    parts = {name: total / num_tokens for name, total in sums.items()}
    nll = (sum(by_sequence) if parts else loss_sum) / num_tokens
    return StepResult(nll, grad_norm, num_tokens, by_sequence, sequence_tokens, parts, applied)
