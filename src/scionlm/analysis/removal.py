"""What the loss would be: without a layer, without one after another, and if the model ended after each.

    removal   one layer passes on what it reads
    greedy    the layer whose removal costs least is taken out, and again
    lens      final norm and head read what comes out of a layer (the logit lens)

Losses are means over sequences of their mean next-token loss, in nats, without training. Each layer's output is
computed once and shared by all that leave out a later one.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scionlm.analysis.walk import Walk
from scionlm.core.errors import BrokenModelError

OnProgress = Callable[[float], None]
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class RemovalLosses:
    """Losses without one more layer.

    Attributes:
        candidates: The layers that were left out, one at a time.
        whole: Loss with all of them, `[sequences]`.
        without: Loss without each, `[candidates, sequences]`.
    """

    candidates: list[int]
    whole: Losses
    without: Losses


@torch.no_grad()
def removal_losses(
    walk: Walk, ids: torch.Tensor, removed: Collection[int] = (), on_progress: OnProgress = lambda layers: None
) -> RemovalLosses:
    """Return the loss without each layer, where those in `removed` are gone already.

    Args:
        walk: The model.
        ids: `[sequences, length]`.
        removed: Layers that pass on what they read, throughout.
        on_progress: Told the layers done.

    Raises:
        BrokenModelError: A loss is not finite.
    """
    candidates = [index for index in range(walk.num_layers) if index not in removed]
    # The model itself first, then the one without each layer passed so far: all are the same up to that layer.
    states = [walk.embed(ids)]
    for done, index in enumerate(candidates):
        skipped = states[0]
        with walk.at(index):
            states = [walk.through(index, ids, state) for state in states]
        states.append(skipped)
        on_progress(done + 1)
    losses = np.stack([walk.losses(ids, state).numpy() for state in states])
    return RemovalLosses(candidates, _finite(losses)[0], losses[1:])


@dataclass(frozen=True)
class GreedyRemoval:
    """Layers in the order in which they went, and the loss after each, in nats."""

    order: list[int]
    losses: list[float]


def greedy_removal(
    walk: Walk, ids: torch.Tensor, steps: int, on_progress: OnProgress = lambda steps: None
) -> GreedyRemoval:
    """Take out the layer whose removal costs least, and again.

    Args:
        walk: The model.
        ids: `[sequences, length]`.
        steps: How many layers go; fewer than there are.
        on_progress: Told the steps done.

    Raises:
        BrokenModelError: A loss is not finite.
    """
    removed: list[int] = []
    losses: list[float] = []
    for step in range(steps):
        found = removal_losses(walk, ids, removed)
        means = found.without.mean(1)
        best = int(means.argmin())
        removed.append(found.candidates[best])
        losses.append(float(means[best]))
        on_progress(step + 1)
    return GreedyRemoval(removed, losses)


@torch.no_grad()
def lens_losses(walk: Walk, ids: torch.Tensor, on_progress: OnProgress = lambda layers: None) -> Losses:
    """Return the loss if final norm and head read the embedding (first) or each layer's output, `[L + 1, sequences]`.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Raises:
        BrokenModelError: A loss is not finite.
    """
    hidden = walk.embed(ids)
    losses = [walk.losses(ids, hidden).numpy()]
    for index in range(walk.num_layers):
        with walk.at(index):
            hidden = walk.through(index, ids, hidden)
        losses.append(walk.losses(ids, hidden).numpy())
        on_progress(index + 1)
    return _finite(np.stack(losses))


def _finite(losses: Losses) -> Losses:
    if not np.isfinite(losses).all():
        raise BrokenModelError("a loss is not finite: the model's weights are broken")
    return losses
