"""Train one model through the stages of a setting, export it, and write down what it cost."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.duration import Duration
from scionlm.core.errors import UsageError
from scionlm.core.files import remove_leftovers, staged_folder
from scionlm.core.log import say, warn
from scionlm.core.records import JsonlWriter, Record, read_json, read_jsonl, write_json
from scionlm.data import Ledger
from scionlm.data.mixing.ledger import LEDGER
from scionlm.families import count_parameters, flops_per_token
from scionlm.families.models import assemble
from scionlm.parallel.placing import whole_weights
from scionlm.parallel.runtime import peak_flops
from scionlm.recipes.beginning import Beginning, branching, cursors_of
from scionlm.recipes.config import Recipe
from scionlm.recipes.config_train import AverageConfig, OptimizerConfig
from scionlm.recipes.inputs import StageInputs
from scionlm.recipes.lr_scales import scales_of
from scionlm.recipes.objectives import open_objective
from scionlm.recipes.order import Sampling, stage_folder
from scionlm.recipes.planning import run_flops, teacher_flops
from scionlm.recipes.pruning import Pruning
from scionlm.recipes.reweighting import EVALUATION_S, open_reweighting
from scionlm.recipes.rounds import CONTROL
from scionlm.recipes.run import write_status
from scionlm.recipes.selection import record_plan
from scionlm.recipes.setting import Setting, load_dealt, losses_of
from scionlm.schedules import describe
from scionlm.sources import ModelFolder
from scionlm.sources.tensors import stored_dtype
from scionlm.surgery.export import save_model
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.plan import SurgeryPlan
from scionlm.surgery.proof import Proof
from scionlm.surgery.verify import verify_export
from scionlm.train.average import Average, AverageSettings, averaged
from scionlm.train.checkpoint import Checkpoint, CheckpointStore
from scionlm.train.gates.pruner import Pruner
from scionlm.train.guard import Guard
from scionlm.train.learner import Learner, Position
from scionlm.train.loop import Session, Stage, fit, take_up
from scionlm.train.metrics import Metrics, open_trackers
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.saver import Saver

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MANY_EPOCHS = 4
MFU_FORMULA = (
    "tokens/s * (6 * multiplied parameters, the head once and the embedding not, "
    "+ 12 * layers * heads * head_dim * seq_len, and a third of the teacher's) / peak FLOP/s"
)


def train_model(
    setting: Setting,
    make_model: Callable[[Setting], PreTrainedModel],
    out: Path,
    name: str,
    begin: Beginning | None = None,
    pruning: Pruning | None = None,
) -> None:
    """Train what `make_model` makes, export it to `out`/model, and write `out`/training.json.

    Args:
        setting: The run.
        make_model: Gives the model with its first weights.
        out: Folder for it.
        name: Of the model in what is said of it.
        begin: Called before the first step.
        pruning: Masks to learn of it; what is exported is the model that they cut.
    """
    recipe, runtime, ranks = setting.recipe, setting.runtime, setting.ranks
    ranks.on_main(lambda: remove_leftovers(out, "model."))
    ranks.on_main(lambda: record_plan(setting.plan, out))
    runtime.seed(recipe.seed)
    runtime.forget_peak()  # of what was measured before
    make_pruner = pruning.opening(setting) if pruning else None
    model = ranks.together(lambda: make_model(setting))
    hf_config, pruner = model.config.to_dict(), make_pruner and make_pruner(model)
    objective = objective_of(setting, model, pruner)

    def evaluate() -> Record:
        started = time.monotonic()
        losses = losses_of(setting, objective.token_nll, f"evaluating {name}")
        setting.kept(out / "before.json", lambda: {"domains": losses})
        nll = {f"eval/{domain}/nll_nats": loss["nll"] for domain, loss in losses.items()}
        return nll | {EVALUATION_S: time.monotonic() - started}

    if recipe.train.compile:
        objective.compile()
    behind = recipe.checkpoint.background
    behind = runtime.kind == "cuda" if behind == "auto" else behind
    lines = ranks.apart() if behind else ranks
    store = CheckpointStore(out / "checkpoints", recipe.checkpoint.keep, lines, runtime.shards > 1)
    batch = recipe.total_tokens // recipe.total_steps
    keep_every = recipe.steps(recipe.checkpoint.keep_every or 0)
    every = Duration.parse(recipe.checkpoint.every)
    saver = Saver.of(store, every, recipe.total_steps, batch, keep_every, runtime if behind else None)
    metrics = open_metrics(setting, out)
    peak = peak_flops(runtime)
    session = Session(
        title=f"training {name}",
        total_steps=recipe.total_steps,
        evaluate_every=recipe.steps(recipe.evaluate.every),
        evaluate=evaluate,
        metrics=metrics,
        saver=saver,
        stop=setting.stop,
        runtime=runtime,
        peak_flops=peak and peak[0],
        dense=recipe.evaluates_densely,
    )
    learner, position = _through_the_stages(setting, objective, session, store, out, name, begin or branching(setting))
    for domain, epochs in position.epochs.items():
        if epochs > _MANY_EPOCHS and domain != "replay":
            warn(f"domain {domain!r} was gone through {epochs:.1f} times; more text would help")
    facts = _facts(setting, learner, position, hf_config, peak)
    average = learner.average if learner.average and learner.average.is_ready else None
    if average:
        facts["unaveraged"] = losses_of(setting, objective.token_nll, f"evaluating {name} without averaging")

    if pruner:
        pruner.at_step(recipe.total_steps)
        facts["masked"] = losses_of(setting, objective.token_nll, f"evaluating {name} under its last masks")

    def finish(weights: dict[str, torch.Tensor]) -> None:
        lines = read_jsonl(out / "metrics.jsonl")
        seconds = sum(line.get(EVALUATION_S, 0.0) for line in lines)
        before = read_json(out / "before.json")["domains"]
        write_json(out / "training.json", facts | {"evaluation_seconds": seconds, "before": before})
        whole = assemble(hf_config, weights, torch.float32)
        pruning.export(setting, out, whole, pruner) if pruning and pruner else export(setting, out, whole)

    with average.in_place() if average else contextlib.nullcontext():
        weights = whole_weights(model, runtime)
        ranks.on_main(lambda: finish(weights))
    del learner
    objective.release()


def objective_of(setting: Setting, model: PreTrainedModel, pruner: Pruner | None = None) -> Objective:
    """Return what a setting trains of a model, on its devices: with the teacher that the recipe names, and the masks.

    Args:
        setting: The run.
        model: The model, with float32 weights.
        pruner: The masks that are learned of it.
    """
    taught = None
    if setting.teacher is not None and setting.recipe.distill is not None:
        taught = load_dealt(setting.teacher, setting.runtime.compute_dtype, setting.runtime)
    recipe = setting.recipe
    schedule = recipe.teacher_schedule if taught is not None else None
    return open_objective(recipe, setting.runtime, model, taught, setting.taught_layers, schedule, pruner)


def _distill_facts(setting: Setting, position: Position) -> Record | None:
    """Return what learning from the teacher was and cost; None without one."""
    recipe, teacher = setting.recipe, setting.teacher
    if teacher is None or recipe.distill is None:
        return None
    parameters = count_parameters(teacher.config)["total"]
    return recipe.distill.model_dump(mode="json") | {
        "teacher": teacher.name,
        "license": teacher.license,
        "num_parameters": parameters,
        "teacher_seconds": position.teacher_seconds,
        "teacher_steps": recipe.teacher_steps,
    }


def _facts(
    setting: Setting, learner: Learner, position: Position, hf_config: dict[str, Any], peak: tuple[float, str] | None
) -> Record:
    """Return what is known when the last step is done, as training.json has it."""
    recipe, runtime = setting.recipe, setting.runtime
    return {
        "steps": recipe.total_steps,
        "tokens": recipe.total_tokens,
        "seconds": position.seconds,
        "tokens_per_s": recipe.total_tokens / position.seconds if position.seconds else None,
        "flops": run_flops(recipe, hf_config, setting.teacher and setting.teacher.config),
        "peak_flops": peak and {"flops_per_s": peak[0], "known_from": peak[1]},
        "mfu_formula": MFU_FORMULA,
        "seed": recipe.seed,
        "precision": runtime.precision,
        "compile": recipe.train.compile,
        "device": runtime.name,
        "peak_memory_bytes": runtime.peak_memory(),
        "epochs": position.epochs,
        "optimizer": learner.optimizer.groups(),
        "skipped_updates": learner.guard.skipped,
        "loss_spikes": learner.guard.spikes,
        "checkpoint_seconds": position.saving_seconds,
        "distill": _distill_facts(setting, position),
        "devices": setting.ranks.world,
        "layout": runtime.layout,
        "micro_batch_size": recipe.train.micro_batch_size,
        "activation_checkpointing": recipe.train.activation_checkpointing,
    }


def open_metrics(setting: Setting, out: Path) -> Metrics:
    """Return where the numbers of a model in `out` go: its file and the recipe's trackers; those of the main rank."""
    if not setting.ranks.is_main:
        return Metrics(JsonlWriter(None, "metrics"))
    config = setting.recipe.model_dump(mode="json")
    trackers = open_trackers(setting.recipe.track, out, config)
    beat = (
        (lambda step: write_status(setting.folder, "running", 0, "", step)) if out != setting.folder / CONTROL else None
    )
    return Metrics(JsonlWriter(out / "metrics.jsonl", "metrics"), trackers, beat)


def _through_the_stages(
    setting: Setting,
    objective: Objective,
    session: Session,
    store: CheckpointStore,
    out: Path,
    name: str,
    begin: Beginning,
) -> tuple[Learner, Position]:
    """Train stage by stage, from the newest checkpoint where there is one."""
    recipe = setting.recipe
    model: Any = objective.model
    position, learner = Position(), None
    with contextlib.closing(session.metrics), contextlib.closing(session.saver):
        checkpoint = store.newest()
        if checkpoint:
            position.restore(checkpoint.state)
        number = int(checkpoint.state.get("stage", 0)) if checkpoint else 0
        if number >= len(setting.stages):
            raise UsageError(
                f"{out} is in stage {number + 1}, the recipe has {len(setting.stages)}; stages can be added only"
            )
        for inputs in setting.stages[number:]:
            optimizer = Optimizer(model, optimizer_settings(inputs.stage.optimizer), objective.projections)
            begins = learner is None
            if learner is None:
                learner = Learner(objective, optimizer, Guard(recipe.train.skip_nonfinite), _average(setting, model))
                if not checkpoint:
                    begin(learner, position)
            else:
                learner.change_optimizer(optimizer, inputs.stage.optimizer_state)
            sampling, start = inputs.sampling.going_on(position.cursors)
            stage = _open_stage(setting, inputs, sampling, start, objective, out, name)
            with contextlib.closing(stage.ledger):
                if begins:
                    take_up(checkpoint, learner, stage, position, session, setting.allow_change)
                else:
                    stage.ledger.rewind(-1)
                if len(setting.stages) > 1:
                    say(f"stage {stage.name}: {describe(stage.schedule, stage.lr)}")
                fit(learner, stage, position, session)
            _finish_stage(stage, position)
    assert learner is not None
    return learner, position


def _finish_stage(stage: Stage, position: Position) -> None:
    """Note how far a stage has gone through its windows, for those that draw from the same ones."""
    epochs = stage.plan.epochs().items()
    position.epochs |= {name: max(value, position.epochs.get(name, 0.0)) for name, value in epochs}
    position.cursors |= cursors_of(position.cursors, stage.state(position.step))


def _open_stage(
    setting: Setting,
    inputs: StageInputs,
    sampling: Sampling,
    start: dict[str, int],
    objective: Objective,
    out: Path,
    name: str,
) -> Stage:
    config = inputs.stage
    stages = setting.recipe.resolved_stages
    index = [stage.name for stage in stages].index(config.name)
    first_step = sum(stage.total_steps for stage in stages[:index])
    plan = sampling.plan(start)
    hf_config: dict[str, Any] = objective.model.config.to_dict()
    folder = stage_folder(out, config.name)
    setting.ranks.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    return Stage(
        name=config.name,
        index=index,
        first_step=first_step,
        steps=config.total_steps,
        plan=plan,
        windows_id=sampling.windows_id,
        order=sampling.order.stage,
        replay_id=sampling.replay_id,
        schedule=config.build_schedule(),
        lr=config.optimizer.lr,
        grad_clip=config.optimizer.grad_clip,
        sequences_per_step=config.sequences_per_step,
        seq_len=config.data.seq_len,
        micro_batch_size=config.rows(setting.ranks.world),
        flops_per_token=flops_per_token(hf_config, config.data.seq_len),
        teacher_flops_per_token=teacher_flops(setting.teacher.config, config.data.seq_len) if setting.teacher else 0.0,
        ledger=Ledger(folder / LEDGER if setting.ranks.is_main else None, sampling.facts(start)),
        hands_on=inputs.hands_on,
        reweighting=open_reweighting(setting, inputs, plan, objective.token_nll, name, first_step),
    )


def optimizer_settings(config: OptimizerConfig) -> OptimizerSettings:
    """Return the constants of an optimizer; see `scales_of`."""
    keys = ("name", "betas", "eps", "weight_decay", "decay", "momentum")
    return OptimizerSettings(**{key: getattr(config, key) for key in keys}, lr_scales=scales_of(config))


def average_in(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, torch.Tensor] | None:
    """Return the average of the weights that a checkpoint of a run holds; None where there is none, or none yet."""
    config, kept = recipe.average, checkpoint.tensors("average")
    if config is None or not kept:
        return None
    count = checkpoint.state["average_count"]
    return averaged(config.method, config.share, checkpoint.tensors("weights"), kept, count)


def _average(setting: Setting, model: PreTrainedModel) -> Average | None:
    config: AverageConfig | None = setting.recipe.average
    if config is None:
        return None
    steps = setting.recipe.steps
    settings = AverageSettings(
        config.method, config.decay, steps(config.start), max(steps(config.every), 1), config.share
    )
    return Average(model, settings)


def export(setting: Setting, out: Path, model: PreTrainedModel) -> None:
    """Write the model to RUN/model and prove that it reads back."""
    dtype = export_type(setting.recipe, setting.source)
    provenance = provenance_of(setting.recipe, setting.source, setting.plan, setting.teacher)
    with staged_folder(out / "model") as stage:
        save_model(model, stage, setting.source, setting.plan, "", provenance, dtype)
        verify_export(model, stage, Proof(), dtype)


def export_type(recipe: Recipe, source: ModelFolder) -> torch.dtype:
    """Return the type that a recipe saves weights in."""
    asked = recipe.export.dtype
    if asked == "source" and recipe.recipe == "scratch":
        return torch.float32
    return stored_dtype(source.path) if asked == "source" else _DTYPES[asked]


def provenance_of(recipe: Recipe, source: ModelFolder, plan: SurgeryPlan, teacher: ModelFolder | None = None) -> Record:
    """Return what a trained model was made from."""
    provenance = {
        "source": {"name": source.name, "revision": source.revision},
        "plan": plan.to_dict(),
        "origins": plan_origins([source], plan),
        "init": "random" if recipe.from_random else "source",
    }
    if recipe.recipe == "scratch":
        provenance = {"source": None, "init": "random"}
    if teacher is not None:
        provenance["teacher"] = {"name": teacher.name, "revision": teacher.revision, "license": teacher.license}
    return provenance
