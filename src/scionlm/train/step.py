"""One optimizer step over one global batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scionlm.data import Batch, Sample, SamplePlan
from scionlm.data.mixing.windows import IGNORE
from scionlm.parallel.placing import gradient_norm
from scionlm.parallel.ranks import Ranks
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer

_TINY = 1e-6  # what torch's clipping adds to the norm


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


def _on_gpu(arrays: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Have a GPU fetch tensors while others are computed with; a CPU's are there."""
    if device.type != "cuda":
        return arrays
    return tuple(array.pin_memory().to(device, non_blocking=True) for array in arrays)


def own_batch(plan: SamplePlan, samples: list[Sample], ranks: Ranks) -> Batch:
    """Return a rank's share of a step's samples, as many sequences as every other rank has.

    Where they do not come out even, the last ranks repeat a sequence of which nothing is predicted: what is trained on
    does not depend on the number of devices.
    """
    mine, rows = ranks.block_of(samples)
    batch = plan.batch(list(mine) or samples[:1])
    if len(mine) == rows:
        return batch
    taken = [*range(len(mine)), *[0] * (rows - len(mine))]
    labels = batch.labels[taken]
    labels[len(mine) :] = IGNORE
    positions = batch.position_ids
    return Batch(batch.input_ids[taken], labels, None if positions is None else positions[taken])


def train_step(
    objective: Objective, optimizer: Optimizer, batch: Batch, micro_batch_size: int, lr: float, clip: float
) -> StepResult:
    """Update the weights once, unless the loss or a gradient is not finite.

    Each token counts the same, whatever micro-batch and rank it is in: gradients are of the summed loss over the number
    of predicted tokens in the whole batch, which all ranks hold together, each as many sequences as the others.
    """
    trained = objective.trained
    ranks = trained.ranks
    mine = (batch.labels != IGNORE).sum(axis=1).tolist()
    num_tokens = sum(ranks.gather(sum(mine)))
    losses: list[torch.Tensor] = []
    parts: dict[str, list[torch.Tensor]] = {}
    pieces = [_on_gpu(arrays, objective.model.device) for arrays in micro_batches(batch, micro_batch_size)]
    for number, arrays in enumerate(pieces):
        objective.at_row(ranks.rank * len(mine) + number * micro_batch_size)
        with trained.passing(last=number == len(pieces) - 1):
            loss, _, extras = trained(*arrays)
            (loss * ranks.world / num_tokens).backward()  # what the ranks have is averaged
        losses.append(loss.detach())
        for name, part in extras.items():
            parts.setdefault(name, []).append(part)
    norm = gradient_norm(optimizer.parameters)
    sequences = parts.pop("sequence_nll")
    sums = {"loss": losses} | parts
    # All at once: each look at a single number would have a GPU run dry.
    together = [norm.view(1), *(torch.stack(values).view(-1) for values in sums.values()), *sequences]
    grad_norm, *numbers = torch.cat([tensor.double() for tensor in together]).tolist()
    own = {name: sum(numbers[i * len(pieces) : (i + 1) * len(pieces)]) for i, name in enumerate(sums)}
    by_sequence = numbers[len(sums) * len(pieces) :]
    found = ranks.gather({"norm": grad_norm, "sums": own, "nll": by_sequence, "tokens": mine})
    totals = {name: sum(other["sums"][name] for other in found) for name in own}
    loss_sum = totals.pop("loss")
    grad_norm = found[0]["norm"]  # the main rank's word: last bits may differ, and what they decide must not
    applied = math.isfinite(loss_sum) and math.isfinite(grad_norm)
    if applied:
        optimizer.step(lr, max((grad_norm + _TINY) / clip, 1.0) if clip else 1.0)
    optimizer.zero_grad()
    if objective.pruner:
        objective.pruner.update(ranks) if applied else objective.pruner.skip()
    nlls = [nll for other in found for nll in other["nll"]]
    sequence_tokens = [tokens for other in found for tokens in other["tokens"]]
    means = {name: total / num_tokens for name, total in totals.items()}
    nll = (sum(nlls) if means else loss_sum) / num_tokens
    return StepResult(nll, grad_norm, num_tokens, nlls, sequence_tokens, means, applied)
