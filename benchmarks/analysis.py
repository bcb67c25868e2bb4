"""What ranks and masses of a model's attention cost, against singular values and against the forward pass itself.

    python benchmarks/analysis.py [DATA] [--source smollm2-135m] [--rounds 3] [-o RESULTS.json]
    python benchmarks/analysis.py [DATA] --seq-len 1024 --num-sequences 10 --whole

Without --whole: the attention of all layers on 100 sequences of 100 tokens is computed once; then, in turn, (a) a loop over
`torch.linalg.svdvals`, at one thread and at all, (b) `ranks_and_masses` at four taus and four etas, (c) the forward pass of
transformers with eager attention and `output_attentions`. Then the integers of (b) are compared with those of float64
singular values on random ones of the matrices. With --whole: time and peak memory of `scion analyze`'s forward part. Without
DATA, the demo's.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from scionlm.analysis.attention import attention_seen
from scionlm.analysis.collapse import CollapseSettings
from scionlm.analysis.forward import forward_pass
from scionlm.analysis.rank import ranks_and_masses
from scionlm.analysis.walk import Walk
from scionlm.core.machine import peak_memory_bytes
from scionlm.data import DataFolder
from scionlm.recipes.demo_data import prepare_demo_data
from scionlm.recipes.sample import draw_sample
from scionlm.sources import load_hf_model, resolve

TAUS = ETAS = (0.80, 0.85, 0.90, 0.95)
COMPARED = 2000


def timed(call):
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def attention_of(model, ids):
    """Return every attention matrix of a model on some sequences, [matrices, T, T]."""
    found, shown = [], []
    with torch.no_grad(), Walk(model) as walk:
        hidden = walk.embed(ids)
        for layer in range(walk.num_layers):
            shown.clear()
            with attention_seen(model, shown.append):
                hidden = walk.layer(layer, ids, hidden)
            heads = slice(0, shown[0].num_heads)
            found.append(torch.cat([shown[0].matrices(row, heads) for row in range(len(ids))]))
    return torch.cat(found)


def compare(model, ids, rounds):
    matrices = attention_of(model, ids)
    threads = torch.get_num_threads()

    def loop(count):
        torch.set_num_threads(count)
        try:
            return timed(lambda: [torch.linalg.svdvals(matrix) for matrix in matrices])
        finally:
            torch.set_num_threads(threads)

    def forward():
        with torch.no_grad():
            for start in range(0, len(ids), 10):
                model(ids[start : start + 10], output_attentions=True, use_cache=False)

    best: dict[str, float] = {}

    def keep(name, seconds):
        best[name] = min(seconds, best.get(name, seconds))

    for _ in range(rounds):
        for count in {1, threads}:
            keep(f"svdvals, {count} threads", loop(count)[0])
        seconds, found = timed(lambda: ranks_and_masses(matrices, TAUS, ETAS))
        keep("ranks and masses", seconds)
        kernel = model.config._attn_implementation
        model.set_attn_implementation("eager")
        keep("forward with attention outputs", timed(forward)[0])
        model.set_attn_implementation(kernel)
    some = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(0))[:COMPARED]
    exact = ranks_and_masses(matrices[some], TAUS, ETAS, exact=True)
    wrong = sum(int((theirs.values != ours.values[some]).sum()) for theirs, ours in zip(exact, found, strict=True))
    loops = min(seconds for name, seconds in best.items() if name.startswith("svdvals"))
    ours = best["ranks and masses"]
    return {
        "matrices": len(matrices),
        "seconds": {name: round(seconds, 2) for name, seconds in best.items()},
        "times faster than svdvals": round(loops / ours, 2),
        "share of the forward pass": round(ours / best["forward with attention outputs"], 3),
        "matrices compared with float64 singular values": len(some),
        "counts that differ": wrong,
        "ties": int(found[0].ties.sum()),
    }


def whole(model, ids):
    before = peak_memory_bytes()
    lengths = (ids.shape[1] // 4, ids.shape[1] // 2)
    with Walk(model) as walk:
        settings = CollapseSettings(ids.shape[1], lengths=lengths)
        seconds, found = timed(lambda: forward_pass(walk, ids, settings, 0))
    return {
        "seconds": round(seconds, 1),
        "peak memory, bytes": peak_memory_bytes(),
        "with the model loaded, bytes": before,
        "ties": int(found.heads.rank_ties.sum()),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?")
    parser.add_argument("--source", default="smollm2-135m")
    parser.add_argument("--seq-len", type=int, default=100)
    parser.add_argument("--num-sequences", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    model = load_hf_model(resolve(args.source), torch.float32)
    with tempfile.TemporaryDirectory() as room:
        if args.data is None:
            prepare_demo_data(args.source, Path(room) / "data")
        data = DataFolder(Path(args.data or Path(room) / "data"))
        ids = torch.from_numpy(draw_sample(data, "train", None, args.num_sequences, args.seq_len, 0).ids)
    result = {"seq_len": args.seq_len, "num_sequences": args.num_sequences, "threads": torch.get_num_threads()}
    result |= whole(model, ids) if args.whole else compare(model, ids, args.rounds)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
