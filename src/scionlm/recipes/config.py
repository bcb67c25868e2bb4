"""The recipe: one schema for every YAML file, preset and override. DESIGN: what is not in this version must be null."""

from typing import Literal

from pydantic import Field, model_validator

from scionlm.core.config import Section
from scionlm.core.duration import Duration
from scionlm.core.quantities import Beta, Count, Length, Steps
from scionlm.recipes.config_data import DataConfig, ReplayConfig, ReweightConfig


class InheritConfig(Section):
    """What the child takes from the source."""

    layers: int | None = None
    """How many layers; null when `keep` names them."""
    keep: str | list[int] | None = None
    """Which layers, as `0-7,12` or a list."""
    strategy: str | None = None
    """How to choose `layers` of them; null is `first`."""
    init: Literal["source", "random"] = "source"
    """`random` is the control: the same shape from the family's own initialization."""

    @model_validator(mode="after")
    def _one_of(self) -> "InheritConfig":
        if (self.layers is None) == (self.keep is None):
            raise ValueError("set either layers (how many) or keep (which), the other null")
        return self


class TrainConfig(Section):
    """How much to train, and in what pieces."""

    tokens: Count | None = None
    """Budget in tokens, rounded up to whole steps."""
    steps: Count | None = None
    """Budget in optimizer steps, instead of tokens."""
    global_batch_tokens: Count = 131072
    """Tokens in one optimizer step, whatever the number of devices."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per device and pass."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrix products are computed in; `auto` is bf16 where the hardware has it."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto` uses it where the run is long enough to repay it."""

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainConfig":
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("set either train.tokens or train.steps")
        return self


class OptimizerConfig(Section):
    """The optimizer and its constants."""

    name: Literal["adamw"] = "adamw"
    """The algorithm."""
    lr: float = Field(default=3.0e-4, gt=0, lt=1)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""


class ScheduleConfig(Section):
    """How the learning rate moves."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup: Steps = 0.01
    """Length of the linear rise."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at the end."""


class EvaluateConfig(Section):
    """Held-out losses on the way and at the end."""

    every: Steps = 0.1
    """How often; the first evaluation is before the first step."""
    tokens_per_domain: Count = 32768
    """Budget of an evaluation in each domain, from the start of its held-out stream."""
    tasks: list[str] = Field(default=[], max_length=0)
    """lm-eval tasks; none in this version."""


class CheckpointConfig(Section):
    """When to save."""

    every: Length = "10 min"
    """How often."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest stay."""


class ExportConfig(Section):
    """The result."""

    dtype: Literal["source", "float32", "bfloat16"] = "source"
    """Type of the saved weights; `source` is that of the source's."""


class Recipe(Section):
    """A whole run."""

    recipe: Literal["inheritune"]
    """Which recipe."""
    source: str
    """MODEL to inherit from."""
    data: DataConfig = DataConfig()
    inherit: InheritConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    replay: ReplayConfig | None = None
    """Earlier data in a share of every batch."""
    reweight: ReweightConfig | None = None
    """Weights of the domains that move by what is measured."""
    distill: None = None
    """Learning from the teacher; not in this version."""
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    control: bool = False
    """Also train the randomly initialised control of the same shape, on the same batches, into RUN/control."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of samples, of random initialization and of sample text."""

    @model_validator(mode="after")
    def _whole_sequences(self) -> "Recipe":
        if self.train.global_batch_tokens % self.data.seq_len:
            raise ValueError(
                f"train.global_batch_tokens {self.train.global_batch_tokens} is not a multiple of "
                f"data.seq_len {self.data.seq_len}"
            )
        if self.steps(self.schedule.warmup) > self.total_steps:
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} is longer than the run of {self.total_steps} steps"
            )
        if self.reweight and self.data.ramp:
            raise ValueError("data.ramp and reweight both move the weights; set one of them to null")
        if self.control and self.inherit.init == "random":
            raise ValueError("control: true compares with random initialization, but inherit.init is random already")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return -(-self.train.tokens // self.train.global_batch_tokens)

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.train.global_batch_tokens // self.data.seq_len

    def steps(self, length: int | float | str) -> int:
        """Return a duration of this recipe in steps."""
        return Duration.parse(length).in_steps(self.total_steps, self.train.global_batch_tokens)
