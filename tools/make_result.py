"""Keep a sweep as a result: what a reader needs to check it, small enough to commit.

    python tools/make_result.py RUN RECIPE.yaml docs/results/NAME

recipe.yaml    the sweep as it was started
compare.json   final losses of every run, and of all seeds of one together, as `scion compare` has them
metrics.csv    every held-out measurement on the way: run, seed, step, tokens, nats by domain
losses.svg     the final means, a dot a seed
index.md       is written by hand but for the table between two comments, a line for all seeds of a run

With --keep runs that the result has already and that are not made again stay in it: on the same text, without controls.
"""

import argparse
import csv
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from scionlm.report.compare import write_comparison

_PREFIX, _SUFFIX = "eval/", "/nll_nats"
BEGIN, END = "<!-- table: tools/make_result.py -->\n", "<!-- end of table -->\n"


def measurements(folder: Path, domains: list[str]) -> Iterator[list[Any]]:
    """Yield step, tokens and losses of every measurement of a run."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses = [record.get(f"{_PREFIX}{name}{_SUFFIX}") for name in domains]
        if None not in losses:
            yield [record["step"], record["tokens"], *(f"{loss:.4f}" for loss in losses)]


def _trained_in(row: dict[str, Any]) -> Path:
    return Path(row["folder"]) / ("control" if row["kind"] == "control" else "")


def write_metrics(path: Path, found: dict[str, Any], kept: list[list[str]]) -> None:
    """Write what was measured of all runs as CSV, `kept` lines of earlier ones among it."""
    lines = [
        [row["name"], row["seed"], *measured]
        for row in found["rows"]
        for measured in measurements(_trained_in(row), found["domains"])
    ]
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["run", "seed", "step", "tokens", *found["domains"]])
        rows.writerows(sorted([*lines, *kept], key=lambda line: line[0]))


_SAME = ("domains", "num_tokens_by_domain", "seq_len", "data_fingerprint")


def with_earlier(found: dict[str, Any], earlier: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return a comparison with the runs of an earlier one that it has not, and their names."""
    if any(found[key] != earlier[key] for key in _SAME):
        raise SystemExit("the earlier runs are of other text: make all of them again")
    made = {row["name"] for row in found["rows"]}
    kept = [row for row in earlier["rows"] if row["name"] not in made]
    if any(row["kind"] == "control" or row["gap_closed"] is not None for row in [*found["rows"], *kept]):
        raise SystemExit("runs with a control: make all of them again")
    rows = sorted([*found["rows"], *kept], key=lambda row: row["mean"])
    groups = regrouped(rows)
    names = {name: group["name"] for group in groups for name in group["rows"]}
    rows = [row | {"group": names[row["name"]]} for row in rows]
    return found | {"rows": rows, "groups": groups, "summary": []}, {row["name"] for row in kept}


def regrouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of rows without controls: those whose names differ by their seed alone, the best first."""
    members: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        members.setdefault(row["name"].removesuffix(f"-seed{row['seed']}"), []).append(row)
    ordered = sorted(members.values(), key=lambda group: statistics.fmean(row["mean"] for row in group))
    best = {row["seed"]: row["mean"] for row in ordered[0]}
    groups = []
    for group in ordered:
        first, means = group[0], [row["mean"] for row in group]
        apart = [row["mean"] - best[row["seed"]] for row in group if group is not ordered[0] and row["seed"] in best]
        behind = {"mean": statistics.fmean(apart), "std": statistics.stdev(apart)} if len(apart) > 1 else None
        groups.append(
            {
                "name": first["name"] if len(group) == 1 else first["name"].removesuffix(f"-seed{first['seed']}"),
                "kind": first["kind"],
                "rows": [row["name"] for row in group],
                "seeds": [row["seed"] for row in group],
                "n": len(group),
                "mean": statistics.fmean(means),
                "std": statistics.stdev(means) if len(group) > 1 else None,
                "domains": {name: statistics.fmean(row["domains"][name] for row in group) for name in first["domains"]},
                "gap_closed": None,
                "best": group is ordered[0],
                "behind_best": behind
                and behind | {"seeds": len(apart), "worse": sum(difference > 0 for difference in apart)},
            }
        )
    return groups


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draw the final means."""
    groups = found["groups"][::-1]
    means = {row["name"]: row["mean"] for row in found["rows"]}
    plt.rcParams |= {"svg.hashsalt": "scion", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.28 * len(groups)), layout="constrained")
    for place, group in enumerate(groups):
        axes.plot([means[name] for name in group["rows"]], [place] * group["n"], "o", color="#2f6f4f", alpha=0.6, ms=5)
        axes.plot([group["mean"]] * 2, [place - 0.3, place + 0.3], color="#2f6f4f", lw=2)
    for source in found["sources"]:
        axes.axvline(source["mean"], color="#888888", ls="--", lw=1, label="source")
        axes.legend(frameon=False)
    axes.set_yticks(range(len(groups)), [group["name"] for group in groups])
    axes.set_xlabel("held-out nats per token, mean over domains; a dot is a seed, a bar their mean")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def table(found: dict[str, Any]) -> str:
    """Return the table of all runs, the best first."""
    rows = {row["name"]: row for row in found["rows"]}
    with_gap = any(group["gap_closed"] is not None for group in found["groups"])
    columns = [
        "run",
        "layers",
        "parameters",
        "tokens",
        "seeds",
        "mean",
        "behind",
        *(["of the gap"] if with_gap else []),
    ]
    columns += found["domains"]
    lines = [" | ".join(columns), "|".join(["---"] * len(columns))]
    for source in found["sources"]:
        sizes = [
            str(source["num_hidden_layers"]),
            f"{source['num_parameters'] / 1e6:.1f}M",
            "",
            "",
            f"{source['mean']:.3f}",
        ]
        losses = [f"{source['domains'][name]:.3f}" for name in found["domains"]]
        lines.append(" | ".join(["the source", *sizes, "", *([""] if with_gap else []), *losses]))
    for group in found["groups"]:
        first, behind = rows[group["rows"][0]], group["behind_best"]
        spread = "" if group["std"] is None else f" ± {group['std']:.3f}"
        cells = [
            group["name"],
            str(first["num_hidden_layers"]),
            f"{first['num_parameters'] / 1e6:.1f}M",
            f"{first['tokens']:,}",
            str(group["n"]),
            f"**{group['mean']:.3f}**{spread}",
            f"{behind['mean']:.3f} ± {behind['std']:.3f}" if behind else "",
        ]
        if with_gap:
            cells.append("" if group["gap_closed"] is None else f"{100 * group['gap_closed']:.0f} %")
        lines.append(" | ".join([*cells, *(f"{group['domains'][name]:.3f}" for name in found["domains"])]))
    return "".join(f"| {line} |\n" for line in lines)


def main() -> None:
    """Keep a sweep as a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep runs that are there and not made again")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    earlier = json.loads((out / "compare.json").read_text()) if arguments.keep else None
    found = write_comparison(arguments.run, out)
    for page in ("compare.html", "compare.md"):
        (out / page).unlink()
    lines: list[list[str]] = []
    measured = found
    if earlier is not None:
        found, names = with_earlier(found, earlier)
        with (out / "metrics.csv").open() as file:
            lines = [line for line in csv.reader(file) if line[0] in names]
    write_metrics(out / "metrics.csv", measured, lines)
    draw(out / "losses.svg", found)
    index = out / "index.md"
    before, _, after = index.read_text().partition(BEGIN) if index.exists() else ("", "", "")
    index.write_text(before + BEGIN + table(found) + END + after.rpartition(END)[2])
    for row in found["rows"]:  # where they were is of no use to anyone else
        row["folder"] = Path(row["folder"]).name
    manifest = json.loads((arguments.run[0] / "manifest.json").read_text())
    kept = {key: manifest.get(key) for key in ("command", "git_commit", "versions")}
    kept["command"] = [Path(word).name if word.startswith("/") else word for word in kept["command"]]
    (out / "compare.json").write_text(json.dumps(kept | found, indent=1, ensure_ascii=False) + "\n")
    shutil.copyfile(arguments.recipe, out / "recipe.yaml")


if __name__ == "__main__":
    main()
