"""The table family x check: the largest difference that each proof finds, on tiny random models in float32.

    python benchmarks/families.py

Columns: layers left out, layers moved and doubled, fresh layers with zero outputs (each against the donor's own modules),
width (all sizes that the family can cut, against the masked donor, as a share of the largest logit), files written and read
back, cached against uncached generation, parameters against the formula; and the negative control: the smallest share by
which the logits of one width cut differ from those of another with other indices.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "surgery"))

from test_families import cut, widths

from factories import MODELS, tiny_model
from scionlm.families import count_parameters
from scionlm.sources import load_hf_model, open_folder
from scionlm.surgery.depth import plan_depth, plan_growth
from scionlm.surgery.oracle import build_oracle, load_needed
from scionlm.surgery.surgery import open_surgery
from scionlm.surgery.verify import greedy, short_windows

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad(), short_windows(model):
        return model(input_ids=IDS, use_cache=False).logits


def difference(source, plan):
    """(largest difference, largest logit, the target)."""
    with open_surgery([source], plan) as surgery:
        target = surgery.build(torch.float32)
        needed = {layer.index for layer in plan.layers if layer.init == "source"}
        donor = load_needed(source.config, surgery.weights[0], needed)
        with short_windows(donor):
            expected = build_oracle([donor], plan)(IDS)
        return float((expected - logits(target)).abs().max()), float(expected.abs().max()), target


def row(model_type, changes, folder):
    tiny_model(model_type, **changes).save_pretrained(folder)
    source = open_folder(folder)
    dropped, *_ = difference(source, plan_depth(5, keep=[0, 2, 4]))
    moved, *_ = difference(source, plan_depth(5, keep=[4, 1, 1], repeat=True))
    grown, *_ = difference(source, plan_growth(["source"], 5, 7, "zero_output"))
    worst, control = 0.0, float("inf")
    for sizes in widths(source):
        found, largest, target = difference(source, cut(source, **sizes))
        worst = max(worst, found / largest)
        _, _, other = difference(source, cut(source, seed=1, **sizes))
        control = min(control, float((logits(target) - logits(other)).abs().max()) / largest)
    plan = cut(source, **widths(source)[-1])
    out = folder / "out"
    out.mkdir()
    with open_surgery([source], plan) as surgery:
        surgery.write(out)
        target = surgery.build(torch.float32)
    again = load_hf_model(open_folder(out), torch.float32)
    reloaded = float((logits(target) - logits(again)).abs().max())
    with torch.no_grad(), short_windows(again):
        cached = torch.equal(greedy(again, IDS, use_cache=True), greedy(again, IDS, use_cache=False))
    config = again.config.to_dict()
    counted = sum(p.numel() for p in again.parameters()) == count_parameters(config)["total"]
    name = " ".join([model_type, *(f"{key}={value}" for key, value in changes.items())])
    cells = (f"{dropped:g}", f"{moved:.2g}", f"{grown:.2g}", f"{worst:.1e}", f"{reloaded:g}")
    return (
        f"| {name} | "
        + " | ".join((*cells, "equal" if cached else "DIFFER", "equal" if counted else "DIFFER", f"{control:.2f}"))
        + " |"
    )


def main():
    warnings.simplefilter("ignore")
    print("| family | dropped | moved, doubled | grown | width | reloaded | cached | parameters | control |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model_type, changes in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            print(row(model_type, changes, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
