"""A recipe on the devices of a run: how its weights lie there, and how many sequences go through in a pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from scionlm.core.devices import Device
from scionlm.core.errors import UsageError
from scionlm.planning.layout import Layout, choose_layout, fitting_rows
from scionlm.planning.memory import MemoryRequest, Teaching, training_memory
from scionlm.recipes.config import Recipe

Config = dict[str, Any]
_PER_NODE = 8  # GPUs in a machine, as they are usually sold


class Devices(NamedTuple):
    """The devices of a run, all alike.

    Attributes:
        kind: `cpu` or `cuda`.
        precision: What they compute in.
        memory_bytes: Of each; None where it is not known.
        world: How many there are.
        per_node: How many of them are in one machine.
    """

    kind: str
    precision: str
    memory_bytes: int | None
    world: int = 1
    per_node: int = 1

    @property
    def processors(self) -> int:
        """How many compute: all processes of a machine without GPUs have the same cores."""
        return self.world if self.kind == "cuda" else self.world // self.per_node


class Training(NamedTuple):
    """What is trained.

    Attributes:
        recipe: How.
        target: The model's `config.json`.
        teaching: The teacher, where something is learned from one.
    """

    recipe: Recipe
    target: Config
    teaching: Teaching | None = None

    def memory(self, devices: Devices, shards: int = 1, rows: int | None = None) -> dict[str, int]:
        """Return the bytes of each part on each device in the stage that needs the most; see `training_memory`.

        Args:
            devices: The devices.
            shards: How many of them hold one copy.
            rows: Sequences in a pass; None takes the recipe's.
        """
        recipe, found = self.recipe, dict[str, int]()
        for stage in recipe.resolved_stages:
            request = MemoryRequest(
                stage.data.seq_len,
                min(rows or stage.rows(devices.world), stage.rows(devices.world)),
                devices.precision,
                stage.optimizer.name,
                averages=int(recipe.average is not None),
                kind=devices.kind,
                checkpointing=recipe.train.activation_checkpointing,
                shards=shards,
            )
            parts = training_memory(self.target, request, self.teaching)
            found = max(found, parts, key=lambda parts: parts.get("total", 0))
        return found

    @property
    def is_open(self) -> bool:
        """Whether the recipe leaves the size of a pass open."""
        return any(stage.train.micro_batch_size == "auto" for stage in self.recipe.resolved_stages)

    def layout(self, devices: Devices) -> Layout:
        """Return how weights lie on the devices; where the size of a pass is open, one sequence has to fit."""
        rows = 1 if self.is_open else None

        def needed(shards: int) -> int:
            return self.memory(devices, shards, rows)["total"]

        asked = self.recipe.train.parallel
        return choose_layout(asked, devices.world, devices.per_node, needed, devices.memory_bytes)

    def fitting(self, devices: Devices, shards: int) -> list[int]:
        """Return the sequences in a pass that are worth a try."""
        most = max(-(-stage.sequences_per_step // devices.world) for stage in self.recipe.resolved_stages)
        return fitting_rows(most, lambda rows: self.memory(devices, shards, rows)["total"], devices.memory_bytes)


def shared_layout(trainings: Sequence[Training], devices: Devices) -> tuple[Layout, list[int]]:
    """Return how weights lie in all that one run trains, and the sequences in a pass that are worth a try.

    What needs the most devices for a copy decides, and what has room for the fewest sequences; the latter are none
    where the recipe says how many.

    Args:
        trainings: What is trained, one after another.
        devices: The devices.
    """
    layout = max((training.layout(devices) for training in trainings), key=lambda layout: layout.shards)
    fitting = [training.fitting(devices, layout.shards) for training in trainings if training.is_open]
    return layout, min(fitting, key=lambda sizes: sizes[-1], default=[])


def devices_of(device: Device, precision: str, world: int, per_node: int | None) -> Devices:
    """Return devices of one kind; processes on one processor share its memory.

    Raises:
        UsageError: Machines would not be alike.
    """
    on_gpu = device.kind == "cuda"
    each = per_node or min(world, _PER_NODE if on_gpu else world)
    if world < 1 or world % each:
        raise UsageError(f"{world} devices do not make machines of {each}")
    memory = device.memory_bytes
    return Devices(device.kind, precision, memory if on_gpu or not memory else memory // each, world, each)


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """Return a recipe with the size of a pass where it left that open."""

    def closed(train: Any) -> Any:
        return train | {"micro_batch_size": rows} if train and train.get("micro_batch_size") == "auto" else train

    stages = [
        stage.model_copy(update={"train": closed(stage.train)}) if stage.train else stage for stage in recipe.stages
    ]
    train = closed(recipe.train.model_dump())
    update = {"train": recipe.train.model_copy(update={"micro_batch_size": cast("Any", train)["micro_batch_size"]})}
    return recipe.model_copy(update=update | {"stages": stages})
