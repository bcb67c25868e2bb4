"""What a user can ask of `scion analyze`."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from scionlm.core.config import Section, validate
from scionlm.core.errors import UsageError
from scionlm.core.records import Record
from scionlm.data.folder import SPLITS
from scionlm.families import ModelShape
from scionlm.families.shape import context_length

# Enough to tell layers apart; a pass without each layer costs half the depth squared.
_LOSS_SEQUENCES = 20

Share = Annotated[float, Field(gt=0, le=1)]


class AnalyzeOptions(Section):
    """What is measured, and on how much."""

    split: str = "train"
    """Part of the data that is looked at. Differs: the paper takes its validation split; what is chosen here must not
    have seen what it is judged on."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Which domains; None takes all."""
    seq_len: int = Field(default=100, ge=2)
    """Tokens of a sequence."""
    num_sequences: int = Field(default=100, ge=1)
    """How many."""
    loss_sequences: int | None = Field(default=None, ge=1)
    """The first so many of them are what losses without layers, lens and gradients are measured on; None takes 20."""
    tau: Share = 0.90
    """Share of the energy that defines the rank."""
    eta: Share = 0.90
    """Share of the mass that defines the minimal column mass."""
    lengths: list[Annotated[int, Field(ge=2)]] | None = None
    """Shorter lengths to count ranks for too; None takes a half and a quarter."""
    lazy_tolerance: float = Field(default=0.5, ge=0, le=1e6)
    """A layer is lazy below a MaxRank of 1 and this."""
    layers: int | None = Field(default=None, ge=1)
    """How many layers the suggestions keep; None takes half."""
    greedy: int = Field(default=0, ge=0)
    """How many layers greedy removal takes out; 0 leaves it out, as it is the one part that takes long."""
    exact: bool = False
    """Singular values in float64 instead of the faster way to the same integers."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of the weights and products; attention itself is in float32."""
    stream: bool | None = None
    """Read the weights layer by layer, for models larger than memory; None decides by size."""
    seed: int = Field(default=0, ge=0)
    """Of the sample."""

    def check(self, config: Record) -> None:
        """Refuse what cannot be measured on a model of this configuration.

        Raises:
            UsageError: A number is out of range.
        """
        if self.split not in SPLITS:
            raise UsageError(f"split {self.split!r} must be one of {', '.join(SPLITS)}")
        total, longest = ModelShape.of(config).num_hidden_layers, context_length(config)
        ranges: list[tuple[str, float | None, float, float]] = [
            ("seq_len", self.seq_len, 2, longest or math.inf),
            ("loss_sequences", self.loss_sequences, 1, self.num_sequences),
            ("layers", self.layers, 1, total),
            ("greedy", self.greedy, 0, total - 1),
            *(("length", length, 2, self.seq_len) for length in self.lengths or ()),
        ]
        for name, value, least, most in ranges:
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} {value}: it must lie between {least} and {most} for this model")

    def decisive(self) -> Record:
        """Return what decides the numbers: what else there is can be asked for later of the same analysis."""
        free = {"layers", "greedy", "lazy_tolerance", "stream", "domains"}
        resolved = {"lengths": self.all_lengths, "loss_sequences": self.num_loss_sequences}
        return self.model_dump(exclude=free) | resolved

    @property
    def num_loss_sequences(self) -> int:
        """How many sequences losses are measured on, resolved."""
        return self.loss_sequences or min(_LOSS_SEQUENCES, self.num_sequences)

    @property
    def all_lengths(self) -> list[int]:
        """The shorter lengths, resolved."""
        if self.lengths is not None:
            return sorted(set(self.lengths))
        return [length for length in (self.seq_len // 4, self.seq_len // 2) if length >= 8]


def options_of(given: Mapping[str, Any]) -> AnalyzeOptions:
    """Return options from keywords; None stands for what is usual.

    Raises:
        UsageError: There is no such option, or a value is wrong.
    """
    return validate(AnalyzeOptions, {key: value for key, value in given.items() if value is not None}, "analyze")
