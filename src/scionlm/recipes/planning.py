"""`scion plan`: what a recipe will take, from it and the source's config.json alone."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from scionlm.core.devices import GPUS, Device, driver_gpus, gpu_by_name, this_machine
from scionlm.core.errors import DataError, UsageError
from scionlm.core.log import say, warn
from scionlm.core.records import Record
from scionlm.families import ModelShape, count_parameters, flops_per_token
from scionlm.planning.layout import Layout
from scionlm.planning.memory import Teaching, checkpoint_bytes
from scionlm.recipes.advice import advice
from scionlm.recipes.bill import Part, disk_bytes, epochs_of, evaluated_tokens
from scionlm.recipes.budgets import with_budgets
from scionlm.recipes.config import RUN_PREFIX, Recipe
from scionlm.recipes.inputs import check_enough, check_text, match_layers, open_teacher
from scionlm.recipes.layout import Devices, Training, devices_of, shared_layout, with_rows
from scionlm.recipes.lengths import has_times
from scionlm.recipes.measured import DEPTHS
from scionlm.recipes.origin import REFERENCE, check_model_keys, model_of, open_source
from scionlm.recipes.reference import reference_recipe
from scionlm.recipes.rounds import CONTROL, add_rounds, check_growth, goes_on, round_shapes
from scionlm.recipes.selection import plan_of
from scionlm.recipes.shear_steps import pruning_recipe, shrinking, target_candidates, target_shape, with_target
from scionlm.recipes.targets import config_with
from scionlm.recipes.timing import resolve_times
from scionlm.schedules import curve, describe
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.target import target_config

_CURVE_POINTS = 200
_FORWARD = 1 / 3  # of the operations of a training token
_AGAIN = {"none": 1.0, "selective": 1.16, "full": 4 / 3}
"""How much longer training is by what is made again on the way back: of `full` a forward pass by its operations, of
`selective`, which keeps the products, as it was measured (docs/results/speed.md)."""
Config = dict[str, Any]
Timed = Callable[[Recipe, Config, Record], Record]
"""What puts measured times into the plan of one model: of its recipe, its configuration and the plan by the table."""


class Place(NamedTuple):
    """Where a model is trained.

    Attributes:
        device: One of the devices.
        devices: All of them.
        layout: How weights lie on them.
    """

    device: Device
    devices: Devices
    layout: Layout


def plan_recipe(
    recipe: Recipe,
    device: str | None = None,
    world: int = 1,
    per_node: int | None = None,
    timed: Timed | None = None,
) -> Record:
    """Return what a recipe will take.

    Args:
        recipe: The recipe.
        device: Name of one in the table; None takes this machine's.
        world: How many of them.
        per_node: How many in one machine; None puts all into one, up to eight.
        timed: Acts on the plan of every model that is trained; None leaves the times of the table.

    Raises:
        UsageError: The device is not known, or layers or domains asked for are not there; machines would not be alike.
        DataError: The source is broken or of an unknown family.
    """
    source = open_source(recipe, None, weights=False)
    if (made := model_of(recipe)) is not None:
        check_model_keys(*made)
    found = find_device(device)
    shapes = target_candidates(recipe.target, source, found) if recipe.target else []
    recipe = with_target(recipe, source, found)
    plan = plan_of(recipe, source)
    if recipe.inherit and recipe.inherit.strategy in DEPTHS and recipe.inherit.analysis is None:
        say(f"{recipe.inherit.strategy} counts layers when the run begins; until then this is of {len(plan.keep)}")
    target = target_config([source.config], plan, for_a_plan=True)
    model = open_teacher(recipe, source, weights=False)
    teacher = model and model.config
    layers = match_layers(recipe, source, model, plan)
    for one in (source,) if model is None or model is source else (source, model):
        check_text(recipe, one)
    asked = recipe
    if has_times(recipe.model_dump(mode="json")):
        count = devices_of(found, "", world, per_node).processors
        recipe = resolve_times(recipe, [s / count for s in table_seconds(recipe, target, teacher, found)])
    check_growth(recipe, plan, source)
    teaching = teaching_of(recipe, teacher, len(layers))
    planned = plan_run(recipe, source.config, plan, found, teaching, world, per_node, timed)
    whole = None if recipe.recipe == "scratch" else count_parameters(source.config)["total"]
    rounds = len(round_shapes(recipe, plan)) if goes_on(recipe) else 1
    planned |= {
        "source_parameters": whole,
        "source_memory_bytes": 4 * (whole or 0) // planned["layout"]["shards"],  # which is evaluated in float32
        "epochs": epochs_of(recipe, rounds),
    }
    run = recipe.branch.run if recipe.branch else RUN_PREFIX
    if not run.startswith(RUN_PREFIX) and not Path(run).is_dir():
        warn(f"a run would be refused: branch.run: {run} is not there")
    try:
        check_enough(asked, plan)
    except (DataError, UsageError) as error:  # what a budget will take may be asked before all of the text is there
        warn(f"a run would be refused: {error}")
    planned["advice"] = advice(recipe, target, planned)
    return with_budgets(recipe, planned) | ({"candidates": [asdict(each) for each in shapes]} if shapes else {})


def plan_run(
    recipe: Recipe,
    source: Config,
    plan: SurgeryPlan,
    device: Device,
    teaching: Teaching | None = None,
    world: int = 1,
    per_node: int | None = None,
    timed: Timed | None = None,
) -> Record:
    """Return what a whole run will take: of one model, or at the most of its reference and all rounds that may come.

    Args:
        recipe: The recipe.
        source: The source's `config.json`.
        plan: The layers of the model, or of the first round's.
        device: What it is trained on.
        teaching: The teacher, where something is learned from one.
        world: On how many of these.
        per_node: How many of them are in one machine; None puts all into one, up to eight.
        timed: Acts on the plan of every model that is trained.
    """

    def placed(recipe: Recipe, trainings: list[Training]) -> tuple[Recipe, Place]:
        """Return a recipe with the size of a pass, and where it is trained."""
        devices = devices_of(device, _precision(recipe, device), world, per_node)
        layout, sizes = shared_layout(trainings, devices)
        return with_rows(recipe, sizes[-1]) if sizes else recipe, Place(device, devices, layout)

    def of_model(
        recipe: Recipe, target: Config, teaching: Teaching | None, with_source: bool = True, part: Part = "model"
    ) -> Record:
        planned = plan_model(recipe, source, target, places[recipe.recipe], teaching, with_source, part)
        return planned if timed is None else timed(recipe, target, planned)

    places: dict[str, Place] = {}
    reference = None if recipe.reference is None else reference_recipe(recipe)
    if reference is not None:
        reference, places[reference.recipe] = placed(reference, [Training(reference, source)])
    recipe, places[recipe.recipe] = placed(recipe, trainings_of(recipe, source, plan, teaching))
    alone = recipe.model_copy(update={"control": False})
    first = of_model(recipe, target_config([source], plan, for_a_plan=True), teaching)
    if recipe.prune is not None:
        return _plan_shear(recipe, source, plan, first, teaching, of_model)
    if recipe.grow is None and recipe.reference is None:
        return first
    shapes = [target_config([source], shape, for_a_plan=True) for shape in round_shapes(recipe, plan)]
    rounds = [of_model(alone, shape, teaching, number == 0) for number, shape in enumerate(shapes)]
    parts = {
        f"round {n} ({ModelShape.of(shapes[n - 1]).num_hidden_layers} layers)": one for n, one in enumerate(rounds, 1)
    }
    if recipe.grow is None:
        parts = {"child": rounds[0]}
    if reference is not None:
        parts = {"reference": of_model(reference, source, None)} | parts
    if recipe.control:
        times = len(rounds) if goes_on(recipe) else 1  # what the child's weights see
        control = _for_steps(alone, times * recipe.total_steps) if times > 1 else alone
        parts[CONTROL] = of_model(control, shapes[-1], teaching, False, "control")
    return _all(parts, first, rounds[-1])


def trainings_of(recipe: Recipe, source: Config, plan: SurgeryPlan, teaching: Teaching | None) -> list[Training]:
    """Return the largest of what a run trains, all of which lies on its devices in one way; see `plan_run`.

    A reference is not among it: it is a run of its own.
    """
    largest = target_config([source], round_shapes(recipe, plan)[-1], for_a_plan=True)
    if recipe.prune is None or recipe.pruning_stage is None:
        return [Training(recipe, largest, teaching)]
    left = target_config([source], plan, for_a_plan=True)  # the source is trained first; what is left of it is smaller
    taught = teaching if recipe.prune.distill else None
    return [Training(pruning_recipe(recipe), largest, taught), Training(recipe, left, teaching)]


def _plan_shear(
    recipe: Recipe,
    source: Config,
    plan: SurgeryPlan,
    recovery: Record,
    teaching: Teaching | None,
    of_model: Callable[..., Record],
) -> Record:
    """Return what pruning and recovery will take; see `plan_run`."""
    assert recipe.prune is not None
    parts: dict[str, Record] = {}
    if recipe.pruning_stage is not None:
        steps = shrinking(recipe, source)
        for number, step in enumerate(steps, 1):
            name = "pruning" if len(steps) == 1 else f"pruning, step {number}"
            cut = source if recipe.prune.method == "masks" else config_with(source, target_shape(step, source))
            taught = teaching if recipe.prune.distill else None
            parts[name] = of_model(pruning_recipe(step), cut, taught, number == 1, "pruning")
    target = target_config([source], plan, for_a_plan=True)
    alone = recipe.model_copy(update={"control": False})
    parts["recovery"] = of_model(alone, target, teaching, not parts)
    if recipe.control:
        before = sum(part["num_tokens"] for name, part in parts.items() if name != "recovery")
        control = _for_steps(alone, recipe.total_steps + -(-before // recipe.train.global_batch_tokens))
        parts[CONTROL] = of_model(control, target, teaching, False, "control")
    return _all(parts, recovery, recovery)


def _all(parts: dict[str, Record], first: Record, last: Record) -> Record:
    """Return the plan of several models; memory is that of the largest, and what the result has that of the last."""
    largest = max(parts.values(), key=lambda part: part["memory_bytes_per_device"])
    result = add_rounds(first | {"models_trained": 1}, largest, parts)
    result |= {key: last[key] for key in ("num_parameters", "parameters_by_part")}
    return result | {"checkpoint_bytes": max(part["checkpoint_bytes"] for part in parts.values())}


def _for_steps(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe of one stage with another number of steps."""
    train = recipe.train.model_copy(update={"steps": steps, "tokens": None, "time": None})
    return recipe.model_copy(update={"train": train})


def teaching_of(recipe: Recipe, teacher: Config | None, layers: int) -> Teaching | None:
    """Return what decides the memory of a teacher, by its `config.json` and how many layers learn from its own."""
    if teacher is None or recipe.distill is None:
        return None
    return Teaching(teacher, layers, recipe.distill.hidden_error)


def teacher_flops(teacher: Config, seq_len: int) -> float:
    """Return the operations of a token's way through the teacher."""
    return _FORWARD * flops_per_token(teacher, seq_len)


def run_flops(recipe: Recipe, target: Config, teacher: Config | None) -> int:
    """Return the operations that training a model by a recipe takes, its teacher's included."""
    return sum(sum(parts) for parts in _stage_flops(recipe, target, teacher))


def _stage_flops(recipe: Recipe, target: Config, teacher: Config | None) -> list[tuple[int, int]]:
    """Return the operations of student and teacher in each stage."""
    found: list[tuple[int, int]] = []
    asked = recipe.teacher_steps if teacher else 0
    for stage in recipe.resolved_stages:
        tokens = stage.total_steps * stage.train.global_batch_tokens
        mine = tokens * flops_per_token(target, stage.data.seq_len)
        taught = min(asked, stage.total_steps) * stage.train.global_batch_tokens
        asked -= min(asked, stage.total_steps)
        found.append((mine, round(taught * teacher_flops(teacher, stage.data.seq_len)) if teacher else 0))
    return found


def table_seconds(recipe: Recipe, target: Config, teacher: Config | None, device: Device) -> list[float]:
    """Return the seconds of a step in each stage, by the device's entry in the table."""
    precision = _precision(recipe, device)
    speed = device.peak(precision) * device.reached(precision, ModelShape.of(target).hidden_size)

    def flops(seq_len: int) -> float:
        mine = _AGAIN[recipe.train.activation_checkpointing] * flops_per_token(target, seq_len)
        return mine + (teacher_flops(teacher, seq_len) if teacher else 0.0)

    return [stage.train.global_batch_tokens * flops(stage.data.seq_len) / speed for stage in recipe.resolved_stages]


def _precision(recipe: Recipe, device: Device) -> str:
    asked = recipe.train.precision
    return asked if asked != "auto" else "bf16" if device.has_bf16 else "fp32"


def find_device(name: str | None) -> Device:
    """Return a device by its name in the table, or this machine's.

    Raises:
        UsageError: There is none of that name.
    """
    if name is not None and name != "this":
        found = gpu_by_name(name)
        if found is None:
            raise UsageError(f"--device {name} is not in the table (known: {', '.join(d.name for d in GPUS.values())})")
        return found
    found = this_machine()
    if found.kind == "cpu" and (cards := driver_gpus()):
        warn(
            f"{cards[0]} is not in the table of devices: the plan is of the processor beside it; --device NAME takes "
            "a card that is like it, --calibrate measures this one"
        )
    return found


def plan_model(
    recipe: Recipe,
    source: Config,
    target: Config,
    place: Place,
    teaching: Teaching | None = None,
    with_source: bool = True,
    part: Part = "model",
) -> Record:
    """Return what training a model of a known configuration will take.

    Args:
        recipe: The recipe, with the size of a pass.
        source: The source's `config.json`.
        target: The model's.
        place: Where it is trained.
        teaching: The teacher, where something is learned from one.
        with_source: Count what evaluating the source takes.
        part: What of the run it is; see `evaluated_tokens`.
    """
    device, devices, layout = place
    memory = Training(recipe, target, teaching).memory(devices, layout.shards)
    teacher = teaching and teaching.config
    precision = _precision(recipe, device)
    utilization = device.reached(precision, ModelShape.of(target).hidden_size)
    speed = device.peak(precision) * utilization * devices.processors
    stages: list[Record] = []
    first = 0
    flops = _stage_flops(recipe, target, teacher)
    for stage, parts in zip(recipe.resolved_stages, flops, strict=True):
        tokens = stage.total_steps * stage.train.global_batch_tokens
        schedule = stage.build_schedule()
        stages.append({
            "name": stage.name,
            "steps": stage.total_steps,
            "tokens": tokens,
            "flops": sum(parts),
            "lr": stage.optimizer.lr,
            "schedule": describe(schedule, stage.optimizer.lr),
            "curve": [[first + t, value * stage.optimizer.lr] for t, value in curve(schedule, _CURVE_POINTS)],
        })  # fmt: skip
        first += stage.total_steps
    models = 1 + recipe.control
    mine, taught = (sum(parts[k] for parts in flops) for k in (0, 1))
    again = _AGAIN[recipe.train.activation_checkpointing]
    seconds = {"training": models * again * mine / speed} | ({"teacher": models * taught / speed} if teacher else {})
    windows = evaluated_tokens(recipe, source, target, with_source, part)
    evaluation = sum(
        tokens * flops_per_token(config, recipe.data.seq_len) * _FORWARD / speed for config, tokens in windows
    )
    parameters = count_parameters(target)
    checkpoint = checkpoint_bytes(target, recipe.optimizer.name, int(recipe.average is not None), teaching)
    once = sum(seconds.values()) / models
    return {
        "recipe": recipe.recipe,
        "source": recipe.source or (REFERENCE if recipe.reference else None),
        "num_parameters": parameters["total"],
        "vocab_size": ModelShape.of(target).vocab_size,
        "parameters_by_part": {k: n for k, n in parameters.items() if k != "total"},
        "num_tokens": recipe.total_tokens,
        "num_steps": recipe.total_steps,
        "flops": mine + taught,
        "teacher_flops": taught,
        "models_trained": models,
        "precision": precision,
        "device": device.name,
        "device_memory_bytes": devices.memory_bytes,
        "devices": devices.world,
        "layout": {"name": layout.name, "shards": layout.shards, "replicas": layout.replicas, "why": layout.why},
        "micro_batch_size": max(stage.rows(devices.world) for stage in recipe.resolved_stages),
        "peak_flops": device.peak(precision),
        "utilization": utilization,
        "seconds": sum(seconds.values()) + evaluation,
        "seconds_by_part": seconds | {"evaluation": evaluation},
        "seconds_known_from": "device table",
        "memory_bytes_per_device": memory["total"],
        "memory_by_part": {part: size for part, size in memory.items() if part != "total"},
        "checkpoint_bytes": checkpoint,
        "disk_bytes": models * disk_bytes(recipe, source, checkpoint, parameters["total"], once),
        "stages": stages,
    }  # fmt: skip
