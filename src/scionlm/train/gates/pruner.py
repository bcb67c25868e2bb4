"""What learns masks beside the weights: draws for every pass, a step for gates and multipliers after every update.

Gates and multipliers are float32 and whole on every rank; they are no part of the module that is trained, so that
neither DDP nor FSDP touches them. In the last steps the masks are hard: each row keeps exactly what the target has,
nothing is drawn or moved any more, and the weights settle into the shape that they will be cut to.

Source: Xia et al. (Sheared LLaMA), arXiv:2310.06694.
Differs: the last steps with hard masks are ours. Gates are left out of the clipping of gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from scionlm.core.errors import DataError
from scionlm.parallel.placing import average_gradients
from scionlm.parallel.ranks import Ranks
from scionlm.schedules import Schedule
from scionlm.train.gates import concrete
from scionlm.train.gates.axes import Axis
from scionlm.train.gates.constraint import Constraint, ConstraintSettings
from scionlm.train.gates.gates import Gates
from scionlm.train.gates.masks import Masks
from scionlm.train.shards import Saved

DEAD, WHOLE = 0.05, 0.95
"""A unit that stays is called dead with a settled gate below the one, fractional between the two."""
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class PruneSettings:
    """How masks are learned.

    Attributes:
        lr: Of the gates, by Adam.
        multiplier_lr: Of the multipliers.
        schedule: Multiplier of both learning rates by step.
        finish: From this step on masks are the last ones.
        constraint: How the constraint is written.
        ascent: How multipliers are found. `exact`: solved for in every step, so that the gates' step does not change
            what is expected, after which all of a row are shifted until the target is met. `plain` steps upwards grow
            with the violation; those of `adam`, which the published code takes, do not.
        sharpen: With `exact`: what gates are multiplied by over all steps before the last masks.
        cap: The largest multiplier; None sets no limit.
        by_code: Settle gates for evaluation as the published code does.
    """

    lr: float
    multiplier_lr: float
    schedule: Schedule
    finish: int
    constraint: ConstraintSettings
    ascent: Literal["exact", "plain", "adam"] = "exact"
    sharpen: float = 1.0
    cap: float | None = None
    by_code: bool = False


class Pruner:
    """Gates on a model, with what moves them.

    Args:
        model: The model.
        gates: Its gates, on the model's device.
        settings: How they are learned.
    """

    def __init__(self, model: PreTrainedModel, gates: Gates, settings: PruneSettings) -> None:
        self.gates, self.settings = gates, settings
        parameters = list(gates.log_alpha.values())
        device = parameters[0].device
        begin = gates.log_alpha if settings.ascent == "exact" else None
        self.constraint = Constraint(gates.axes, gates.temperature, settings.constraint, device, begin)
        self.masks = Masks(model)
        self._step = 0
        self._last: dict[str, torch.Tensor] | None = None
        self._descent = torch.optim.AdamW(parameters, lr=0.0, betas=_BETAS, weight_decay=0.0)
        multipliers = [*self.constraint.linear.values(), *self.constraint.quadratic.values()]
        if settings.ascent == "adam":
            self._ascent: Any = torch.optim.AdamW(multipliers, 0.0, _BETAS, weight_decay=0.0, maximize=True)
        else:
            self._ascent = torch.optim.SGD(multipliers, lr=0.0, maximize=True)

    @property
    def is_over(self) -> bool:
        """Whether masks are the last ones by now."""
        return self._step >= self.settings.finish

    def at_step(self, step: int) -> None:
        """Take the place in the run: so many updates came before."""
        self._step = step

    def draw(self, row: int) -> None:
        """Take masks for a pass of training; `row` is its first sequence in the global batch."""
        self.masks.set(self.last() if self.is_over else self.gates.draw(self._step, row))

    def settle(self) -> None:
        """Take masks without noise, for evaluation: as many units as are expected to be open, at the end the last."""
        self.masks.set(self.last() if self.is_over else self.gates.settled(exact=False, by_code=self.settings.by_code))

    def last(self) -> dict[str, torch.Tensor]:
        """Return the masks of the end, which keep exactly what the target has: zero and one, or as the code has it."""
        if self._last is None or not self.is_over:
            if self.settings.by_code:
                self._last = self.gates.settled(exact=True, by_code=True)
            else:
                self._last = {name: kept.float() for name, kept in self.gates.kept().items()}
        return self._last

    def update(self, ranks: Ranks) -> None:
        """Move gates and multipliers once, by the gradients of all passes since the last time."""
        parameters = self.gates.log_alpha
        if not self.is_over:
            average_gradients(list(parameters.values()), ranks)
            factor = self.settings.schedule(self._step)  # of this update, as the weights have it
            _set_lr(self._descent, self.settings.lr * factor)
            _set_lr(self._ascent, self.settings.multiplier_lr * factor)
            if self.settings.ascent == "exact":
                self.constraint.solve(parameters)
                self._descent.step()
                self.constraint.restore(
                    parameters, self._step, self.settings.sharpen ** (1 / max(1, self.settings.finish))
                )
            else:
                self._move_both(parameters)
        self.skip()

    def _move_both(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Let gates descend and multipliers ascend by the same distances."""
        distances = self.constraint.distances(parameters, self._step)
        self.constraint.penalty(distances).backward()
        rates = self.constraint.gradients(distances)
        for name, (linear, quadratic) in rates.items():
            self.constraint.linear[name].grad, self.constraint.quadratic[name].grad = linear, quadratic
        self._descent.step()
        self._ascent.step()
        self.gates.clamp()
        self._clamp_multipliers()

    def skip(self) -> None:
        """Go on to the next step without an update, and drop what gradients there are."""
        self._step += 1
        self._descent.zero_grad()
        self._ascent.zero_grad()

    def _clamp_multipliers(self) -> None:
        cap = self.settings.cap
        if cap is not None:
            for value in self.constraint.linear.values():
                value.clamp_(-cap, cap)
            for value in self.constraint.quadratic.values():
                value.clamp_(0.0, cap)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Return how far each axis is, for the metrics; see `axis_facts`."""
        found: dict[str, float] = {}
        every = self.gates.kept()
        for axis in self.gates.axes:
            # What the last update was made towards.
            target = 1 - float(self.constraint.target(axis, max(self._step - 1, 0)).mean())
            facts = axis_facts(self.gates, axis, self.settings, every[axis.name]) | {"target_share": target}
            facts |= {
                "linear_multiplier": float(self.constraint.linear[axis.name].mean()),
                "quadratic_multiplier": float(self.constraint.quadratic[axis.name].mean()),
            }
            found |= {f"prune/{axis.name}_{key}": value for key, value in facts.items()}
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds of it."""
        found: dict[str, torch.Tensor] = {f"log_alpha/{name}": value for name, value in self.gates.log_alpha.items()}
        found |= {f"linear/{name}": value for name, value in self.constraint.linear.items()}
        found |= {f"quadratic/{name}": value for name, value in self.constraint.quadratic.items()}
        for kind, optimizer in (("descent", self._descent), ("ascent", self._ascent)):
            for number, state in enumerate(_states(optimizer)):
                found |= {f"{kind}/{number}/{key}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        """Go on from what `tensors` gave.

        Raises:
            DataError: It is of other gates.
        """
        for kind, optimizer in (("descent", self._descent), ("ascent", self._ascent)):
            for number, parameter in enumerate(_parameters(optimizer)):
                keys = [key for key in saved.shapes if key.startswith(f"{kind}/{number}/")]
                state = {key.rpartition("/")[2]: torch.zeros(saved.shapes[key]) for key in keys}
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        mine = self.tensors()
        if {name: tensor.shape for name, tensor in mine.items()} != dict(saved.shapes):
            raise DataError("the checkpoint's gates are of another target or source; prune into another folder")
        saved.fill({name: tensor.detach() for name, tensor in mine.items()})
        self._last = None


def axis_facts(gates: Gates, axis: Axis, settings: PruneSettings, kept: torch.Tensor | None = None) -> dict[str, float]:
    """Return how far the gates of an axis are from being a choice.

    Returns:
        `open_share`: the expected share of open units on the scale of the constraint. Of the units that would stay now,
        the shares that are `dead_share` and `fractional_share`, by their settled gates. `margin`: the smallest
        difference, of any row, between the last probability to be open that stays and the first that does not.
        `distance`: the largest distance of any row from its target share.
    """
    alpha = gates.log_alpha[axis.name].detach()
    probability = concrete.open_probability(alpha, gates.temperature)
    scaled = probability
    if settings.constraint.calibrated:
        scaled = concrete.calibrated(probability, gates.temperature)
    kept = gates.kept()[axis.name] if kept is None else kept
    soft = concrete.settled_by_code(alpha, gates.temperature) if settings.by_code else concrete.settled(alpha)
    stays = soft[kept]
    ordered = probability.sort(dim=1, descending=True).values
    margin = ordered[:, axis.target - 1] - ordered[:, axis.target]
    numbers = torch.stack([
        scaled.mean(),
        (stays < DEAD).float().mean(),
        ((stays >= DEAD) & (stays < WHOLE)).float().mean(),
        margin.min(),
        (scaled.mean(1) - axis.target / axis.units).abs().max(),
    ]).tolist()  # fmt: skip
    return dict(zip(("open_share", "dead_share", "fractional_share", "margin", "distance"), numbers, strict=True))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer) -> list[Mapping[str, torch.Tensor]]:
    return [
        {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, torch.Tensor)}
        for parameter in _parameters(optimizer)
    ]
