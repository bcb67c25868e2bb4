"""The stages of a recipe: each a stretch of training with its own data, budget, schedule and optimizer."""

import math
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from scionlm.core.config import Mapping, Section, nearest, validate
from scionlm.core.duration import Duration
from scionlm.core.errors import UsageError
from scionlm.recipes.config_data import DataConfig, ReplayConfig, ReweightConfig
from scionlm.recipes.config_inherit import cleared_by
from scionlm.recipes.config_shear import BUDGETS
from scionlm.recipes.config_train import OptimizerConfig, ScheduleConfig, TrainConfig
from scionlm.schedules import Schedule

OptimizerState = Literal["keep", "reset", "moments"]

MAIN = "main"
_SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "replay": ReplayConfig,
    "reweight": ReweightConfig,
}


# One of these keys set in a stage, or in a run of a sweep, clears the other of the top level.
_EXCLUDING = (
    ("steps", "tokens"),
    ("steps", "time"),
    ("tokens", "steps"),
    ("tokens", "time"),
    ("time", "tokens"),
    ("time", "steps"),
    ("mixture", "temperature"),
    ("temperature", "mixture"),
    ("stage", "run"),
    ("stage", "data"),
    ("run", "stage"),
    ("data", "stage"),
)
_ANY_SCHEDULE = ("warmup", "start_lr_ratio", "min_lr_ratio")
_WHOLE_RUN = ("precision", "compile", "skip_nonfinite", "z_loss", "parallel", "activation_checkpointing", "attention")


class StageConfig(Section):
    """One stage as a recipe writes it: any keys of the sections, the others as at the top level."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")
    """Its name, which is part of the key of its samples' order."""
    data: Mapping | None = None
    """Keys of `data`."""
    train: Mapping | None = None
    """Keys of `train`: its own budget above all."""
    optimizer: Mapping | None = None
    """Keys of `optimizer`."""
    schedule: Mapping | None = None
    """Keys of `schedule`, which goes over this stage."""
    optimizer_state: OptimizerState | None = None
    """What it takes over of the optimizer's state."""
    replay: Mapping | None = None
    """Keys of `replay`; null is none, whatever the top level says."""
    reweight: Mapping | None = None
    """Keys of `reweight`; null is none, whatever the top level says."""

    @model_serializer(mode="wrap")
    def _what_was_set(self, serialize: SerializerFunctionWrapHandler) -> Mapping:
        """Leave out what was left out: an explicit null means something else."""
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}


class Span(NamedTuple):
    """Where a stage stands in its run, in tokens.

    Attributes:
        before: Tokens of the stages before it.
        total: Of all stages.
        unit: Largest number that divides every stage's batch.
        first_batch: Batch of the first stage.
    """

    before: int
    total: int
    unit: int
    first_batch: int


class Stage(Section):
    """One stage with everything filled in."""

    name: str
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    optimizer_state: OptimizerState
    replay: ReplayConfig | None
    reweight: ReweightConfig | None
    span: Span | None = None

    @property
    def total_steps(self) -> int:
        """Its optimizer steps."""
        return self.train.num_steps

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step."""
        return self.train.global_batch_tokens // self.data.seq_len

    def rows(self, world: int = 1) -> int:
        """Return the sequences in a pass of one of `world` devices; all of its own while the recipe says `auto`."""
        own = -(-self.sequences_per_step // world)
        return own if self.train.micro_batch_size == "auto" else min(self.train.micro_batch_size, own)

    def steps(self, length: int | float | str) -> int:
        """Return a duration of this stage in steps."""
        return Duration.parse(length).in_steps(self.total_steps, self.train.global_batch_tokens)

    def build_schedule(self) -> Schedule:
        """Return its schedule; where this goes over the whole run, the stretch of it that the stage is."""
        batch = self.train.global_batch_tokens
        if self.schedule.over == "stage" or self.span is None:
            return self.schedule.build(self.total_steps, batch)
        before, total, unit, first_batch = self.span
        whole = self.schedule.build(total // unit, unit, first_batch // unit)
        return whole.stretch(before // unit, self.total_steps, batch // unit)


class TopLevel(Protocol):
    """What stages fall back on."""

    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    optimizer_state: OptimizerState
    replay: ReplayConfig | None
    reweight: ReweightConfig | None


def resolve_stages(top: TopLevel, stages: list[StageConfig]) -> list[Stage]:
    """Return the stages with everything filled in.

    Args:
        top: The recipe.
        stages: As it writes them; none makes one of its top level.

    Raises:
        UsageError: A stage names a key that is not there, or a value is wrong.
    """
    resolved = [_resolve(top, stage) for stage in stages or [StageConfig(name=MAIN)]]
    batches = [stage.train.global_batch_tokens for stage in resolved]
    ends = [0]
    for stage, batch in zip(resolved, batches, strict=True):
        ends.append(ends[-1] + stage.total_steps * batch)
    where = (Span(before, ends[-1], math.gcd(*batches), batches[0]) for before in ends[:-1])
    return [stage.model_copy(update={"span": span}) for stage, span in zip(resolved, where, strict=True)]


def _resolve(top: TopLevel, stage: StageConfig) -> Stage:
    for key in _WHOLE_RUN:
        if key in (stage.train or {}):
            raise UsageError(f"stage {stage.name!r}: train.{key} is for the whole run; set it at the top level")
    sections: dict[str, Any] = {"name": stage.name}
    for name, schema in _SECTIONS.items():
        own: Mapping | None = getattr(stage, name)
        base: Section | None = getattr(top, name)
        if name not in stage.model_fields_set or (own is None and name not in ("replay", "reweight")):
            sections[name] = base
            continue
        if own is None:
            sections[name] = None
            continue
        values = left_of(name, base.model_dump(mode="json") if base else {}, own)
        sections[name] = validate(schema, values | own, f"stage {stage.name!r}, {name}")
    if sections["replay"] is not None and not sections["replay"].fraction:
        sections["replay"] = None
    return Stage(**sections, optimizer_state=stage.optimizer_state or top.optimizer_state)


def left_of(name: str, base: Mapping, own: Mapping) -> Mapping:
    """Return what still counts of the top level's section `name` where a stage, or a run of a sweep, has its own keys.

    Args:
        name: Of the section.
        base: The top level's keys.
        own: Those that are set over them.
    """
    cleared = {other for one, other in _EXCLUDING if own.get(one) is not None and other not in own}
    if name == "target":  # one way to say a shape clears the others, and sizes clear them all
        ways = {"shape", *BUDGETS}
        cleared = set(base) - set(own) if ways & set(own) else ways
    if name == "inherit":
        cleared = set(cleared_by(own, {key for key, value in own.items() if value is not None}))
    values = {key: value for key, value in base.items() if key not in cleared}
    if name == "schedule":
        usual = ScheduleConfig.model_fields["name"].default
        before = values.get("name", usual)
        if own.get("name", before) != before:  # what the top level's needs means nothing to another schedule
            values = {key: value for key, value in values.items() if key in _ANY_SCHEDULE}
    return values


def check_stages(stages: list[Stage], timed: bool = False) -> None:
    """Check what sections cannot check alone.

    Args:
        stages: All of them.
        timed: Some lengths are times still, and cannot be added up yet.

    Raises:
        ValueError: A budget is missing or two keys contradict each other; the message names the stage.
    """
    for number, stage in enumerate(stages):
        where = "" if [s.name for s in stages] == [MAIN] else f"stage {stage.name!r}: "
        if [s.name for s in stages].count(stage.name) > 1:
            raise ValueError(f"{where}another stage has this name")
        if (stage.train.tokens, stage.train.steps, stage.train.time) == (None, None, None):
            raise ValueError(f"{where}set either train.tokens or train.steps (or train.time)")
        if stage.train.global_batch_tokens % stage.data.seq_len:
            raise ValueError(
                f"{where}train.global_batch_tokens {stage.train.global_batch_tokens} is not a multiple of "
                f"data.seq_len {stage.data.seq_len}"
            )
        if stage.reweight and stage.data.ramp:
            raise ValueError(f"{where}data.ramp and reweight both move the weights; set one of them to null")
        if not timed:
            _check_schedule(stage, where)
        _check_replay(stage, stages[:number], where)
        if number and stage.optimizer.name != stages[number - 1].optimizer.name and stage.optimizer_state != "reset":
            raise ValueError(f"{where}another optimizer.name has another state; set optimizer_state: reset")


def _check_schedule(stage: Stage, where: str) -> None:
    warmup = stage.steps(stage.schedule.warmup)
    if warmup > stage.total_steps and stage.schedule.over == "stage":
        raise ValueError(
            f"{where}schedule.warmup {stage.schedule.warmup} is longer than the run of {stage.total_steps} steps"
        )
    try:
        stage.build_schedule()
    except ValueError as error:
        raise ValueError(f"{where}schedule {stage.schedule.name}: {error}") from error


def _check_replay(stage: Stage, earlier: list[Stage], where: str) -> None:
    wanted = stage.replay.stage if stage.replay else None
    if wanted is None:
        return
    replayed = next((one for one in earlier if one.name == wanted), None)
    if replayed is None:
        raise ValueError(
            f"{where}replay.stage {wanted!r} is no earlier stage{nearest(wanted, [e.name for e in earlier])}"
        )
    if replayed.data.seq_len != stage.data.seq_len:
        raise ValueError(
            f"{where}replay.stage {wanted!r} has sequences of {replayed.data.seq_len} tokens, this stage "
            f"{stage.data.seq_len}; set data.seq_len to the same"
        )
