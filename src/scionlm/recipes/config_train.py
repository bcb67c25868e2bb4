"""The sections of a recipe that say how weights move: budget, optimizer, schedule, averages."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scionlm.core.config import Section
from scionlm.core.quantities import Beta, Count, Steps, Time
from scionlm.planning.layout import Name as LayoutName
from scionlm.schedules import Cooldown, Decay, Schedule, Sizes, build_schedule
from scionlm.schedules import Name as ScheduleName

Scale = Annotated[float, Field(ge=0)]


class TrainConfig(Section):
    """How much to train, and in what pieces."""

    tokens: Count | None = None
    """Budget in tokens, rounded up to whole steps."""
    steps: Count | None = None
    """Budget in optimizer steps, instead of tokens."""
    time: Time | None = None
    """Budget in time spent training, as `6 hours`: measured and turned into steps when the run begins."""
    global_batch_tokens: Count = 131072
    """Tokens in one optimizer step, whatever the number of devices."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Sequences per device and pass; `auto` takes the fastest of those that fit."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrix products are computed in; `auto` is bf16 where the hardware has it."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto` uses it where the run is long enough to repay it."""
    parallel: LayoutName = "auto"
    """How weights lie on several devices; `auto` by what a device can hold, and anew where a run goes on on others."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of the activations is computed again in the backward pass instead of kept: all, or all but products and
    attention."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """torch's own kernels, FlashAttention's package, or torch's FlexAttention, the latter two on a GPU; `auto` is what
    transformers takes for the family: `sdpa` for nearly all."""
    skip_nonfinite: int = Field(default=3, ge=0)
    """Updates in a row that are left out because their loss or gradient is not finite, before the run gives up."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared logarithm of the softmax's normalizer in the loss, which keeps logits from drifting."""

    @model_validator(mode="after")
    def _one_budget(self) -> "TrainConfig":
        if self.tokens is not None and (self.steps, self.time) != (None, None):
            raise ValueError("set either tokens or steps or time, the others null")
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the budget."""
        return self.steps if self.steps is not None else -(-(self.tokens or 0) // self.global_batch_tokens)


class OptimizerConfig(Section):
    """The optimizer and its constants."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon`: Muon for the matrices inside the layers, AdamW for the rest, one learning rate for both."""
    lr: float = Field(default=3.0e-4, gt=0, lt=1)
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0)
    """Added to the root of the second moment."""
    momentum: Beta = 0.95
    """Muon's momentum."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices (not norms, biases and embeddings), or all weights."""
    lr_scales: dict[str, Scale] = Field(default={})
    """Multipliers of the learning rate, by layers (`0-7,12`) or parts (`embedding`, `final_norm`, `head`)."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""


# Which keys say something to which schedules; the rest must stay unset.
_DECAYS = ("wsd", "infinite")
_KEYS: dict[str, tuple[str, ...]] = {
    "decay": _DECAYS,
    "decay_shape": _DECAYS,
    "half_life": (*_DECAYS, "exponential"),
    "cooldown": ("infinite",),
    "cooldown_shape": ("infinite",),
    "constant_lr_ratio": ("infinite",),
    "timescale": ("infinite", "inverse_sqrt"),
}


class ScheduleConfig(Section):
    """How the learning rate moves."""

    name: ScheduleName = "cosine"
    """`constant`, or after the warm-up a decay over all that is left: `linear`, `cosine`, `one_minus_sqrt`,
    `exponential`, `inverse_sqrt`. `wsd` stays and decays at the end; `infinite` cools down to a constant phase and
    decays at the end. `neox_cosine` is GPT-NeoX's of before August 2023, for reproductions."""
    warmup: Steps = 0.01
    """Length of the linear rise."""
    start_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak that the rise begins from."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at the end."""
    over: Literal["stage", "run"] = "stage"
    """What it goes over: the `stage`; or the whole `run`, token by token, of which the stage is a stretch. Lengths in
    steps are then steps of the first stage."""
    decay: Steps | None = None
    """wsd, infinite: length of the decay at the end; a tenth of the run where it is null."""
    decay_shape: Decay | None = None
    """wsd, infinite: its curve; null is `one_minus_sqrt` for wsd and `exponential` for infinite."""
    half_life: Steps | None = None
    """For an exponential decay: it halves in so many steps, wherever it ends."""
    cooldown: Steps | None = None
    """infinite: length of the way from the peak to the constant phase; null is 0.6 of the run."""
    cooldown_shape: Cooldown | None = None
    """infinite: its curve, `cosine` or `inverse_sqrt`."""
    constant_lr_ratio: float | None = Field(default=None, gt=0, le=1)
    """infinite: share of the peak in the constant phase; null is 0.55."""
    timescale: float | None = Field(default=None, gt=0)
    """inverse_sqrt: steps after which the rate has fallen to 0.71 of the peak, null is the warm-up; infinite: the
    constant of its inverse square root, null is 10."""

    @model_validator(mode="after")
    def _only_what_applies(self) -> "ScheduleConfig":
        for key, names in _KEYS.items():
            if getattr(self, key) is not None and self.name not in names:
                raise ValueError(f"{key} is for schedule.name {' or '.join(names)}, not {self.name}")
        return self

    def build(self, total_steps: int, tokens_per_step: int, step: int = 1) -> Schedule:
        """Return the schedule of a stage, or of a run, its parts as whole numbers of steps.

        Args:
            total_steps: Of the stage.
            tokens_per_step: Tokens in each.
            step: How many of these a length that is written in steps counts for one.

        Raises:
            ValueError: Its parts do not fit into the stage.
        """
        from scionlm.core.duration import Duration

        def steps(length: int | float | str | None, default: float = 0.0) -> int:
            duration = Duration.parse(default if length is None else length)
            return duration.in_steps(total_steps, tokens_per_step) * (step if duration.unit == "steps" else 1)

        infinite = self.name == "infinite"
        default_decay: Decay = "exponential" if infinite else "one_minus_sqrt"
        return build_schedule(
            self.name,
            Sizes(
                total_steps,
                steps(self.warmup),
                self.start_lr_ratio,
                self.min_lr_ratio,
                decay=steps(self.decay, 0.1),
                decay_shape=self.decay_shape or default_decay,
                half_life=steps(self.half_life),
                cooldown=steps(self.cooldown, 0.6) if infinite else 0,
                cooldown_shape=self.cooldown_shape or "cosine",
                constant=self.constant_lr_ratio or 0.55,
                timescale=(self.timescale or 10.0) if infinite else (self.timescale or 0.0) * step,
            ),
        )


class AverageConfig(Section):
    """An average of the weights over training, exported in the place of the last ones."""

    method: Literal["ema", "uniform", "start"] = "ema"
    """`ema`: an exponential average; `uniform`: the plain mean of the weights, as of so many checkpoints; `start`: the
    last weights and those that training began with, between which a model forgets less."""
    decay: Beta = 0.999
    """ema: share of the old average that an update keeps."""
    start: Steps = 0
    """Where weights begin to be taken in."""
    every: Steps = 1
    """Steps between two that are taken in."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """start: share of the weights that training began with."""

    @model_validator(mode="after")
    def _only_what_applies(self) -> "AverageConfig":
        unused = {"ema": ("share",), "uniform": ("share", "decay"), "start": ("decay", "start", "every")}[self.method]
        if given := [key for key in unused if getattr(self, key) != type(self).model_fields[key].default]:
            raise ValueError(f"{given[0]} says nothing to average.method {self.method}; leave it out")
        return self
