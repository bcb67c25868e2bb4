"""What learned masks cost: a gated training step of the source beside a plain one, and cutting beside surgery.

    python benchmarks/gates.py [--layers 8] [--sequences 4] [--seq-len 256] [--rounds 5] [--eager] [--json FILE]

SmolLM2-135M's width and vocabulary with random weights, bf16, gates on every axis. Steps of both kinds take turns, and
what is compared is the median of each; the bound is 1.15.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scionlm.core.machine import versions
from scionlm.data import Batch
from scionlm.families import ModelShape
from scionlm.parallel.runtime import start_runtime
from scionlm.schedules import Piece, Schedule
from scionlm.train.gates.axes import axes_of
from scionlm.train.gates.constraint import ConstraintSettings
from scionlm.train.gates.gates import Gates
from scionlm.train.gates.pruner import Pruner, PruneSettings
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TARGET = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2}


def prepared(config: LlamaConfig, gated: bool, compiled: bool) -> tuple[Objective, Optimizer]:
    torch.manual_seed(0)
    model, pruner = LlamaForCausalLM(config), None
    if gated:
        shape = ModelShape.of(config.to_dict())
        target = replace(shape, num_hidden_layers=shape.num_hidden_layers * 3 // 4, **TARGET)
        schedule = Schedule((Piece("constant", "constant", 1000, 1.0, 1.0),))
        settings = PruneSettings(0.1, 1.0, schedule, 1000, ConstraintSettings(warmup=100))
        pruner = Pruner(model, Gates(axes_of(shape, target)), settings)
    objective = Objective(model, torch.bfloat16, pruner=pruner)
    if compiled:
        objective.compile()
    return objective, Optimizer(model, OptimizerSettings())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime = start_runtime()
    config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (options.sequences, options.seq_len + 1))
    batch = Batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]))
    both = {name: prepared(config, name == "gated", not options.eager) for name in ("plain", "gated")}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(options.rounds + 2):
        for name, (objective, optimizer) in both.items():
            objective.at_step(turn)
            started = time.perf_counter()
            train_step(objective, optimizer, batch, len(batch.input_ids), lr=1e-4, clip=1.0)
            if turn >= 2:  # the first compiles, the second may again
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["gated"] / medians["plain"]
    kind = "eager" if options.eager else "compiled"
    print(
        f"{runtime.name}, {runtime.threads} threads, bf16 {kind}, {options.layers} layers, {batch.labels.size} tokens a step"
    )
    for name, median in medians.items():
        print(f"{name:>6}: {median:.3f} s a step, {batch.labels.size / median:.0f} tokens/s")
    print(f"ratio: {ratio:.3f}")
    if options.json:
        found = {"seconds": seconds, "ratio": ratio, "device": runtime.to_dict(), "versions": versions()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
