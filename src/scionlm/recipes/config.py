"""The recipe: one schema for every YAML file, preset and override. DESIGN: what is not in this version must be null."""

from typing import Literal

from pydantic import Field, model_validator

from scionlm.core.config import Mapping, Section
from scionlm.core.duration import Duration
from scionlm.core.quantities import Count, Length, Steps
from scionlm.recipes.config_data import DataConfig, ReplayConfig, ReweightConfig
from scionlm.recipes.config_distill import SOURCE, DistillConfig
from scionlm.recipes.config_grow import GrowConfig, ReferenceConfig
from scionlm.recipes.config_inherit import Fidelity, InheritConfig
from scionlm.recipes.config_train import AverageConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from scionlm.recipes.lengths import has_times
from scionlm.recipes.stages import OptimizerState, Stage, StageConfig, check_stages, resolve_stages
from scionlm.schedules import Schedule


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
    """How many of the newest stay; those at the end of a stage stay for good."""
    keep_every: Steps | None = None
    """Between two others that stay for good."""
    background: bool | Literal["auto"] = "auto"
    """Write while training goes on, from a copy in the processor's memory; `auto` does where that is not the one that
    is trained in: on GPUs."""


class ExportConfig(Section):
    """The result."""

    dtype: Literal["source", "float32", "bfloat16"] = "source"
    """Type of the saved weights; `source` is that of the source's."""


class BranchConfig(Section):
    """Another run's checkpoint to begin with: its weights, and as far as the first stage says its optimizer."""

    run: str
    """Run folder, or the folder of a checkpoint."""
    step: int | None = Field(default=None, ge=0)
    """Of the checkpoint; null takes the newest."""


class Recipe(Section):
    """A whole run."""

    recipe: Literal["inheritune", "scratch"]
    """Which recipe."""
    source: str | None = None
    """inheritune: MODEL to inherit from."""
    reference: ReferenceConfig | None = None
    """inheritune: instead of `source`, a model that is trained first, into RUN/reference."""
    model: Mapping | None = None
    """scratch: configuration of the model by transformers' keys; what is left out is as transformers has it."""
    data: DataConfig = DataConfig()
    inherit: InheritConfig | None = None
    """inheritune: what the child takes from the source."""
    grow: GrowConfig | None = None
    """inheritune: rounds of deeper children until the source is matched; null is one round."""
    fidelity: Fidelity = "recommended"
    """To Inheritune: `recommended` inherits all outside the layers. `paper-text` leaves final norm and position table
    fresh, which its text does not name; `paper-code` also an embedding that is not tied, as its code does."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer_state: OptimizerState = "keep"
    """What a stage takes over of the optimizer's state: `keep` it, `reset` it, or the second `moments` alone."""
    replay: ReplayConfig | None = None
    """Earlier data in a share of every batch."""
    reweight: ReweightConfig | None = None
    """Weights of the domains that move by what is measured."""
    stages: list[StageConfig] = Field(default=[])
    """Stretches of training, one after the other; what one leaves unset comes from the top level."""
    branch: BranchConfig | None = None
    """Where to begin, instead of from the inherited weights."""
    average: AverageConfig | None = None
    """An average of the weights, exported in the place of the last ones."""
    distill: DistillConfig | None = None
    """Learning from a teacher beside the text; null does not."""
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    track: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Where metrics go beside RUN/metrics.jsonl."""
    control: bool = False
    """Also train the randomly initialised control of the same shape, on the same batches, into RUN/control."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of samples, of random initialization and of sample text."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        self._check_kind()
        timed = has_times(self.model_dump(mode="json"))
        check_stages(self.resolved_stages, timed)
        if self.has_teacher and not timed:
            _ = self.teacher_schedule
        if self.control and self.from_random:
            raise ValueError("control: true compares with random initialization, but this begins with it already")
        if self.control and self.branch:
            raise ValueError("a branch goes on from trained weights: a control would have nothing to go on from")
        return self

    def _check_kind(self) -> None:
        """Check that the keys of this kind of recipe are there, and those of the other are not."""
        if self.recipe == "scratch":
            given = {"source": self.source, "reference": self.reference, "inherit": self.inherit, "grow": self.grow}
            if others := [key for key, value in given.items() if value is not None]:
                raise ValueError(f"recipe scratch inherits nothing; leave {', '.join(others)} out")
            if self.model is None:
                raise ValueError("recipe scratch needs model, a configuration such as {model_type: llama, ...}")
            if self.distill is not None and self.distill.teacher == SOURCE:
                raise ValueError("recipe scratch has no source to learn from; name a MODEL as distill.teacher")
            if any(own.get("reference") == SOURCE for own in self._reweightings()):
                raise ValueError("recipe scratch has no source to measure; set reweight.reference: best, or losses")
            return
        if self.model is not None:
            raise ValueError("model is for recipe scratch; recipe inheritune has the source's shape")
        if (self.source is None) == (self.reference is None):
            raise ValueError("set either source (a MODEL) or reference (one that is trained first), the other null")
        if self.reference is not None and self.stages:
            raise ValueError(
                "a reference is trained in one stage, the child in several; train it by recipe scratch, with the same "
                "stages, and name its model as source"
            )
        if self.inherit is None:
            raise ValueError("inherit is required: what the child takes from the source")
        if self.grow is not None and self.branch is not None:
            raise ValueError("a branch goes on with weights of its own, rounds of growth begin with others")
        if self.grow is not None and self.grow.base == "student" and self.control and (self.stages or self.reweight):
            raise ValueError(
                "grow.from student: a control of all its rounds has one stage and fixed weights; leave control out, or "
                "stages and reweight"
            )

    def _reweightings(self) -> list[Mapping]:
        """Return the keys of `reweight`, of the top level and of the stages."""
        top = [self.reweight.model_dump()] if self.reweight else []
        return top + [stage.reweight for stage in self.stages if stage.reweight]

    @property
    def inherits(self) -> InheritConfig:
        """What the child takes from the source, of a recipe that has one."""
        assert self.inherit is not None
        return self.inherit

    @property
    def from_random(self) -> bool:
        """Whether the model begins with random weights."""
        return self.inherit is None or self.inherit.init == "random"

    @property
    def resolved_stages(self) -> list[Stage]:
        """The stages with everything filled in; a recipe without any has one, called main."""
        return resolve_stages(self, self.stages)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(stage.total_steps for stage in self.resolved_stages)

    @property
    def total_tokens(self) -> int:
        """Predicted tokens of the run, padding included."""
        return sum(stage.total_steps * stage.train.global_batch_tokens for stage in self.resolved_stages)

    def steps(self, length: int | float | str) -> int:
        """Return a duration of the whole run in steps."""
        return Duration.parse(length).in_steps(self.total_steps, self.total_tokens // self.total_steps)

    @property
    def has_teacher(self) -> bool:
        """Whether something is learned from a teacher."""
        return self.distill is not None and (self.distill.weight > 0 or self.distill.hidden is not None)

    @property
    def teacher_schedule(self) -> Schedule:
        """Multiplier of the teacher's weights by finished steps of the run.

        Raises:
            ValueError: It is longer than the run.
        """
        distill = self.distill or DistillConfig()
        return distill.build_schedule(self.total_steps, self.total_tokens // self.total_steps)

    @property
    def teacher_steps(self) -> int:
        """Steps of the run, from the first, in which the teacher is asked."""
        if not self.has_teacher:
            return 0
        schedule = self.teacher_schedule
        return schedule.pieces[0].steps if schedule.pieces[-1].end == 0 else self.total_steps
