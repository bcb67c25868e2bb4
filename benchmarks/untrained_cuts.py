"""Loss right after surgery, without training: layers dropped by each strategy, and width cut by each importance score.

    python benchmarks/untrained_cuts.py DATA [--source smollm2-135m] [--tokens 8192] [--precision bf16] -o RESULTS.json
    python benchmarks/untrained_cuts.py DATA --analysis OUT/analysis.json -o RESULTS.json

With --analysis it is the layers that each criterion of `scion analyze` would keep instead.

DATA is a folder made by `scion prepare`. Scores are collected once, on its training part (`recipes.scores`); losses are of
its held-out part. Each finished row is appended to RESULTS.json's lines, and a second call goes on with what is missing.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from scionlm.data import DataFolder
from scionlm.evaluation.loss import domain_losses, model_token_nll
from scionlm.families import ModelShape, family_of
from scionlm.recipes.scores import Scorer
from scionlm.sources import load_hf_model, resolve
from scionlm.surgery.depth import parse_keep, plan_depth
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.width import WidthTarget, plan_width

DROPPED = (1, 2, 4, 8)
STRATEGIES = ("first", "first_last", "spaced", "middle", "last", "block influence")
WIDTHS = {
    "MLP 3/4": {"intermediate_size": 1152},
    "hidden 3/4": {"hidden_size": 432},
    "heads 2/3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "MLP 3/4 and hidden 3/4": {"intermediate_size": 1152, "hidden_size": 432},
}
RULES = ("first", "random", "magnitude", "activation", "taylor")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--source", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--analysis", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
    folder, data = resolve(args.source), DataFolder(Path(args.data))
    shape, family = ModelShape.of(folder.config), family_of(folder.config)
    total = shape.num_hidden_layers
    done = {}
    if args.out.exists():
        done = {row["cut"]: row for row in map(json.loads, args.out.read_text().splitlines())}

    scores: dict[str, dict] = {}
    scorer = Scorer(folder, args.data)

    def scores_of(rule):
        if rule not in scores:
            if rule == "random":
                rng = np.random.default_rng(0)
                scores[rule] = {
                    "hidden": rng.random(shape.hidden_size),
                    "heads": rng.random((total, shape.num_attention_heads)),
                    "ffn": rng.random((total, shape.intermediate_size)),
                }
            else:
                scores[rule] = scorer.get(rule)
        return scores[rule]

    def measure(name, make_plan):
        if name in done:
            return
        if name == "source":
            model = load_hf_model(folder, dtype)
            parameters = model.num_parameters()
        else:
            with open_surgery([folder], make_plan()) as surgery:
                model = surgery.build(torch.float32)
                if not args.analysis:  # some twenty cuts by depth, which tests prove
                    surgery.prove(model)
                parameters = model.num_parameters()
                model = model.to(dtype)
        losses = domain_losses(model_token_nll(model), data, data.domains, 1024, args.tokens)
        row = {"cut": name, "parameters": parameters} | {domain: loss.nll for domain, loss in losses.items()}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def by_depth(strategy, number):
        if strategy == "block influence":
            return plan_depth(total, number, scores=scores_of("activation")["layers"].tolist())
        return plan_depth(total, number, strategy=strategy)

    def by_width(rule, sizes):
        every = plan_depth(total, total)
        return plan_width(every, family, shape, WidthTarget(**sizes), scores_of(rule), rule)

    measure("source", None)
    if args.analysis:
        for each in json.loads(args.analysis.read_text())["suggestions"]:
            measure(f"{each['by']}: {each['keep']}", lambda k=each["keep"]: plan_depth(total, keep=parse_keep(k)))
        return
    for number in DROPPED:
        for strategy in STRATEGIES:
            measure(f"drop {number}: {strategy}", lambda s=strategy, n=number: by_depth(s, total - n))
    for label, sizes in WIDTHS.items():
        for rule in RULES:
            measure(f"{label}: {rule}", lambda r=rule, s=sizes: by_width(r, s))


if __name__ == "__main__":
    main()
