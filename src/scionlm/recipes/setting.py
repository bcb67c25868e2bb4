"""A run's inputs together with the machine it runs on, and what recipes measure with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.devices import this_machine
from scionlm.core.log import Progress, format_bytes, warn
from scionlm.core.machine import versions
from scionlm.core.records import Record, read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data import DataFolder
from scionlm.evaluation.generate import write_samples
from scionlm.evaluation.loss import DomainLoss, TokenNll, domain_losses
from scionlm.families.models import assemble, layers_of
from scionlm.parallel.placing import place
from scionlm.parallel.ranks import ALONE, Ranks
from scionlm.parallel.runtime import Runtime, check_attention, resolve_compile, start_runtime
from scionlm.planning.memory import LESS_MEMORY, TIGHT
from scionlm.recipes.calibrate import choose_rows
from scionlm.recipes.config import PRUNING, Recipe
from scionlm.recipes.inputs import Inputs, StageInputs
from scionlm.recipes.layout import Devices, Training, shared_layout, with_rows
from scionlm.recipes.order import sampling_of
from scionlm.recipes.planning import plan_run, run_flops, teaching_of, trainings_of
from scionlm.recipes.rounds import round_shapes
from scionlm.recipes.run import write_config, write_manifest
from scionlm.recipes.siblings import is_in_sweep, measured_beside
from scionlm.recipes.tasks import require_tasks
from scionlm.sources import ModelFolder, load_hf_model, load_tokenizer
from scionlm.surgery.target import target_config


@dataclass(frozen=True, kw_only=True)
class Setting(Inputs):
    """Inputs that are ready to run.

    Attributes:
        runtime: The device.
        stop: Asked between pieces of work.
        folder: The run folder.
        allow_change: Go on with a checkpoint although what it was made with has changed.
        followed: Folder of the model whose control this is, and whose batches it sees; None where it is none.
    """

    runtime: Runtime
    stop: StopRequest
    folder: Path
    allow_change: bool = False
    followed: Path | None = None

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.runtime.ranks

    def kept(self, path: Path, make: Callable[[], Record]) -> Record:
        """Return the record in a file, after making and writing it where it is not there; all ranks have to ask."""
        if not self.ranks.on_main(path.exists):
            record = make()
            self.ranks.on_main(lambda: write_json(path, record))
        return self.ranks.on_main(lambda: read_json(path))


def settle(inputs: Inputs, out: Path, stop: StopRequest, ranks: Ranks = ALONE, allow_change: bool = False) -> Setting:
    """Choose the devices, resolve what the recipe leaves to `auto`, and write config and manifest into `out`."""
    recipe, source = inputs.recipe, inputs.source
    ranks.on_main(lambda: require_tasks(recipe.evaluate.tasks, inputs.held_out))
    runtime = start_runtime(recipe.train.precision, ranks)
    runtime = replace(runtime, precision=ranks.share(runtime.precision))
    largest = round_shapes(recipe, inputs.plan)[-1]
    target = target_config([source.config], largest)
    teacher = inputs.teacher and inputs.teacher.config
    teaching = teaching_of(recipe, teacher, len(inputs.taught_layers))
    devices = Devices(runtime.kind, runtime.precision, runtime.memory(), ranks.world, ranks.local_world)
    trainings = trainings_of(recipe, source.config, inputs.plan, teaching)
    shards, sizes = ranks.on_main(lambda: _laid_out(trainings, devices))
    runtime = replace(runtime, shards=shards)
    ranks.together(lambda: check_attention(recipe.train.attention, runtime))
    flops = run_flops(recipe, target, teacher)
    train = {
        "precision": runtime.precision,
        "compile": ranks.on_main(lambda: resolve_compile(recipe.train.compile, runtime, flops)),
    }
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    if sizes:
        recipe = with_rows(recipe, ranks.on_main(lambda: choose_rows(recipe, sizes, runtime)))

    def write() -> None:
        write_manifest(out, recipe, _facts(inputs, recipe, runtime), allow_change)
        write_config(recipe, out)
        if not (out / "plan.json").exists():
            _warn_of_memory(trainings, devices, shards, sizes)
            world = ranks.world, ranks.local_world
            planned = plan_run(recipe, source.config, inputs.plan, this_machine(), teaching, *world)
            write_json(out / "plan.json", planned)

    ranks.on_main(write)
    stop.check()
    return Setting(
        recipe,
        source,
        _stages_of(recipe, inputs),
        inputs.held_out,
        inputs.plan,
        inputs.branched,
        inputs.teacher,
        inputs.taught_layers,
        inputs.upstream,
        runtime=runtime,
        stop=stop,
        folder=out,
        allow_change=allow_change,
    )


def _laid_out(trainings: Sequence[Training], devices: Devices) -> tuple[int, list[int]]:
    """Return how many devices hold a copy of what is trained, and the sequences in a pass that are worth a try."""
    layout, sizes = shared_layout(trainings, devices)
    return layout.shards, sizes


def _warn_of_memory(trainings: Sequence[Training], devices: Devices, shards: int, sizes: Sequence[int]) -> None:
    """Say beforehand where a device is expected to have too little for a step."""
    needed = max(one.memory(devices, shards, sizes[-1] if one.is_open else None)["total"] for one in trainings)
    if devices.memory_bytes and needed > TIGHT * devices.memory_bytes:
        warn(
            f"a step is expected to take {format_bytes(needed)} of the {format_bytes(devices.memory_bytes)} that a "
            f"device has; less is taken with {LESS_MEMORY}"
        )


def with_recipe(setting: Setting, recipe: Recipe) -> Setting:
    """Return a setting with another recipe of as many stages, on the same data."""
    return replace(setting, recipe=recipe, stages=_stages_of(recipe, setting))


def _stages_of(recipe: Recipe, inputs: Inputs) -> list[StageInputs]:
    """Return the stages as the recipe has them now: with what it left open when they were opened."""
    return [replace(one, stage=stage) for one, stage in zip(inputs.stages, recipe.resolved_stages, strict=True)]


def trained_in(setting: Setting, folder: Path) -> Setting:
    """Return the setting of a model in a folder of its own: its stages replay what it saw itself."""

    def own(one: StageInputs) -> StageInputs:
        replays = one.stage.replay is not None and one.stage.replay.stage is not None
        return replace(one, sampling=sampling_of(one.stage, one.data, setting.recipe.seed, folder)) if replays else one

    return replace(setting, stages=[own(one) for one in setting.stages])


def _facts(inputs: Inputs, recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """Return what the manifest says of inputs and devices."""
    source, data = inputs.source, inputs.data
    origin = {"model": source.config} if recipe.recipe == "scratch" else {"source": _origin(source)}
    facts = origin | {
        "data": {"dir": str(data.path), "fingerprint": data.fingerprint, "tokenizer": data.tokenizer.sha256},
        "stages": {
            inputs.stage.name: {
                "data": inputs.data.fingerprint,
                "replay": inputs.sampling.replay,
                "replayed": inputs.sampling.replayed(),
            }
            for inputs in inputs.stages
        },
        "replay": inputs.stages[0].sampling.replay,
        "branch": inputs.branched,
        "device": runtime.to_dict(),
    }
    facts["upstream_domains"] = list(inputs.upstream)
    if recipe.upstream is not None and inputs.upstream:
        folder = inputs.held_out[inputs.upstream[0]][0]
        facts["upstream"] = {"dir": str(folder.path), "fingerprint": folder.fingerprint}
    pruning = recipe.pruning_stage
    if pruning is not None and pruning.data.dir is not None:
        facts["stages"][PRUNING] = {"data": DataFolder(Path(pruning.data.dir)).fingerprint}
    if inputs.teacher is not None:
        facts["teacher"] = facts["source"] if inputs.teacher is source else _origin(inputs.teacher)
    return facts


def _origin(model: ModelFolder) -> dict[str, Any]:
    return {"name": model.name, "revision": model.revision, "sha256": model.weights_fingerprint()} | model.facts


def losses_of(
    setting: Setting,
    token_nll: TokenNll,
    title: str,
    budget: int | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the held-out losses of each domain within a budget of tokens, the recipe's where none is given.

    Args:
        setting: The run.
        token_nll: The model.
        title: For the progress bar.
        budget: Tokens a domain.
        names: Which of `setting.held_out`; None takes all.
    """
    budget = budget or setting.recipe.evaluate.tokens_per_domain
    return {name: loss.to_dict() for name, loss in measured(setting, token_nll, title, budget, names).items()}


def measured(
    setting: Setting, token_nll: TokenNll, title: str, budget: int | None, names: Sequence[str] | None = None
) -> dict[str, DomainLoss]:
    """Return the held-out losses of each domain, window by window.

    Args:
        setting: The run.
        token_nll: The model.
        title: For the progress bar.
        budget: Tokens a domain; None takes all.
        names: Which of `setting.held_out`; None takes all.
    """
    places = {name: setting.held_out[name] for name in names or setting.held_out}
    total = sum(min(budget or 2**62, data.num_tokens(domain, "held_out")) for data, domain in places.values())
    losses: dict[str, DomainLoss] = {}
    with Progress(title, total) as progress:
        before = 0

        def report(tokens: int) -> None:
            progress.update(before + tokens)
            setting.stop.check()

        for name, (data, domain) in places.items():
            found = domain_losses(
                token_nll, data, [domain], setting.recipe.data.seq_len, budget, on_progress=report, ranks=setting.ranks
            )
            losses[name] = found[domain]
            before += found[domain].num_tokens
    return losses


def measured_once(setting: Setting, path: Path, budget: int | None, measure: Callable[[], Record]) -> Record:
    """Return what is measured of the source, by this run or, where it was the same, by another one of its sweep.

    Args:
        setting: The run; all its ranks have to call.
        path: Where the record will be kept.
        budget: Tokens a domain; None takes all.
        measure: Measures it.
    """

    def conditions() -> Record | None:
        return _conditions(setting, budget) if is_in_sweep(setting.folder) else None

    same = setting.ranks.on_main(conditions)
    if same is None:
        return measure()
    found = setting.ranks.on_main(lambda: measured_beside(setting.folder, path, same))
    return found or measure() | {"conditions": same}


def _conditions(setting: Setting, budget: int | None) -> Record:
    """Return all that decides what a source's losses and scores on the held-out text are."""
    return {
        "source": setting.source.fingerprint(),
        "held_out": {name: [data.fingerprint, domain] for name, (data, domain) in setting.held_out.items()},
        "seq_len": setting.recipe.data.seq_len,
        "tokens_per_domain": budget,
        "tasks": setting.recipe.evaluate.tasks,
        "device": setting.runtime.kind,
        "versions": versions("lm_eval"),
    }


def samples_of(setting: Setting, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return what a model writes after the start of a held-out document of each domain; all ranks have to ask."""
    tokenizer = load_tokenizer(setting.data.tokenizer_folder)
    shared = setting.runtime.shards > 1
    return write_samples(model, tokenizer, setting.held_out.values(), setting.recipe.seed, shared)


def open_model(setting: Setting, folder: ModelFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model to evaluate, on the devices of a run: whole on each, or shared out over them."""
    model = load_dealt(folder, dtype, setting.runtime)
    place(model, layers_of(model), setting.runtime)
    return model


def load_dealt(folder: ModelFolder, dtype: torch.dtype, runtime: Runtime) -> PreTrainedModel:
    """Return a model to be placed: where weights are shared out, on other ranks than the main one without its own."""
    mine = runtime.shards == 1 or runtime.ranks.is_main
    return runtime.ranks.together(lambda: load_hf_model(folder, dtype) if mine else assemble(folder.config, {}, dtype))
