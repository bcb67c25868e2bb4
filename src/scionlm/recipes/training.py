"""Train one model on a setting's data, export it, and write down what it cost."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from scionlm.core.duration import Duration
from scionlm.core.files import staged_folder
from scionlm.core.log import warn
from scionlm.core.machine import peak_memory_bytes
from scionlm.core.records import JsonlWriter, Record, read_json, read_jsonl, write_json
from scionlm.data import Ledger
from scionlm.data.mixing.ledger import LEDGER
from scionlm.families import family_of, flops_per_token
from scionlm.recipes.reweighting import EVALUATION_S, open_reweighting
from scionlm.recipes.setting import Setting, losses_of, release
from scionlm.schedules import Schedule
from scionlm.sources.folder import stored_dtype
from scionlm.surgery.export import save_model
from scionlm.surgery.lineage import plan_origins
from scionlm.surgery.proof import Proof
from scionlm.surgery.verify import verify_export
from scionlm.train.checkpoint import CheckpointStore
from scionlm.train.loop import LoopConfig, fit
from scionlm.train.objective import Objective
from scionlm.train.optimizer import build_optimizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train_model(setting: Setting, make_model: Callable[[Setting], PreTrainedModel], out: Path, name: str) -> None:
    """Train what `make_model` makes, export it to `out`/model, and write `out`/training.json."""
    recipe, runtime = setting.recipe, setting.runtime
    runtime.seed(recipe.seed)
    model: Any = make_model(setting)
    model.to(runtime.device)
    objective = Objective(model, runtime.compute_dtype)
    optimizer = build_optimizer(
        model,
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
    )
    plan = setting.sampling.plan()
    sequences = recipe.sequences_per_step
    config = LoopConfig(
        title=f"training {name}",
        total_steps=recipe.total_steps,
        sequences_per_step=sequences,
        seq_len=recipe.data.seq_len,
        micro_batch_size=min(recipe.train.micro_batch_size, sequences),
        lr=recipe.optimizer.lr,
        grad_clip=recipe.optimizer.grad_clip,
        evaluate_every=recipe.steps(recipe.evaluate.every),
        checkpoint_every=Duration.parse(recipe.checkpoint.every),
    )
    schedule = Schedule(
        recipe.schedule.name, recipe.total_steps, recipe.steps(recipe.schedule.warmup), recipe.schedule.min_lr_ratio
    )

    def evaluate() -> Record:
        started = time.monotonic()
        losses = losses_of(setting, objective.token_nll, f"evaluating {name}")
        if not (out / "before.json").exists():
            write_json(out / "before.json", {"domains": losses})
        nll = {f"eval/{domain}/nll_nats": loss["nll"] for domain, loss in losses.items()}
        return nll | {EVALUATION_S: time.monotonic() - started}

    reweighting = open_reweighting(setting, plan, objective.token_nll, name, out)

    if recipe.train.compile:
        objective.compile()
    metrics = JsonlWriter(out / "metrics.jsonl", "metrics")
    ledger = Ledger(out / LEDGER, setting.sampling.facts())
    checkpoints = CheckpointStore(out / "checkpoints", recipe.checkpoint.keep)
    try:
        seconds = fit(
            objective, optimizer, plan, schedule, config, metrics, checkpoints, ledger,
            evaluate=evaluate, reweighting=reweighting, stop=setting.stop,
        )  # fmt: skip
    finally:
        metrics.close()
        ledger.close()
    tokens = recipe.total_steps * recipe.train.global_batch_tokens
    hf_config = model.config.to_dict()
    for domain, epochs in plan.epochs().items():
        if epochs > 4 and domain != "replay":
            warn(f"domain {domain!r} was gone through {epochs:.1f} times; more text would help")
    write_json(
        out / "training.json",
        {
            "steps": recipe.total_steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds if seconds else None,
            "flops": tokens * flops_per_token(family_of(hf_config), hf_config, recipe.data.seq_len),
            "seed": recipe.seed,
            "precision": runtime.precision,
            "compile": recipe.train.compile,
            "device": runtime.name,
            "peak_memory_bytes": peak_memory_bytes(),
            "epochs": plan.epochs(),
            "evaluation_seconds": sum(line.get(EVALUATION_S, 0.0) for line in read_jsonl(out / "metrics.jsonl")),
            "before": read_json(out / "before.json")["domains"],
        },
    )
    export(setting, out, model)
    del optimizer
    release(model)


def export(setting: Setting, out: Path, model: PreTrainedModel) -> None:
    """Write the model to RUN/model and prove that it reads back."""
    recipe = setting.recipe
    asked = recipe.export.dtype
    dtype = stored_dtype(setting.source.path) if asked == "source" else _DTYPES[asked]
    provenance = {
        "source": {"name": setting.source.name, "revision": setting.source.revision},
        "plan": setting.plan.to_dict(),
        "origins": plan_origins([setting.source], setting.plan),
        "init": recipe.inherit.init,
    }
    with staged_folder(out / "model") as stage:
        save_model(model.cpu(), stage, setting.source, "", provenance, dtype)
        verify_export(model, stage, Proof(), dtype)
