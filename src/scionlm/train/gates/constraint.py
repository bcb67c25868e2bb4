"""How gates are made to end at a shape: a target that rises from nothing, and multipliers that rise against it.

For each row of gates, s is the share of units that are expected to be closed and t the share that is asked for; the
loss gets m1 * (s - t) + m2 * (s - t)^2, which the gates descend and the multipliers m1, m2 ascend.

Source: Xia et al. (Sheared LLaMA), arXiv:2310.06694, section 2.1, after Platt and Barr (1987).
Differs: expectations are on the calibrated scale (`concrete.calibrated`) unless the published one is asked for. The
    multipliers take an explicit step upwards; the code gives them a negative learning rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scionlm.train.gates import concrete
from scionlm.train.gates.axes import Axis

_TINY, _HALVINGS = 1e-12, 30


@dataclass(frozen=True)
class ConstraintSettings:
    """How the constraint is written.

    Attributes:
        calibrated: Count on the scale on which gates can be wholly open and wholly closed.
        by_row: Give each row multipliers of its own and add the rows up, in units; else all rows of an axis share
            them, and the mean is taken, in shares of the units.
        warmup: Steps in which the share that is to go rises from zero.
    """

    calibrated: bool = True
    by_row: bool = False
    warmup: int = 0


class Constraint:
    """The multipliers of all axes.

    Args:
        axes: The gates' axes.
        temperature: Of the gates.
        settings: How it is written.
        device: Where the gates are.
        begin: The gates that the share to be closed rises from; None has it rise from nothing.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        temperature: float,
        settings: ConstraintSettings,
        device: torch.device | str = "cpu",
        begin: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._axes, self._temperature, self._settings = list(axes), temperature, settings
        sizes = {axis.name: axis.rows if settings.by_row else 1 for axis in axes}
        self.linear = {name: torch.zeros(size, device=device) for name, size in sizes.items()}
        self.quadratic = {name: torch.zeros(size, device=device) for name, size in sizes.items()}
        self._begin = {axis.name: torch.zeros(axis.rows, device=device) for axis in axes}
        if begin is not None:
            closed = {axis.name: 1 - self._share(begin[axis.name].detach()).mean(1) for axis in axes}
            self._begin = {axis.name: closed[axis.name].clamp(0.0, axis.sparsity) for axis in axes}

    def target(self, axis: Axis, step: int) -> torch.Tensor:
        """Return the share of each row's units that is to be closed after `step` steps, `[rows]`."""
        warmup, begin = self._settings.warmup, self._begin[axis.name]
        return begin + (axis.sparsity - begin) * (min(1.0, step / warmup) if warmup else 1.0)

    def distances(self, log_alpha: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Return s - t of each row by axis, `[rows]`: negative where too much is open. In units where `by_row`."""
        found: dict[str, torch.Tensor] = {}
        for axis in self._axes:
            distance = 1 - self._share(log_alpha[axis.name]).mean(1) - self.target(axis, step)
            found[axis.name] = distance * axis.units if self._settings.by_row else distance
        return found

    def penalty(self, distances: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return what the loss gets."""
        parts: list[torch.Tensor] = []
        for name, distance in distances.items():
            rows = self.linear[name] * distance + self.quadratic[name] * distance.square()
            parts.append(rows.sum() if self._settings.by_row else rows.mean())
        return torch.stack(parts).sum()

    @torch.no_grad()
    def solve(self, log_alpha: Mapping[str, torch.nn.Parameter]) -> None:
        """Take off the gates' gradients what would change the expected share that is open, row by row.

        The linear multiplier is the one with which a step along the gradient leaves that share as it is: what moves is
        which units are open. A unit opens where it lowers the loss by more, per unit that is opened, than others do.
        """
        for axis in self._axes:
            parameter = log_alpha[axis.name]
            probability = concrete.open_probability(parameter, self._temperature)
            slope = probability * (1 - probability)  # of the share by log_alpha, but for a factor
            assert parameter.grad is not None
            products = (parameter.grad * slope).sum(1, keepdim=True)
            multiplier = products / slope.square().sum(1, keepdim=True).clamp(min=_TINY)
            parameter.grad -= multiplier * slope
            self.linear[axis.name].copy_(multiplier.view(-1) if self._settings.by_row else multiplier.mean())

    @torch.no_grad()
    def restore(self, log_alpha: Mapping[str, torch.nn.Parameter], step: int, sharpen: float = 1.0) -> None:
        """Shift the gates of each row together until as many are expected to be closed as the target of a step says.

        Args:
            log_alpha: The gates' parameters.
            step: The step.
            sharpen: Multiply them by this first, which takes each nearer to open or closed.
        """
        for axis in self._axes:
            parameter, wanted = log_alpha[axis.name], 1 - self.target(axis, step).unsqueeze(1)
            parameter.mul_(sharpen).clamp_(-concrete.LIMIT, concrete.LIMIT)
            low = torch.full((axis.rows, 1), -4 * concrete.LIMIT, device=parameter.device)
            high = -low
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                share = self._share((parameter + middle).clamp(-concrete.LIMIT, concrete.LIMIT)).mean(1, keepdim=True)
                low, high = torch.where(share < wanted, middle, low), torch.where(share < wanted, high, middle)
            parameter.add_(high).clamp_(-concrete.LIMIT, concrete.LIMIT)

    def _share(self, log_alpha: torch.Tensor) -> torch.Tensor:
        probability = concrete.open_probability(log_alpha, self._temperature)
        calibrated = self._settings.calibrated
        return concrete.calibrated(probability, self._temperature) if calibrated else probability

    def gradients(self, distances: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the penalty's derivative by both multipliers of each axis: (s - t) and its square."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, distance in distances.items():
            d = distance.detach()
            by_row = self._settings.by_row
            found[name] = (d, d.square()) if by_row else (d.mean().view(1), d.square().mean().view(1))
        return found
