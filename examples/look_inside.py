"""Which layers is a model's loss made of? Analyse it, cut it by each criterion, and see which one was right.

    scion prepare CORPORA.yaml -o data
    python examples/look_inside.py smollm2-135m data 22 looked

No training: what is measured is the loss right after the cut, on held-out text that the analysis has not seen.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import scionlm as scion


def main(source: str, data: str, layers: str, out: str, tokens: int = 8192, **options: Any) -> dict[str, float]:
    """Return the mean held-out loss, in nats, of the cut that each criterion suggests."""
    analysis = scion.analyze(source, data=data, out=out, layers=int(layers), **options)
    for layer in analysis.record["layers"]:
        lazy = "  lazy" if layer["lazy"] else ""
        print(f"layer {layer['index']:>2}: MaxRank {layer['max_rank']:6.2f}, loss without {layer['removal']:.3f}{lazy}")

    tokenizer = AutoTokenizer.from_pretrained(Path(data, "tokenizer"))
    losses: dict[str, float] = {}
    for suggestion in analysis.record["suggestions"]:
        if suggestion["num_layers"] != int(layers):
            continue  # those that say themselves how many stay
        child = Path(out, "cuts", suggestion["by"])
        if not child.exists():
            tokenizer.save_pretrained(child)
            scion.inherit(source, keep=suggestion["keep"]).save_pretrained(child)
        found = scion.evaluate(str(child), data, max_tokens=tokens).values()
        losses[suggestion["by"]] = sum(loss.nll for loss in found) / len(found)
    for name, loss in sorted(losses.items(), key=lambda item: item[1]):
        print(f"{loss:7.3f} nats  {name}")
    print(f"page: {out}/report.html")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:5])
