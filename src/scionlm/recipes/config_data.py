"""The sections of a recipe that say what is trained on: data and mixture, replay, weights that move."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from scionlm.core.config import Section
from scionlm.core.quantities import Count, Steps
from scionlm.data.mixing.plan import Exhausted
from scionlm.data.mixing.replay import REPLAY_FRACTION, ReplayOrder
from scionlm.data.mixing.reweight import RuleName
from scionlm.data.mixing.windows import PackingName

EMPTY_DIR = "is empty; name a folder made by scion prepare (null takes the demo's text)"


class RampConfig(Section):
    """A mixture to begin with, from which the shares move in equal steps."""

    start: dict[str, float]
    """Shares at the first step; a domain that is not named has none."""
    over: Steps
    """Length of the way to `data.mixture`."""


class DataConfig(Section):
    """What to train on."""

    dir: str | None = None
    """Data folder made by `scion prepare`. Null takes the demo's two domains, prepared into the run folder."""
    mixture: dict[str, float] | None = None
    """Domain to its share of the tokens. Null takes every domain by its size and the temperature."""
    temperature: float = Field(default=1.0, gt=0)
    """Without a mixture, shares are in proportion to size ** (1 / temperature): 1 is by size, 100 nearly equal."""
    ramp: RampConfig | None = None
    """Where the mixture comes from, if it moves."""
    seq_len: int = Field(default=1024, ge=2)
    """Tokens that are predicted in one sequence."""

    packing: PackingName = "concat"
    """`concat` lets documents run on from one sequence into the next; `best_fit` cuts none that fits into one, and
    pads what is left over."""
    document_mask: bool = False
    """Keep attention inside each document, with positions that begin anew."""
    max_epochs: Annotated[float, Field(gt=0)] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    """How often a domain may be gone through: for all, or by name. Null sets no limit."""
    exhausted: Exhausted = "repeat"
    """What happens to a domain at its limit: `repeat` it all the same, `redistribute` its share, or `stop`."""

    @field_validator("dir")
    @classmethod
    def _no_empty_folder(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(EMPTY_DIR)
        return value

    @model_validator(mode="after")
    def _positive(self) -> "DataConfig":
        if self.mixture is not None and (not self.mixture or min(self.mixture.values()) <= 0):
            raise ValueError("mixture needs a positive share for each domain; leave out what is not wanted")
        if self.mixture is not None and self.temperature != 1:
            raise ValueError("temperature weighs domains by their size; with a mixture it has no meaning")
        if (self.max_epochs is None) != (self.exhausted == "repeat"):
            raise ValueError("max_epochs and exhausted (redistribute or stop) go together")
        return self


class ReplayConfig(Section):
    """Earlier data in a share of every batch, taken from the share of the new."""

    fraction: float = Field(default=REPLAY_FRACTION, ge=0, lt=1)
    """Share of the sequences; with 0 nothing is replayed."""
    run: str | None = None
    """Run folder whose data are replayed, by its consumption ledger."""
    stage: str | None = None
    """An earlier stage of this run whose data are replayed, instead of a run's."""
    data: str | None = None
    """With `run`: where that run's data folder is now, if it was moved. Without: a data folder that stands in for data
    whose ledger is not to be had (a proxy)."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Which domains of a folder that stands in; null takes all. Without a folder, domains of `data.dir`."""
    order: ReplayOrder = "original"
    """`original`: as the run took them; `offset`: the same, from `offset` on; `reshuffled`."""
    offset: float = Field(default=0.0, ge=0, lt=1)
    """Where to start, as a share of what the run consumed."""
    repeat: bool = False
    """Allow more than one pass."""

    @model_validator(mode="after")
    def _somewhere(self) -> "ReplayConfig":
        if (self.run, self.data, self.stage, self.domains) == (None,) * 4:
            raise ValueError(
                "set run (a run folder with a ledger), stage (an earlier one of this run), or data (a folder that "
                "stands in for it) or domains (of data.dir)"
            )
        if self.stage is not None and (self.run, self.data) != (None, None):
            raise ValueError("stage names data of this run; leave run and data null")
        if self.domains is not None and (self.run, self.stage) != (None, None):
            raise ValueError("domains is for a folder that stands in; a run and a stage have their own")
        if self.offset and self.order != "offset":
            raise ValueError("offset is for order: offset")
        return self


class ReweightConfig(Section):
    """Weights of the domains that follow their held-out losses."""

    rule: RuleName = "bounded"
    """`bounded`: Scion's own, which cannot run away; `paper` and `code`: LLM-Shearing as published and as released;
    `doremi`; `proportional`: prior times relative excess."""
    every: Steps = 0.05
    """How often the weights move."""
    reference: Literal["source", "best"] | str | dict[str, float] = "source"
    """What each domain's loss is compared with: the source's own, the best so far, a JSON file of `scion
    fit-reference`, or nats by domain."""
    target: str | None = None
    """Which size of the file; null where it has one only."""
    tokens_per_domain: Count = 8192
    """Budget of a measurement in each domain."""
    step_size: float = Field(default=1.0, gt=0)
    """How strongly an excess of one nat moves the logarithm of a weight."""
    smoothing: float | None = Field(default=None, ge=0, lt=1)
    """Share of equal weights that is mixed in; null takes the rule's own."""
    pull: float = Field(default=0.1, ge=0, le=1)
    """`bounded`: share of the way back to the first weights at each move."""
    max_step: float = Field(default=0.3, gt=0)
    """`bounded`: largest move of a weight's logarithm."""
    max_ratio: float = Field(default=4.0, gt=1)
    """`bounded`: how far a weight may be from its first, as a factor either way."""
