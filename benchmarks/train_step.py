"""Training speed of Scion's own step: float32, bf16, and bf16 compiled, beside this machine's matrix-product peak.

    python benchmarks/train_step.py [--layers 8] [--sequences 4] [--seq-len 256] [--steps 4] [--no-compile] [--json FILE]

The model has SmolLM2-135M's width and vocabulary with random weights. Each row is the best of a few steps, after one
that is not counted; the share of peak uses the FLOP formula of `scionlm.families`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scionlm.core.machine import peak_memory_bytes, versions
from scionlm.data import Batch
from scionlm.families import flops_per_token
from scionlm.parallel.runtime import start_runtime
from scionlm.train.objective import Objective
from scionlm.train.optimizer import Optimizer, OptimizerSettings
from scionlm.train.step import train_step

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def matmul_peak(dtype, size=2048, repeats=10):
    """FLOP/s of the best of ten square products."""
    a = torch.randn(size, size, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def measure(config, dtype, compiled, batch, steps):
    """Seconds of the best step, and of the first one (which compiles)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    objective, optimizer = Objective(model, dtype), Optimizer(model, OptimizerSettings())
    if compiled:
        objective.compile()
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        train_step(objective, optimizer, batch, len(batch.input_ids), lr=1e-4, clip=1.0)
        times.append(time.perf_counter() - started)
    return min(times[1:]), times[0]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime = start_runtime()
    config = LlamaConfig(**SHAPE, num_hidden_layers=options.layers)
    ids = np.random.default_rng(0).integers(0, 49152, (options.sequences, options.seq_len + 1))
    batch = Batch(ids[:, :-1], np.ascontiguousarray(ids[:, 1:]))
    tokens = batch.labels.size
    peak = matmul_peak(torch.bfloat16)
    as_dict = config.to_dict()
    flops = flops_per_token(as_dict, options.seq_len)
    print(
        f"{runtime.name}, {runtime.threads} threads; bf16 product peak {peak / 1e12:.3f} TFLOP/s, float32 "
        f"{matmul_peak(torch.float32) / 1e12:.3f}; {options.sequences} x {options.seq_len} tokens, {options.layers} layers"
    )
    modes = [("fp32", torch.float32, False), ("bf16", torch.bfloat16, False), ("bf16 + compile", torch.bfloat16, True)]
    rows = []
    for name, dtype, compiled in modes[: 2 if options.no_compile else 3]:
        best, first = measure(config, dtype, compiled, batch, options.steps)
        share = flops * tokens / best / peak
        rows.append({"mode": name, "tokens_per_s": tokens / best, "share_of_bf16_peak": share, "first_step_s": first})
        print(
            f"{name:16s}{tokens / best:8.0f} tokens/s  {100 * share:5.1f} % of peak  first step {first:5.1f} s",
            flush=True,
        )
    if options.json:
        facts = {
            "device": runtime.to_dict(),
            "versions": versions(),
            "peak_flops": peak,
            "peak_memory": peak_memory_bytes(),
        }
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
