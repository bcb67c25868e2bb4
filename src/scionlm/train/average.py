"""Averages of the weights: an exponential one, the plain mean at regular steps, or of the last and the first weights.

The plain mean over the end of a run is what averaging its last checkpoints gives (Sanyal et al., arXiv:2306.03241),
without having to keep them. The mean with the first weights is that of Wortsman et al., arXiv:2109.01903 (WiSE-FT).
"""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from scionlm.train.shards import Saved

Method = Literal["ema", "uniform", "start"]


@dataclass(frozen=True)
class AverageSettings:
    """How to average.

    Attributes:
        method: `ema`, `uniform` or `start`.
        decay: Share of the old average that an update of `ema` keeps, once it has seen enough.
        start: Step after which weights are taken in.
        every: Steps between two that are taken in.
        share: Of the first weights in the average of `start`.
    """

    method: Method
    decay: float
    start: int
    every: int
    share: float = 0.5


def averaged(
    method: Method, share: float, weights: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor] | None:
    """Return the average of weights, by what a checkpoint keeps of it; None while nothing has been taken in.

    Args:
        method: How it is made.
        share: Of the first weights in that of `start`.
        weights: The weights as they are.
        kept: What `Average.tensors` returns: the average, of method `start` the first weights.
        count: How many states were taken in.
    """
    if method == "start":
        return {name: torch.lerp(weights[name], first, share) for name, first in kept.items()}
    return dict(kept) if count else None


class Average:
    """A running average of a model's weights, in float32.

    Args:
        model: The model.
        settings: How.
    """

    def __init__(self, model: nn.Module, settings: AverageSettings) -> None:
        self._model, self._settings = model, settings
        self._mean: dict[str, torch.Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Begin anew with the weights as they are now."""
        self._mean = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self.count = 0

    @property
    def is_ready(self) -> bool:
        """Whether there is an average: the first weights are there from the start."""
        return self.count > 0 or self._settings.method == "start"

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`, if it is one of those."""
        settings = self._settings
        if settings.method == "start":
            return
        if step <= settings.start or (step - settings.start) % settings.every:
            return
        self.count += 1
        share = 1 / self.count
        if settings.method == "ema":
            # At first a mean of what there is: an average that begins with the initial weights would keep them long.
            share = max(1 - settings.decay, share)
        for name, parameter in self._model.named_parameters():
            self._mean[name].lerp_(parameter, share)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None, None, None]:
        """Put the average in the place of the weights for a while; without any taken in yet, leave them."""
        own = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        mean = averaged(self._settings.method, self._settings.share, own, self._mean, self.count)
        if mean is None:
            yield
            return
        self._put(mean)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the average; of method `start` the first weights."""
        return self._mean

    def load(self, saved: Saved, count: int) -> None:
        """Go on from an average of `count` states."""
        saved.fill(self._mean)
        self.count = count
