"""`scion demo`: the whole story on real text and a real model, in minutes on a CPU.

Where the real model cannot be had, a tiny source is trained first, on the same text, with a tokenizer of its own.
"""

from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, StorageError
from scionlm.core.log import say
from scionlm.core.records import Record
from scionlm.recipes.presets import load_recipe
from scionlm.recipes.run import run_recipe
from scionlm.sources import BUILTIN, resolve

PRESET = "inheritune-mini"

# Small enough to be trained in about a minute on the text that ships with Scion, with layers to choose from.
_TINY: dict[str, Any] = {
    "model": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "data.dir": None,
    "data.mixture": {"prose": 1, "code": 1},
    "data.seq_len": 256,
    "train": {"global_batch_tokens": 4096, "micro_batch_size": 16},
    "optimizer.lr": 3e-3,
    "schedule": {"name": "cosine", "warmup": 0.05, "min_lr_ratio": 0.1},
    "evaluate": {"every": 0, "tokens_per_domain": 4096},
}
_TINY_LAYERS = 4
TINY_STEPS = 200


def demo(out: Path, overrides: dict[str, Any] | None = None) -> Record:
    """Run the demo into `out`, or go on with it, and return its result.

    Args:
        out: The run folder.
        overrides: Settings that differ from the preset's.
    """
    settings: dict[str, Any] = dict(overrides or {})
    if (out / "config.yaml").exists():  # whichever source it started with stays
        begun = load_recipe(str(out / "config.yaml"))
        layers = {"inherit.layers": begun.inherit.layers} if begun.inherit else {}
        return run_recipe(load_recipe(PRESET, settings | layers | {"source": begun.source}), out)
    try:
        resolve(settings.get("source", BUILTIN))
    except (DataError, StorageError) as error:
        say(f"{error}; training a tiny source instead")
        tiny = out.parent / f"{out.name}-tiny-source"
        run_recipe(load_recipe("scratch", _TINY | {"train.steps": TINY_STEPS}), tiny)
        settings |= {"source": str(tiny / "model"), "inherit.layers": _TINY_LAYERS}
    return run_recipe(load_recipe(PRESET, settings), out)
