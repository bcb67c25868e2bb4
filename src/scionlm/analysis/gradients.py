"""What the loss says about each layer to first order, and how much of it reaches queries and keys.

The gradient is carried backwards layer by layer, each run again on what it read: no more than one layer's graph, and
one layer's weights, are in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scionlm.analysis.importance import finite
from scionlm.analysis.walk import Walk
from scionlm.families import FamilySpec, ModelShape, TensorSpec

OnProgress = Callable[[float], None]


@dataclass(frozen=True)
class GradientFindings:
    """What the gradient of the loss says, each `[layers]`.

    Attributes:
        taylor: |what a layer adds, times the gradient|, summed over tokens and channels, mean over sequences: how much
            the loss would change without it, to first order, in nats.
        query_gradient: L2 norm of the gradient of the mean loss in the weights that make queries.
        key_gradient: The same of keys.
    """

    taylor: NDArray[np.float64]
    query_gradient: NDArray[np.float64]
    key_gradient: NDArray[np.float64]


@torch.inference_mode(False)  # a caller may be in it, and nothing that was made there can be differentiated
def gradient_pass(walk: Walk, ids: torch.Tensor, on_progress: OnProgress = lambda layers: None) -> GradientFindings:
    """Return what the gradient of the mean next-token loss says about each layer.

    Args:
        walk: The model; no gradient stays in it.
        ids: `[sequences, length]`; what every layer reads of them is kept.
        on_progress: Told the layers done, forward and backward.

    Raises:
        BrokenModelError: A number is not finite.

    Source: Taylor: Molchanov et al. 2019, arXiv:1906.10771, for a whole layer; norms: Sanyal et al. 2024, version 2.
    """
    before: list[torch.Tensor] = []
    frozen = [parameter for parameter in walk.model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            hidden = walk.embed(ids)
            for index in range(walk.num_layers):
                before.append(hidden)
                with walk.at(index):
                    hidden = walk.through(index, ids, hidden)
                on_progress(index + 1)
        found = _backward(walk, ids, before, hidden, on_progress)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return GradientFindings(**finite(found))


def _backward(
    walk: Walk, ids: torch.Tensor, before: list[torch.Tensor], hidden: torch.Tensor, on_progress: OnProgress
) -> dict[str, NDArray[np.float64]]:
    gradient = torch.cat([_of_loss(walk, ids[rows], hidden[rows]) for rows in walk.batches(ids, walk.shape.vocab_size)])
    found = {name: np.zeros(walk.num_layers) for name in ("taylor", "query_gradient", "key_gradient")}
    for index in reversed(range(walk.num_layers)):
        with walk.at(index), torch.enable_grad():
            change, squares, gradient = _through(walk, index, ids, before[index], gradient)
        found["taylor"][index] = change / len(ids)
        # The loss is the mean over sequences; what was summed is theirs.
        found["query_gradient"][index], found["key_gradient"][index] = (s**0.5 / len(ids) for s in squares)
        on_progress(2 * walk.num_layers - index)
    return found


@torch.enable_grad()
def _of_loss(walk: Walk, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return the gradient, in what the last layer made, of each sequence's mean loss."""
    hidden = hidden.detach().requires_grad_()
    logits = walk.logits(ids, hidden)[:, :-1].float()
    labels = ids[:, 1:].to(logits.device)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return torch.autograd.grad(total / labels.shape[1], hidden)[0]


def _through(
    walk: Walk, index: int, ids: torch.Tensor, before: torch.Tensor, gradient: torch.Tensor
) -> tuple[float, tuple[float, float], torch.Tensor]:
    """Return (summed Taylor score, squared norms in query and key weights, gradient in what the layer read)."""
    weights = _query_key_weights(walk, index)
    totals = [torch.zeros_like(weight) for _, weight in weights]
    into, change = torch.empty_like(before), 0.0
    try:
        for _, weight in weights:
            weight.requires_grad_(True)
        for rows in walk.batches(ids):
            read = before[rows].detach().requires_grad_()
            made = walk.layer(index, ids[rows], read)
            parts = torch.autograd.grad(made, [read, *(weight for _, weight in weights)], gradient[rows])
            into[rows] = parts[0]
            added = (made.detach() - read.detach()).float() * gradient[rows].float()
            change += float(added.double().sum((1, 2)).abs().sum())
            for total, part in zip(totals, parts[1:], strict=True):
                total.add_(part)
    finally:
        for _, weight in weights:
            weight.requires_grad_(False)
    squares = [0.0, 0.0]
    for (spec, _), total in zip(weights, totals, strict=True):
        for number, part in _query_key_parts(spec, total, walk.shape):
            squares[number] += float(part.double().square().sum())
    return change, (squares[0], squares[1]), into


def _query_key_weights(walk: Walk, index: int) -> list[tuple[TensorSpec, nn.Parameter]]:
    family: FamilySpec = walk.family
    config: dict[str, Any] = walk.model.config.to_dict()
    own = dict(walk.module(index).named_parameters())
    return [
        (spec, own[spec.name])
        for spec in family.layer
        if spec.role in ("query", "key", "qkv") and len(spec.axes) == 2 and family.has(spec, config)
    ]


def _query_key_parts(spec: TensorSpec, weight: torch.Tensor, shape: ModelShape) -> list[tuple[int, torch.Tensor]]:
    """Return (0 for queries, 1 for keys; the part of the weight that makes them)."""
    if spec.role != "qkv":
        return [(0 if spec.role == "query" else 1, weight)]
    axis = next(number for number, name in enumerate(spec.axes) if "heads" in name)
    weight = weight.movedim(axis, 0)
    if spec.axes[axis] == "qkv_heads":
        by_head = weight.unflatten(0, (shape.num_attention_heads, 3, shape.head_dim))
        return [(0, by_head[:, 0]), (1, by_head[:, 1])]
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return [(0, weight[:queries]), (1, weight[queries : queries + keys])]
