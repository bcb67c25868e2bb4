"""The gates of a run: their parameters, what they are drawn as, and which units they keep."""

import hashlib
import struct
from collections.abc import Mapping, Sequence

import torch

from scionlm.core.errors import DivergenceError
from scionlm.train.gates import concrete
from scionlm.train.gates.axes import Axis

_APART = ("attention", "mlp")


class Gates:
    """Hard concrete gates along some axes.

    Args:
        axes: What they act on.
        temperature: Of their distribution.
        seed: Of the noise: a draw depends on it, on the step and on the place in the batch, and on nothing else.
        device: Where they are.
        start: `log_alpha` to begin with by axis, `[rows, units]`; as open as they can be where there is none.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        temperature: float = concrete.TEMPERATURE,
        seed: int = 0,
        device: torch.device | str = "cpu",
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.axes, self.temperature, self._seed = list(axes), temperature, seed
        self.log_alpha: dict[str, torch.nn.Parameter] = {}
        for axis in axes:
            shape = (axis.rows, axis.units)
            given = (start or {}).get(axis.name)
            values = torch.full(shape, concrete.LIMIT) if given is None else given.float().reshape(shape)
            self.log_alpha[axis.name] = torch.nn.Parameter(values.clamp(-concrete.LIMIT, concrete.LIMIT).to(device))

    def draw(self, step: int, row: int) -> dict[str, torch.Tensor]:
        """Return a sample of each gate.

        Args:
            step: Of the run.
            row: First sequence of the pass in the global batch: the same on devices that cut it into the same passes.
        """
        generator = torch.Generator().manual_seed(_mixed(self._seed, step, row))
        noise = torch.rand(sum(axis.rows * axis.units for axis in self.axes), generator=generator)
        pieces = noise.split([axis.rows * axis.units for axis in self.axes])
        found: dict[str, torch.Tensor] = {}
        for axis, piece in zip(self.axes, pieces, strict=True):
            parameter = self.log_alpha[axis.name]
            own = piece.view_as(parameter).to(parameter.device, non_blocking=True)
            found[axis.name] = concrete.sample(parameter, own, self.temperature)
        return found

    @torch.no_grad()
    def kept(self, exact: bool = True) -> dict[str, torch.Tensor]:
        """Return which units stay, `[rows, units]`, bool: those of the largest parameters, ties to the lower index.

        Args:
            exact: Keep as many as the target has; else as many as are open on average now.

        Where attention and MLP have gates apart, the layers that stay are those whose two gates add up to most.

        Raises:
            DivergenceError: A gate is not a number.
        """
        ranks, counts = dict[str, torch.Tensor](), dict[str, torch.Tensor | int]()
        values: dict[str, torch.Tensor] = {name: parameter.detach() for name, parameter in self.log_alpha.items()}
        if exact and all(name in values for name in _APART):
            both = values["attention"] + values["mlp"]
            values |= dict.fromkeys(_APART, both)
        if any(bool(value.isnan().any()) for value in values.values()):
            raise DivergenceError("a gate is not a number; lower prune.gates.lr or optimizer.lr")
        for axis in self.axes:
            order = torch.argsort(values[axis.name], dim=1, descending=True, stable=True)
            ranks[axis.name] = torch.empty_like(order).scatter_(
                1, order, torch.arange(axis.units).to(order).expand_as(order)
            )
            counts[axis.name] = axis.target if exact else self._open_now(axis)
        return {name: rank < counts[name] for name, rank in ranks.items()}

    def _open_now(self, axis: Axis) -> torch.Tensor:
        expected = concrete.open_probability(self.log_alpha[axis.name], self.temperature).sum(1, keepdim=True)
        return expected.round().clamp(min=1)

    @torch.no_grad()
    def settled(self, exact: bool, by_code: bool = False) -> dict[str, torch.Tensor]:
        """Return gates without noise: zero where a unit does not stay, and a value that may be soft where it does."""
        found: dict[str, torch.Tensor] = {}
        for name, kept in self.kept(exact).items():
            parameter = self.log_alpha[name].detach()
            soft = concrete.settled_by_code(parameter, self.temperature) if by_code else concrete.settled(parameter)
            found[name] = torch.where(kept, soft, 0.0)
        return found

    def clamp(self) -> None:
        """Keep the parameters where gradients live."""
        with torch.no_grad():
            for parameter in self.log_alpha.values():
                parameter.clamp_(-concrete.LIMIT, concrete.LIMIT)


def _mixed(*numbers: int) -> int:
    """Return a seed that any change of any number makes another one."""
    text = struct.pack(f"<{len(numbers)}q", *(number % 2**63 for number in numbers))
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def start_from_scores(
    axes: Sequence[Axis], scores: Mapping[str, torch.Tensor], spread: float
) -> dict[str, torch.Tensor]:
    """Return `log_alpha` that begins in the order of importance scores.

    By rank in its row, since scores have long tails: units are spread evenly over `spread` below the upper limit.

    Args:
        axes: The gates.
        scores: `[rows, units]` by axis; an axis without scores begins open.
        spread: Between the most and the least important unit of a row.
    """
    found: dict[str, torch.Tensor] = {}
    for axis in axes:
        if axis.name in scores and axis.units > 1:
            values = scores[axis.name].reshape(axis.rows, axis.units)
            ranks = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1).float()
            found[axis.name] = concrete.LIMIT - spread * ranks / (axis.units - 1)
    return found
