"""The best model that a budget of parameters has room for: which shapes there are, and one of them by learned masks.

    scion prepare CORPORA.yaml -o data
    python examples/prune_to_budget.py smollm2-135m data 60M runs/budget

The numbers of SETTINGS show how it works in an hour on a laptop; a model of use takes a thousand times the tokens.
"""

import sys
from typing import Any

import scionlm as scion

SETTINGS: dict[str, Any] = {
    "prune.tokens": "100k",
    "train.tokens": "200k",
    "train.global_batch_tokens": 1024,
    "train.micro_batch_size": 4,
    "data.seq_len": 256,
    "optimizer.lr": 1e-3,
    "evaluate.tokens_per_domain": 8192,
    "distill": {"teacher": "source"},
}


def main(source: str, data: str, parameters: str, out: str, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """Show the shapes within a budget, prune to the first, and return its sizes."""
    request = {"source": source, "data.dir": data, "target.parameters": parameters} | settings

    # What it would take, and which shapes fit, before a weight is read.
    planned = scion.plan("shear", request)
    print(
        f"{planned['num_parameters']:,} parameters, {planned['num_tokens']:,} tokens, {planned['seconds']:.0f} s here"
    )
    for candidate in planned["candidates"][:5]:
        print(f"  {candidate['shape']}  ({candidate['why']})")

    result = scion.run("shear", request, out=out)
    for domain, loss in result["domains"].items():
        print(f"{domain}: source {result['source']['domains'][domain]['nll']:.3f}, pruned {loss['nll']:.3f} nats")
    print(f"model: {out}/model, page: {out}/report.html")
    return result["model"]


if __name__ == "__main__":
    main(*sys.argv[1:5])
