"""Set what criteria say of layers beside what training recovers of the models that keep some of them.

    python tools/score_recovery.py ANALYSIS.json RUN... -o docs/results/NAME

A criterion's forecast of a run is the sum of its scores of the layers that the run left out: the higher, the worse it
should end. Each criterion, and the loss right after surgery, is set beside the held-out loss at the end by Spearman's
correlation over all runs, with the share of random orders that do as well; and by how far the run that it ranks first
ends behind the best. Written are scores.csv, a line a run, and the table of index.md between two comments. Runs that
scores.csv has already and that are not given stay in it, with the analysis that is given.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from scionlm.analysis.ranking import rank_correlation

BEGIN, END = "<!-- table: tools/score_recovery.py -->\n", "<!-- end of scores -->\n"
BEFORE = "loss right after surgery"
_ORDERS = 100_000


def mean_of(domains: dict[str, Any], names: list[str]) -> float:
    """Return the mean loss over domains."""
    return float(np.mean([domains[name]["nll"] for name in names]))


def earlier(path: Path) -> list[dict[str, str]]:
    """Return the lines of a scores.csv; none where there is none."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def luck_of(forecast: np.ndarray, ended: np.ndarray, found: float) -> float:
    """Return the share of random orders whose correlation is as high."""
    rng = np.random.default_rng(0)
    ranks = [np.argsort(np.argsort(values)) - (len(values) - 1) / 2 for values in (forecast, ended)]
    orders = np.stack([rng.permutation(ranks[1]) for _ in range(_ORDERS)])
    return float(np.mean(orders @ ranks[0] / (ranks[0] @ ranks[0]) >= found - 1e-9))


def main() -> None:
    """Write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("analysis", type=Path)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    analysis = json.loads(arguments.analysis.read_text())
    scores = {one["name"]: np.array(one["scores"]) for one in analysis["criteria"]}
    folders = [folder for run in arguments.run for folder in sorted((run / "runs").iterdir())]
    results = {folder.name: json.loads((folder / "result.json").read_text()) for folder in folders}
    results = {name: result for name, result in results.items() if result["inherit"]["init"] == "source"}
    domains = list(next(iter(results.values()))["domains"])

    kept = {name: result["inherit"]["keep"] for name, result in results.items()}
    before = {name: mean_of(result["before"], domains) for name, result in results.items()}
    ends = {name: mean_of(result["domains"], domains) for name, result in results.items()}
    for row in earlier(arguments.out / "scores.csv"):
        if row["run"] not in kept:
            kept[row["run"]] = [int(layer) for layer in row["keep"].split()]
            before[row["run"]], ends[row["run"]] = float(row[BEFORE]), float(row["ended"])
    forecasts = {
        criterion: np.array([values.sum() - values[keep].sum() for keep in kept.values()])
        for criterion, values in scores.items()
    }
    forecasts[BEFORE] = np.array(list(before.values()))
    ended = np.array([ends[name] for name in kept])

    with (arguments.out / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["run", "keep", "ended", *forecasts])
        for i in np.argsort(ended):
            name = list(kept)[i]
            keep = " ".join(map(str, kept[name]))
            rows.writerow([name, keep, f"{ended[i]:.4f}", *(f"{values[i]:.6g}" for values in forecasts.values())])

    columns = ["forecast by", "correlation", "chance does as well", "its first choice", "behind the best"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found = {name: float(rank_correlation({"a": values, "b": ended})[0, 1]) for name, values in forecasts.items()}
    for name in sorted(found, key=lambda name: -found[name]):
        first = int(np.argmin(forecasts[name]))
        luck = luck_of(forecasts[name], ended, found[name])
        behind = ended[first] - ended.min()
        lines.append(f"| {name} | {found[name]:+.2f} | {luck:.1%} | {list(kept)[first]} | {behind:.3f} |")
    index = arguments.out / "index.md"
    before, _, after = index.read_text().partition(BEGIN)
    index.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after.rpartition(END)[2])


if __name__ == "__main__":
    main()
