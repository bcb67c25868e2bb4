"""The recipe: one schema for every YAML file, preset and override. DESIGN: what is not in this version must be null."""

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from scionlm.core.config import Mapping, Section
from scionlm.core.duration import Duration
from scionlm.core.quantities import Count, Length, Steps
from scionlm.families.initialization import Init
from scionlm.recipes.config_continual import UpstreamConfig
from scionlm.recipes.config_data import DataConfig, ReplayConfig, ReweightConfig
from scionlm.recipes.config_distill import SOURCE, DistillConfig
from scionlm.recipes.config_grow import GrowConfig, ReferenceConfig
from scionlm.recipes.config_inherit import SIZES, Fidelity, Importance, InheritConfig
from scionlm.recipes.config_shear import PruneConfig, ShearFidelity, TargetConfig
from scionlm.recipes.config_train import AverageConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from scionlm.recipes.lengths import has_times
from scionlm.recipes.model_shapes import init_of, read_model
from scionlm.recipes.stages import OptimizerState, Stage, StageConfig, check_stages, resolve_stages
from scionlm.schedules import Schedule

RUN_PREFIX = "run:"
"""What a source begins with that is the result of an earlier run of the same sweep."""

PRUNING = "pruning"
"""The stage in which a source is pruned."""


class EvaluateConfig(Section):
    """Held-out losses on the way and at the end."""

    every: Steps = 0.1
    """How often; the first evaluation is before the first step."""
    tokens_per_domain: Count = 32768
    """Budget of an evaluation in each domain, from the start of its held-out stream."""
    dense: bool | None = None
    """Also 1, 2, 4, 8, ... steps after each stage begins, up to `every`: most of what happens where data or learning
    rate change is over soon. Null does so in recipe continual."""
    tasks: list[str] = Field(default=[])
    """Tasks and suites at the end of the run, for the result, its source and its control: `offline`, a paper's such as
    `sheared`, or lm-eval's tasks by name."""

    @field_validator("tasks")
    @classmethod
    def _name_tasks(cls, names: list[str]) -> list[str]:
        if wrong := [name for name in names if not re.fullmatch(r"[\w.:/+-]+", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a task or a suite")
        return list(dict.fromkeys(names))


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

    recipe: Literal["inheritune", "shear", "continual", "scratch"]
    """Which recipe."""
    source: str | None = None
    """inheritune, shear, continual: MODEL to inherit from, to prune, or to go on with. Null in recipe continual with
    `branch` is that run's model."""
    reference: ReferenceConfig | None = None
    """inheritune: instead of `source`, a model that is trained first, into RUN/reference."""
    model: Mapping | None = None
    """scratch: the name of a known model, or its configuration by transformers' keys; what is left out is as
    transformers has it. `shape: NAME` among the keys begins with a known model's."""
    init: Init | None = None
    """How random weights are drawn, of a model from scratch, a reference, a control: as `transformers` does for the
    family, or as `tinyllama` or `gpt_neox` do. Null is the known model's own way, else transformers'."""
    data: DataConfig = DataConfig()
    upstream: UpstreamConfig | None = None
    """Text that is evaluated though it is not trained on: what the model knew before. Null in recipe continual is what
    it replays, or would with a share of more than 0: an earlier run, or a data folder."""
    inherit: InheritConfig | None = None
    """inheritune: what the child takes from the source."""
    grow: GrowConfig | None = None
    """inheritune: rounds of deeper children until the source is matched; null is one round."""
    target: TargetConfig | None = None
    """shear: the shape that is to be left."""
    prune: PruneConfig | None = None
    """shear: how it is reached, before `train`, which is then the recovery."""
    fidelity: Fidelity | ShearFidelity = "recommended"
    """To the paper. inheritune: `recommended` inherits all outside the layers; `paper-text` leaves final norm and
    position table fresh, which the text does not name; `paper-code` also an embedding that is not tied, as the code
    does. shear: the constants of `prune.gates` in the `paper`, in its `code`, or those that ended best."""
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

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, value: Any) -> Any:
        return read_model(value)

    @model_validator(mode="before")
    @classmethod
    def _source_of_branch(cls, config: Any) -> Any:
        """Let recipe continual go on with the model of the run that it branches off."""
        if not isinstance(config, dict) or config.get("recipe") != "continual" or config.get("source") is not None:
            return config
        run = (config.get("branch") or {}).get("run")
        if not isinstance(run, str):
            return config
        if run.startswith(RUN_PREFIX):
            return config | {"source": run}
        place = Path(run)
        place = place.parent.parent if place.parent.name == "checkpoints" else place  # of a checkpoint, its run
        return config | {"source": str(place / "model")}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        self._check_kind()
        timed = has_times(self.model_dump(mode="json"))
        check_stages(self.resolved_stages, timed)
        if self.has_teacher and not timed:
            _ = self.teacher_schedule
        if (stage := self.pruning_stage) is not None:
            self.check_pruning(stage)
        elif self.prune is not None:
            self._pruning_within({"tokens": None, "steps": 1})  # keys are checked where there is no budget, too
        if self.control and self.from_random:
            raise ValueError("control: true compares with random initialization, but this begins with it already")
        if self.control and self.branch:
            raise ValueError("a branch goes on from trained weights: a control would have nothing to go on from")
        return self

    def _check_kind(self) -> None:
        """Check that the keys of this kind of recipe are there, and those of the others are not."""
        kinds = ("recommended", "paper", "code") if self.recipe == "shear" else get_args(Fidelity)
        if self.fidelity not in kinds:
            raise ValueError(f"fidelity of recipe {self.recipe} is one of {', '.join(kinds)}, not {self.fidelity}")
        others = [key for key in ("target", "prune") if getattr(self, key) is not None]
        if others and self.recipe != "shear":
            raise ValueError(f"{others[0]} is for recipe shear, not {self.recipe}")
        checks = {
            "inheritune": self._check_inheritune,
            "shear": self._check_shear,
            "continual": self._check_continual,
            "scratch": self._check_scratch,
        }
        checks[self.recipe]()

    def _check_scratch(self) -> None:
        given = {"source": self.source, "reference": self.reference, "inherit": self.inherit, "grow": self.grow}
        if others := [key for key, value in given.items() if value is not None]:
            raise ValueError(f"recipe scratch inherits nothing; leave {', '.join(others)} out")
        if self.model is None:
            raise ValueError(
                "recipe scratch needs model, a known one such as tinyllama-120m or a configuration such as "
                "{model_type: llama, ...}"
            )
        if self.distill is not None and self.distill.teacher == SOURCE:
            raise ValueError("recipe scratch has no source to learn from; name a MODEL as distill.teacher")
        if any(own.get("reference") == SOURCE for own in self._reweightings()):
            raise ValueError("recipe scratch has no source to measure; set reweight.reference: best, or losses")

    def _check_continual(self) -> None:
        names = ("reference", "model", "inherit", "grow")
        if others := [key for key in names if getattr(self, key) is not None]:
            raise ValueError(f"recipe continual goes on with its source as it is; leave {', '.join(others)} out")
        if self.source is None:
            raise ValueError("recipe continual needs source (a MODEL), or branch (a run to go on from)")

    def _check_inheritune(self) -> None:
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

    def _check_shear(self) -> None:
        names = ("reference", "model", "inherit", "grow", "branch")
        if others := [key for key in names if getattr(self, key) is not None]:
            raise ValueError(f"recipe shear prunes its source to its target; leave {', '.join(others)} out")
        if self.source is None or self.target is None or self.prune is None:
            lacking = [key for key in ("source", "target", "prune") if getattr(self, key) is None]
            raise ValueError(f"recipe shear needs {', '.join(lacking)}")
        if self.prune.method != "masks" and self.fidelity != "recommended":
            raise ValueError(f"fidelity {self.fidelity} is of masks; method {self.prune.method} learns none")
        if self.control and (self.stages or self.reweight):
            raise ValueError(
                "a control of pruning and recovery has one stage and fixed weights; leave control out, or stages and "
                "reweight"
            )

    def check_pruning(self, stage: Stage) -> None:
        """Check that what goes on while a source is pruned fits into its steps.

        Raises:
            ValueError: It does not.
        """
        assert self.prune is not None
        check_stages([stage])
        steps, batch = stage.total_steps, stage.train.global_batch_tokens
        if self.prune.method == "masks":
            self.prune.check_gates(self.fidelity, steps, batch)  # pyright: ignore[reportArgumentType]
        if self.has_teacher and self.prune.distill and self.distill is not None:
            self.distill.build_schedule(steps, batch)

    def _reweightings(self) -> list[Mapping]:
        """Return the keys of `reweight`, of the top level and of the stages."""
        top = [self.reweight.model_dump()] if self.reweight else []
        return top + [stage.reweight for stage in self.stages if stage.reweight]

    @property
    def inherits(self) -> InheritConfig:
        """What the child takes from the source, of a recipe that has one; where masks are learned, as much of it."""
        if self.inherit is not None:
            return self.inherit
        assert self.prune is not None
        assert self.target is not None
        sizes: dict[str, Any] = {name: self.target.sizes.get(name) for name in SIZES}
        method, narrower = self.prune.method, any(size is not None for size in sizes.values())
        importance: Importance = self.prune.importance or "activation" if method == "scores" else "first"
        strategy = (self.prune.strategy or "block_influence") if method == "scores" else None
        if method == "random":
            importance, strategy = "random", f"random:{self.seed % 10**6}"
        layers = self.target.num_hidden_layers
        return InheritConfig(
            layers=layers,
            strategy=strategy if layers is not None else None,
            importance=importance if narrower else "first",
            **sizes,
        )

    @property
    def pruning_stage(self) -> Stage | None:
        """What is trained while the source is pruned, with everything filled in; None where nothing is."""
        if self.prune is None or not self.prune.is_trained:
            return None
        return self._pruning_within({"tokens": self.prune.tokens, "steps": self.prune.steps})

    def _pruning_within(self, budget: Mapping) -> Stage:
        assert self.prune is not None
        prune = self.prune
        keys = {key: getattr(prune, key) for key in ("data", "optimizer", "schedule")}
        own: Mapping = {key: value for key, value in keys.items() if value is not None}
        own["train"] = (prune.train or {}) | budget | {"time": None}
        if self.replay is not None and self.replay.stage is not None:
            own["replay"] = None  # there is no stage before it
        if "reweight" in prune.model_fields_set:
            own["reweight"] = prune.reweight
        return resolve_stages(self, [StageConfig(name=PRUNING, **own)])[0]

    @property
    def keeps_shape(self) -> bool:
        """Whether what is trained has the shape of what the recipe opens, whole: a source gone on with, or a shape."""
        return self.recipe == "continual" or self.model is not None

    @property
    def evaluates_densely(self) -> bool:
        """Whether losses are also measured soon after each stage begins, and ever more seldom."""
        return self.recipe == "continual" if self.evaluate.dense is None else self.evaluate.dense

    @property
    def from_random(self) -> bool:
        """Whether the model begins with random weights."""
        return self.model is not None or (self.inherit is not None and self.inherit.init == "random")

    @property
    def initialization(self) -> Init:
        """How random weights are drawn."""
        return self.init or init_of(self.model or (self.reference and self.reference.model))

    @property
    def resolved_stages(self) -> list[Stage]:
        """The stages with everything filled in; a recipe without any has one, called main."""
        return resolve_stages(self, self.stages)

    @property
    def trained_stages(self) -> list[Stage]:
        """All that is trained: the pruning where that is, then the stages."""
        return [*([self.pruning_stage] if self.pruning_stage is not None else []), *self.resolved_stages]

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
