"""The losses that need logits, without all of them being there at once.

The head turns the last hidden states into logits a chunk of tokens at a time; while a chunk's are there, both the loss
and its gradient are taken from them, and only the gradients of hidden states and head are kept. So memory grows with
the chunk and not with the batch, and nothing is computed twice. What lies between the two matrix products goes by
blocks of rows that a processor's cache holds.

Each token's loss is

    (1 - share) * nll + share * T**2 * divergence(p_T, q_T) + z_loss * log(Z)**2

with p_T and q_T the softmax of student's and teacher's logits over the temperature T, and Z the normalizer of the
student's own softmax. The squared T keeps the size of the gradient (Hinton et al., arXiv:1503.02531); the z-loss keeps
logits from drifting (Chowdhery et al., PaLM, arXiv:2204.02311, section 5).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from scionlm.core.devices import cpu_flags
from scionlm.data.mixing.windows import IGNORE
from scionlm.families.logits import BLOCK_BYTES, CHUNK_BYTES, LogitScaling
from scionlm.train.divergence import Name, Softmax, divergence, softmax_of

_TURNED = "amx_bf16" in cpu_flags()
_ALIGNED = 64
"""Columns that begin within a line of the cache are multiplied slower, up to a sixth (docs/results/speed.md)."""


@dataclass(frozen=True)
class HeadSettings:
    """What a token's loss is made of.

    Attributes:
        scaling: What the student does to its logits.
        z_loss: Weight of the squared logarithm of the normalizer.
        divergence: Between teacher and student.
        temperature: Of both softmaxes in the divergence.
        top_k: See `divergence.divergence`.
    """

    scaling: LogitScaling
    z_loss: float = 0.0
    divergence: Name = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None


class HeadTargets(NamedTuple):
    """The teacher's side.

    Attributes:
        hidden: Its last hidden states of the same tokens, `[tokens, its hidden size]`.
        weight: Its head, `[its vocab, its hidden size]`.
        scaling: What it does to its logits.
        share: Of the divergence in the loss, a tensor of no dimension.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    scaling: LogitScaling
    share: torch.Tensor


class HeadLosses(NamedTuple):
    """What `head_losses` returns.

    Attributes:
        loss: Summed over tokens, what is trained on.
        nll: Each token's, `[tokens]`, float32, without gradient; 0 where it is ignored.
        divergence: Summed, times the squared temperature, without share and gradient; 0 without a teacher.
        z_loss: Summed, weighted, without gradient.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    divergence: torch.Tensor
    z_loss: torch.Tensor


def head_of(model: PreTrainedModel) -> torch.Tensor:
    """Return the weight of a model's head, `[vocab, hidden]`."""
    head: Any = model.get_output_embeddings()
    return head.weight


def head_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    settings: HeadSettings,
    targets: HeadTargets | None = None,
) -> HeadLosses:
    """Return the losses of tokens.

    Args:
        hidden: Last hidden states, `[tokens, hidden]`; their type is what is multiplied in.
        weight: The head, `[vocab, hidden]`, in its own type, in which its gradient adds up.
        labels: `[tokens]`.
        settings: What the loss is made of.
        targets: The teacher's side; without one the loss is cross-entropy.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return HeadLosses(*_HeadLosses.apply(hidden, weight, labels, settings, *(targets or (None,) * 4)))
    found, _, _ = _through_chunks(hidden, weight, labels, settings, targets, gradients=(False, False))
    return found


class _HeadLosses(torch.autograd.Function):
    """The losses, with gradients that are made on the way forward; the way back can be gone once.

    There they are scaled in place: a copy of the head's gradient would take longer than the scaling.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        hidden, weight, labels, settings, *teacher = arguments
        targets = None if teacher[0] is None else HeadTargets(*teacher)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        found, of_hidden, of_weight = _through_chunks(hidden, weight, labels, settings, targets, wanted)
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.mark_non_differentiable(found.nll, found.divergence, found.z_loss)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = torch.Tensor.mul if torch.compiler.is_compiling() else torch.Tensor.mul_
        found = (saved if saved is None else scaled(saved, gradients[0]) for saved in ctx.saved_tensors)
        return *found, *(None,) * 6


def _through_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    settings: HeadSettings,
    targets: HeadTargets | None,
    gradients: tuple[bool, bool],
) -> tuple[HeadLosses, torch.Tensor | None, torch.Tensor | None]:
    """Return the losses, and the gradients of hidden states and head where they are wanted."""
    cast = weight.to(hidden.dtype)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    of_hidden = torch.empty_like(hidden) if gradients[0] else None
    of_weight = None
    found: list[torch.Tensor] = []
    rows = _even(len(hidden), CHUNK_BYTES // (len(weight) * hidden.element_size()))
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        logits = hidden[chunk] @ cast.T
        teacher = None if targets is None else targets.hidden[chunk] @ targets.weight.T
        block = rows if hidden.is_cuda or torch.compiler.is_compiling() else BLOCK_BYTES // (len(weight) * 4)
        block = max(min(block, rows), 1)
        for first in range(0, len(logits), block):
            part = slice(first, first + block)
            theirs = None if teacher is None else teacher[part]
            losses, gradient = _losses_of(logits[part], labels[chunk][part], settings, targets, theirs, exact)
            found.append(losses)
            if gradients != (False, False):
                logits[part] = gradient
        if of_hidden is not None:
            of_hidden[chunk] = logits @ cast
        if gradients[1]:
            of_weight = _add_head_gradient(of_weight, logits, hidden[chunk], exact)
    if gradients[1]:
        of_weight = torch.zeros_like(weight) if of_weight is None else of_weight.to(weight.dtype)
    nll, diverged, z_loss, loss = torch.cat(found, dim=1) if found else torch.zeros(4, 0, dtype=exact)
    return HeadLosses(loss.sum(), nll, diverged.sum(), z_loss.sum()), of_hidden, of_weight


def _add_head_gradient(
    found: torch.Tensor | None, gradient: torch.Tensor, hidden: torch.Tensor, exact: torch.dtype
) -> torch.Tensor:
    """Add the head's gradient from some tokens, `[vocab, hidden]`, exactly: bfloat16 would lose what is small in it.

    Units that multiply matrices (AMX) want the large gradient of the logits transposed, which costs as much again.
    There the product goes by columns of it and the other way around: as the second factor it needs no transposing, and
    what is transposed instead is small and in the cache.
    """
    if not _TURNED or gradient.device.type != "cpu" or torch.compiler.is_compiling():
        product = gradient.T @ hidden
        return product.to(exact) if found is None else found.add_(product)
    whole = hidden.new_empty(gradient.shape[1], hidden.shape[1], dtype=exact) if found is None else found
    turned = hidden.T.contiguous()
    block = BLOCK_BYTES // (4 * hidden.shape[1] * exact.itemsize)
    block = max(block // _ALIGNED * _ALIGNED, _ALIGNED)
    for first in range(0, len(whole), block):
        part = slice(first, first + block)
        product = (turned @ gradient[:, part]).T.contiguous()
        if found is None:
            whole[part] = product
        else:
            whole[part].add_(product)
    return whole


def _even(total: int, most: int) -> int:
    """Return how many rows a chunk has when they are of one size, of at most `most` rows."""
    return -(-total // -(-total // max(most, 1))) if total else 1


def _losses_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    settings: HeadSettings,
    targets: HeadTargets | None,
    teacher: torch.Tensor | None,
    exact: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nll, divergence, z-loss and loss of some rows, `[4, rows]`, and the gradient at the product."""
    scaled = _scaled(logits.to(exact), settings.scaling)
    own = softmax_of(scaled)
    p, index = own.p, labels.clamp(min=0)[:, None]
    nll = (own.log_z - scaled.gather(1, index)[:, 0]).to(exact)
    loss, diverged, z_loss = nll, torch.zeros_like(nll), torch.zeros_like(nll)
    gradient, of_nll = p, torch.ones_like(nll[:1])
    if targets is not None and teacher is not None:
        share = targets.share.to(exact)
        of_nll = of_nll - share
        diverged, of_logits = _diverged(own, _scaled(teacher.to(exact), targets.scaling), settings)
        loss = of_nll * nll + share * diverged
        both = of_logits.shape[1]
        gradient = p.lerp(of_logits, share) if both == p.shape[1] else p * of_nll
        if both < p.shape[1]:
            gradient[:, :both] += share * of_logits
    if settings.z_loss and gradient is p:
        gradient = p.clone()
    gradient.scatter_add_(1, index, -of_nll.expand(index.shape))
    if settings.z_loss:
        log_z = own.log_z.to(exact)
        z_loss = settings.z_loss * log_z**2
        loss = loss + z_loss
        gradient.addcmul_(p, (2 * settings.z_loss * log_z)[:, None])
    if settings.scaling.cap:
        gradient *= 1 - (scaled / settings.scaling.cap) ** 2
    counted = labels != IGNORE
    counts = counted.to(exact)
    # To ask whether all count would make a GPU wait.
    if torch.compiler.is_compiling() or labels.is_cuda or settings.scaling.scale != 1 or not counted.all():
        gradient *= (settings.scaling.scale * counts)[:, None]
    return torch.stack([nll, diverged, z_loss, loss]) * counts, gradient


def _scaled(product: torch.Tensor, scaling: LogitScaling) -> torch.Tensor:
    scaled = product if scaling.scale == 1 else product * scaling.scale
    return scaled if scaling.cap is None else scaling.cap * torch.tanh(scaled / scaling.cap)


def _diverged(student: Softmax, teacher: torch.Tensor, settings: HeadSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence and its gradient at the student's logits, over the tokens that both have a row for.

    Rows beyond the smaller vocabulary are padding: a tokenizer that both share never gives them.
    """
    heat, both = settings.temperature, min(student.logits.shape[1], teacher.shape[1])
    if heat != 1 or both < student.logits.shape[1]:
        student = softmax_of(student.logits[:, :both] / heat)
    teacher = teacher[:, :both] / heat if heat != 1 or both < teacher.shape[1] else teacher
    value, gradient = divergence(settings.divergence, student, softmax_of(teacher), settings.top_k)
    return heat**2 * value, gradient if heat == 1 else gradient.mul_(heat)
