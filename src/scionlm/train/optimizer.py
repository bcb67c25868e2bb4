"""AdamW, and Muon with AdamW for what Muon is not made for: which weights decay, and how fast each layer moves.

Weight decay acts on matrices only: not on norms, biases and embeddings, whose scale it would pull at. Muon takes the
matrices inside the layers; embeddings, head, norms and biases stay with AdamW. It is scaled to AdamW's root mean
square, so that one learning rate serves both.
"""

import contextlib
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scionlm.core.errors import DataError, UsageError
from scionlm.core.records import Record
from scionlm.families.shape import expected_tensors
from scionlm.train.muon import SharedMuon
from scionlm.train.shards import Saved

Name = Literal["adamw", "muon"]
Carry = Literal["keep", "reset", "moments"]

_MUON_SHIFT = "match_rms_adamw"


@dataclass(frozen=True)
class OptimizerSettings:
    """Constants of an optimizer.

    Attributes:
        name: `adamw`, or `muon` for the matrices inside the layers.
        betas: AdamW's decay of the first and second moment.
        eps: AdamW's addend to the root of the second moment.
        weight_decay: Decoupled weight decay.
        decay: `matrices`, or `all` weights.
        momentum: Muon's momentum, Nesterov's kind.
        lr_scales: Multiplier of the learning rate by layer index, or by a part outside the layers
            (`embedding`, `final_norm`, `head`, ...); one where nothing is said.
    """

    name: Name = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    momentum: float = 0.95
    lr_scales: Mapping[int | str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Group:
    """What sets one group of weights apart."""

    muon: bool
    decays: bool
    lr_scale: float


class Optimizer:
    """The optimizers of a model's float32 weights, as one, its state under the weights' own names.

    Args:
        model: The model.
        settings: The constants.
        beside: What else is trained, by names that are none of the model's: by AdamW, without decay.

    Raises:
        UsageError: `lr_scales` names a layer or part that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OptimizerSettings,
        beside: Mapping[str, torch.nn.Parameter] | None = None,
    ) -> None:
        self._beside = set(beside or {})
        trained = dict(model.named_parameters()) | dict(beside or {})
        self._names: dict[torch.Tensor, str] = {p: name for name, p in trained.items()}
        places = _places(model)
        _check_scales(settings.lr_scales, places)
        groups: dict[_Group, list[torch.nn.Parameter]] = {}
        for name, parameter in trained.items():
            group = _group_of(name, settings, places)
            group = replace(group, decays=group.decays and name not in self._beside)
            groups.setdefault(group, []).append(parameter)
        self._facts = [
            {
                "optimizer": "muon" if group.muon else "adamw",
                "weight_decay": settings.weight_decay if group.decays else 0.0,
                "lr_scale": group.lr_scale,
                "num_parameters": sum(parameter.numel() for parameter in parameters),
            }
            for group, parameters in groups.items()
        ]
        self._parts: list[torch.optim.Optimizer] = []
        for muon in (False, True):
            mine: list[dict[str, Any]] = [
                {
                    "params": parameters,
                    "weight_decay": settings.weight_decay if group.decays else 0.0,
                    "lr_scale": group.lr_scale,
                }
                for group, parameters in groups.items()
                if group.muon == muon
            ]
            if mine and muon:
                shared = isinstance(mine[0]["params"][0], DTensor)
                kind = SharedMuon if shared else torch.optim.Muon
                self._parts.append(kind(mine, lr=0.0, momentum=settings.momentum, adjust_lr_fn=_MUON_SHIFT))
            elif mine:
                self._parts.append(torch.optim.AdamW(mine, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All weights, group by group."""
        return [p for part in self._parts for group in part.param_groups for p in group["params"]]

    def groups(self) -> list[Record]:
        """Return what decays, what is scaled and what goes to which optimizer: for the record."""
        return [dict(group) for group in self._facts]

    def step(self, lr: float, divisor: float = 1.0) -> None:
        """Update the weights from their gradients over a divisor, by which these may be divided in place."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr * group["lr_scale"]
            with _dividing(part, divisor):
                part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self._parts:
            part.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the state as `WEIGHT/FIELD`; empty before the first step."""
        return {
            f"{self._names[parameter]}/{field}": value
            for part in self._parts
            for parameter, state in part.state.items()
            for field, value in state.items()
            if isinstance(value, torch.Tensor)
        }

    def load(self, saved: Saved, carry: Carry = "keep", *, some: bool = False) -> None:
        """Take over a state.

        Args:
            saved: What `tensors` gave.
            carry: `keep`: all of it. `moments`: the second moments alone, which are each weight's scale; where the
                gradient pointed to is forgotten. `reset`: none of it.
            some: It may be of some of the weights only; the others begin without.

        Raises:
            UsageError: It is of another optimizer.
            DataError: It is of other weights.
        """
        for part in self._parts:
            part.state.clear()
        if carry == "reset" or not saved.shapes:
            return
        mine = {name: parameter for parameter, name in self._names.items()}
        states = {key.rpartition("/")[0] for key in saved.shapes}
        # What is trained beside the model has no state before its first gradient, which may never come.
        if states - set(mine) or (set(mine) - states - self._beside and not some):
            raise DataError(f"the optimizer's state is of another model: of {len(states)} weights, not of {len(mine)}")
        owner = {p: part for part in self._parts for group in part.param_groups for p in group["params"]}
        wanted: dict[str, torch.Tensor] = {}
        for key, shape in saved.shapes.items():
            name, _, kind = key.rpartition("/")
            if name not in mine or (len(shape) and shape != mine[name].shape):
                raise DataError(f"the optimizer's state {key!r} is of another model")
            parameter = mine[name]
            if (kind == "momentum_buffer") != isinstance(owner[parameter], torch.optim.Muon):
                raise UsageError(
                    f"the state of {name!r} is of another optimizer; set optimizer_state: reset, or keep optimizer.name"
                )
            # A count of steps is the same on all ranks; it stays off the weights' mesh.
            value = torch.zeros_like(parameter.detach()) if len(shape) else torch.zeros((), device=_device(parameter))
            owner[parameter].state[parameter][kind] = value
            if carry != "moments" or kind not in ("exp_avg", "momentum_buffer"):
                wanted[key] = value
        saved.fill(wanted)


@contextlib.contextmanager
def _dividing(part: torch.optim.Optimizer, divisor: float) -> Generator[None, None, None]:
    """Let an optimizer's step divide the gradients: AdamW as it reads them, without a pass of its own over memory."""
    parameters = [p for group in part.param_groups for p in group["params"] if p.grad is not None]
    if divisor == 1 or not parameters:
        yield
    elif isinstance(part, torch.optim.AdamW):
        adamw: Any = part  # this is how torch's scaler of gradients has them divided
        adamw.grad_scale = torch.full((), divisor, device=_device(parameters[0]))
        yield
        del adamw.grad_scale
    else:
        for parameter in parameters:
            parameter.grad.div_(divisor)
        yield


def _device(parameter: torch.Tensor) -> torch.device:
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device


def _group_of(name: str, settings: OptimizerSettings, places: Mapping[str, tuple[int, str, int | None]]) -> _Group:
    dims, role, layer = places.get(name, (1, "other", None))
    looked_up = role in ("embedding", "position")
    return _Group(
        muon=settings.name == "muon" and dims == 2 and layer is not None,
        decays=settings.decay == "all" or (dims == 2 and not looked_up),
        lr_scale=settings.lr_scales.get(role if layer is None else layer, 1.0),
    )


def _places(model: PreTrainedModel) -> dict[str, tuple[int, str, int | None]]:
    """Return number of dimensions, role and layer of each tensor."""
    hf_config = model.config.to_dict()
    return {place.name: (len(place.shape), place.spec.role, place.layer) for place in expected_tensors(hf_config)}


def _check_scales(scales: Mapping[int | str, float], places: Mapping[str, tuple[int, str, int | None]]) -> None:
    known: Iterable[int | str] = {role if layer is None else layer for _, role, layer in places.values()}
    for name in scales:
        if name not in known:
            parts = ", ".join(sorted(place for place in known if isinstance(place, str)))
            raise UsageError(f"optimizer.lr_scales: the model has no {name!r} (its layers, {parts})")
