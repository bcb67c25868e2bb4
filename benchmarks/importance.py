"""Speed of importance scores beside the plain passes they ride on, as ratios within one process.

    python benchmarks/importance.py [--model smollm2-135m] [--layers 8] [--sequences 4] [--seq-len 256] [--batches 1]
                                    [--repeats 9] [--dtype float32] [--json FILE]

`activation_scores` against a plain forward pass with logits and without gradients (and against the decoder alone, which
is all it runs); `taylor_scores` against forward and backward with weight gradients. Random tokens; each figure is the
median of several repetitions, which take turns so that a slow spell of the machine meets all of them. A ratio above 1
is faster than the plain pass; that of the best repetitions shows whether another's work was in the way.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from scionlm.analysis.importance import activation_scores, taylor_scores
from scionlm.analysis.magnitude import magnitude_scores
from scionlm.core.machine import peak_memory_bytes, versions
from scionlm.families.weights import StateWeights
from scionlm.parallel.runtime import start_runtime
from scionlm.sources import load_hf_model, resolve


def first_layers(name, layers, dtype):
    """The first layers of a Llama, with all that stands outside them."""
    model = load_hf_model(resolve(name), getattr(torch, dtype))
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def passes(model, batches):
    """What is timed: name to a function without arguments."""

    @torch.no_grad()
    def forward():
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def decoder():
        for ids in batches:
            model.model(input_ids=ids, use_cache=False)

    def backward():
        for ids in batches:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    weights = StateWeights(model.config.to_dict(), model.state_dict())
    return {
        "forward": forward,
        "decoder": decoder,
        "activation": lambda: activation_scores(model, batches),
        "forward + backward": backward,
        "taylor": lambda: taylor_scores(model, batches),
        "magnitude": lambda: magnitude_scores(model.config.to_dict(), weights),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime = start_runtime()
    model = first_layers(options.model, options.layers, options.dtype)
    generator = torch.Generator().manual_seed(0)
    size = (options.sequences, options.seq_len)
    batches = [torch.randint(model.config.vocab_size, size, generator=generator) for _ in range(options.batches)]
    todo = passes(model, [ids.to(model.device) for ids in batches])
    seconds = {name: [] for name in todo}
    for repeat in range(options.repeats + 1):
        for name, work in todo.items():
            started = time.perf_counter()
            work()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{runtime.name}, {runtime.threads} threads; {options.dtype}, {options.batches} x {options.sequences} x "
        f"{options.seq_len} tokens, {options.layers} layers of {options.model}, {options.repeats} repetitions"
    )
    for name, median in medians.items():
        print(f"{name:20s}{median:8.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    best = {name: min(times) for name, times in seconds.items()}
    pairs = (("forward", "activation"), ("decoder", "activation"), ("forward + backward", "taylor"))
    ratios = {}
    for plain, score in pairs:
        ratios[f"{score} / {plain}"] = medians[plain] / medians[score]
        ratios[f"{score} / {plain}, best"] = best[plain] / best[score]
    for name, ratio in ratios.items():
        print(f"speed of {name:40s}{ratio:6.2f}")
    if options.json:
        facts = {"device": runtime.to_dict(), "versions": versions(), "peak_memory": peak_memory_bytes()}
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        record = facts | {"options": settings, "seconds": medians, "ratios": ratios}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
