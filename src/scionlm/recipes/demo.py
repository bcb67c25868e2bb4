"""`scion demo`: the whole story on real text and a real model, in minutes on a CPU.

Where the real model cannot be had, a tiny source is trained first, on the same text, with a tokenizer of its own.
"""

from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, StorageError
from scionlm.core.files import staged_folder, write_text_atomic
from scionlm.core.log import say
from scionlm.core.records import Record
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.sources import BUILTIN, resolve

PRESET = "inheritune-mini"

# Small enough to be trained in about a minute, deep enough to have layers to choose from.
_TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_TINY_LAYERS = 4
TINY_STEPS = 200


def demo(out: Path, overrides: dict[str, Any] | None = None) -> Record:
    """Run the demo into `out`, or go on with it, and return its result.

    Args:
        out: The run folder.
        overrides: Settings that differ from the preset's.
    """
    if (out / "config.yaml").exists():  # whichever source it started with stays
        return run_recipe(load_recipe(str(out / "config.yaml")), out)
    settings: dict[str, Any] = dict(overrides or {})
    try:
        resolve(settings.get("source", BUILTIN))
    except (DataError, StorageError) as error:
        say(f"{error}; training a tiny source instead")
        tiny = out.parent / f"{out.name}-tiny-source"
        if not (tiny / "config.json").exists():
            train_tiny_source(tiny, TINY_STEPS)
        settings |= {"source": str(tiny), "inherit.layers": _TINY_LAYERS}
    return run_recipe(load_recipe(PRESET, settings), out)


def train_tiny_source(out: Path, steps: int) -> None:
    """Train a tiny Llama on the demo's text for `steps` updates and write it to `out` as a plain model folder."""
    import shutil
    import tempfile

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scionlm.core.records import JsonlWriter
    from scionlm.core.signals import StopRequest
    from scionlm.data import DataFolder, Ledger, Mixture, Order, SamplePlan
    from scionlm.data.preparing.train_tokenizer import train_tokenizer
    from scionlm.parallel.runtime import start_runtime
    from scionlm.recipes.demo_data import demo_corpora, prepare_demo_data
    from scionlm.schedules import Sizes, build_schedule
    from scionlm.sources.quiet import quiet_transformers
    from scionlm.train.checkpoint import CheckpointStore
    from scionlm.train.guard import Guard
    from scionlm.train.learner import Learner, Position
    from scionlm.train.loop import Session, Stage, fit
    from scionlm.train.metrics import Metrics
    from scionlm.train.objective import Objective
    from scionlm.train.optimizer import Optimizer, OptimizerSettings
    from scionlm.train.saver import Saver

    runtime = start_runtime()
    runtime.seed(0)
    with staged_folder(out) as stage, tempfile.TemporaryDirectory() as work_name:
        work = Path(work_name)
        model: Any = LlamaForCausalLM(LlamaConfig(**_TINY, bos_token_id=0, eos_token_id=0, pad_token_id=0))
        train_tokenizer(demo_corpora(None), Path(), work / "tokenizer", _TINY["vocab_size"])
        for file in (work / "tokenizer").iterdir():
            shutil.copyfile(file, stage / file.name)
        with quiet_transformers():
            model.save_pretrained(stage)  # the data needs a MODEL to take the tokenizer from
        prepare_demo_data(str(stage), work / "data")
        data = DataFolder(work / "data")
        streams = {domain: data.stream(domain, "train") for domain in data.domains}
        objective = Objective(model.to(runtime.device), runtime.compute_dtype)
        ledger = Ledger(work / "ledger.jsonl", {})
        metrics = Metrics(JsonlWriter(work / "metrics.jsonl", "metrics"))
        one = Stage(
            name="main",
            index=0,
            first_step=0,
            steps=steps,
            plan=SamplePlan(streams, Mixture(dict.fromkeys(data.domains, 1.0)), Order(256)),
            windows_id="",
            order="main",
            schedule=build_schedule("cosine", Sizes(steps, max(steps // 20, 1), floor=0.1)),
            lr=3e-3,
            grad_clip=1.0,
            sequences_per_step=16,
            seq_len=256,
            micro_batch_size=16,
            ledger=ledger,
        )
        with StopRequest() as stop:
            saver = Saver(CheckpointStore(work / "checkpoints", 1), every=1e9)
            session = Session("training a tiny source", steps, 0, dict, metrics, saver, stop, runtime)
            learner = Learner(objective, Optimizer(model, OptimizerSettings()), Guard(0))
            fit(learner, one, Position(), session)
        metrics.close()
        ledger.close()
        with quiet_transformers(), torch.no_grad():
            model.cpu().save_pretrained(stage)
        write_text_atomic(stage / "README.md", "A tiny source, trained by `scion demo` on the demo's text.\n")
