"""What a user can ask of `scion analyze`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from scionlm.core.config import nearest
from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.families import ModelShape
from scionlm.families.shape import context_length


@dataclass(frozen=True)
class AnalyzeOptions:
    """What is measured, and on how much.

    Attributes:
        split: Part of the data that is looked at. Differs: the paper takes its validation split; what is chosen here
            must not have seen what it is judged on.
        domains: Which domains; None takes all.
        seq_len: Tokens of a sequence.
        num_sequences: How many.
        loss_sequences: The first so many of them are what losses without layers, lens and gradients are measured on.
        tau: Share of the energy that defines the rank.
        eta: Share of the mass that defines the minimal column mass.
        lengths: Shorter lengths to count ranks for too; None takes a half and a quarter.
        lazy_tolerance: A layer is lazy below a MaxRank of 1 and this.
        layers: How many layers the suggestions keep; None takes half.
        greedy: How many layers greedy removal takes out; 0 leaves it out, as it is the one part that takes long.
        exact: Singular values in float64 instead of the faster way to the same integers.
        precision: `fp32` or `bf16`, of the weights and products; attention itself is in float32.
        stream: Read the weights layer by layer, for models larger than memory; None decides by size.
        seed: Of the sample.
    """

    split: str = "train"
    domains: tuple[str, ...] | None = None
    seq_len: int = 100
    num_sequences: int = 100
    loss_sequences: int = 20
    tau: float = 0.90
    eta: float = 0.90
    lengths: tuple[int, ...] | None = None
    lazy_tolerance: float = 0.5
    layers: int | None = None
    greedy: int = 0
    exact: bool = False
    precision: str = "fp32"
    stream: bool | None = None
    seed: int = 0

    def check(self, config: dict[str, Any]) -> None:
        """Refuse what cannot be measured on a model of this configuration.

        Raises:
            UsageError: A number is out of range.
        """
        total, longest = ModelShape.of(config).num_hidden_layers, context_length(config)
        ranges: list[tuple[str, float, float, float]] = [
            ("seq_len", self.seq_len, 2, longest or math.inf),
            ("num_sequences", self.num_sequences, 1, math.inf),
            ("loss_sequences", self.loss_sequences, 1, self.num_sequences),
            ("layers", self.layers or 1, 1, total),
            ("greedy", self.greedy, 0, total - 1),
            ("lazy_tolerance", self.lazy_tolerance, 0, math.inf),
            *(("length", length, 2, self.seq_len) for length in self.lengths or ()),
        ]
        for name, value, least, most in ranges:
            if not least <= value <= most:
                raise UsageError(f"{name} {value}: it must lie between {least} and {most} for this model")
        if self.layers == 0:
            raise UsageError("layers 0: a model has at least one")
        for name, share in (("tau", self.tau), ("eta", self.eta)):
            if not 0 < share <= 1:
                raise UsageError(f"{name} {share}: a share of the energy lies above 0 and is at most 1")
        if self.precision not in ("fp32", "bf16", "auto"):
            known = ["fp32", "bf16", "auto"]
            raise UsageError(f"precision {self.precision!r}{nearest(self.precision, known)} must be fp32, bf16 or auto")

    def decisive(self, domains: list[str]) -> Record:
        """Return what decides the numbers: what else there is can be asked for later of the same analysis."""
        free = ("layers", "greedy", "lazy_tolerance", "stream")
        chosen = {key: value for key, value in asdict(self).items() if key not in free}
        return chosen | {"domains": domains, "lengths": list(self.all_lengths)}

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The shorter lengths, resolved."""
        if self.lengths is not None:
            return self.lengths
        return tuple(length for length in (self.seq_len // 4, self.seq_len // 2) if length >= 8)


def options_of(given: Mapping[str, Any]) -> AnalyzeOptions:
    """Return options from keywords; lists stand for tuples, None for what is usual.

    Raises:
        UsageError: There is no such option.
    """
    known = [each.name for each in fields(AnalyzeOptions)]
    for name in given:
        if name not in known:
            raise UsageError(f"analyze has no option {name!r}{nearest(name, known)} (has: {', '.join(known)})")
    chosen: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return AnalyzeOptions(**{key: value for key, value in chosen.items() if value is not None})
