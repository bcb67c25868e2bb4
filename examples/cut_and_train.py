"""Half of a model, trained on a little text, beside a control of the same shape from random weights.

    scion prepare CORPORA.yaml -o data
    python examples/cut_and_train.py smollm2-135m data runs/half

The first is a MODEL (a folder, a hub id, smollm2-135m), the second a data folder, the third is where everything goes.
Stop it and run it again: it goes on.
"""

import sys
from pathlib import Path
from typing import Any

import scionlm as scion

SETTINGS: dict[str, Any] = {
    "train.tokens": "200k",
    "train.global_batch_tokens": 1024,
    "train.micro_batch_size": 4,
    "data.seq_len": 256,
    "optimizer.lr": 1e-3,
    "schedule.warmup": 0.05,
    "evaluate.tokens_per_domain": 8192,
}


def main(source: str, data: str, out: str, settings: dict[str, Any] = SETTINGS) -> dict[str, float]:
    """Train two halves, compare them, and return the mean held-out losses by name."""
    shared = {"source": source, "data.dir": data, "inherit.layers": "half"} | settings

    # The first half, as the paper has it, with a control; and as many layers, evenly spaced.
    scion.run("inheritune", shared | {"control": True}, out=f"{out}/first")
    scion.run("inheritune", shared | {"inherit.strategy": "spaced"}, out=f"{out}/spaced")

    found = scion.compare([f"{out}/first", f"{out}/spaced"], f"{out}/compared")
    for sentence in found["summary"]:
        print(sentence)
    print(f"page: {Path(out, 'compared', 'compare.html')}")
    return {row["name"]: row["mean"] for row in found["rows"]}


if __name__ == "__main__":
    main(*sys.argv[1:4])
