"""`scion analyze`: the findings as tables."""

from pathlib import Path

from scionlm.cli.tables import add_row, new_table, show_table
from scionlm.core.records import Record

_COLUMNS = {
    "max_rank": "MaxRank",
    "mean_mass": "mass",
    "sink_mass": "sink",
    "block_influence": "influence",
    "angular_distance": "angle",
    "taylor": "taylor",
    "removal": "loss without",
}


def print_analysis(record: Record, out: Path) -> None:
    """Print what was found, and where the rest is."""
    model, overall = record["model"], record["overall"]
    text = f"{record['num_sequences']} sequences of {record['seq_len']} tokens"
    table = new_table(f"{model['name']}: {model['num_hidden_layers']} layers, {text}", "layer", *_COLUMNS.values(), "")
    for layer in record["layers"]:
        sign = "lazy" if layer["lazy"] else ""
        add_row(table, layer["index"], *(_number(layer[key]) for key in _COLUMNS), sign)
    show_table(table)
    lazy, share = overall["lazy_layers"], overall["rank1_head_ratio"]
    print(
        f"{len(lazy)} lazy layers{_listed(lazy)}; {100 * share:.0f} % of heads have rank 1 (tau {record['tau']:g}); "
        f"{100 * overall['sink_at_first_token']:.0f} % of sinks are the first token"
    )
    if overall["rank_ties"]:
        print(f"{overall['rank_ties']} of {overall['num_matrices']} matrices stand on the threshold to rounding")
    for group in record["groups"]:
        says = ", lazy" if group["lazy"] else ""
        print(f"layers {group['first']}-{group['last']}: AvgRank {group['avg_rank']:.1f}{says}")
    if record.get("against"):
        _print_against(record)
    suggestions = new_table("\nwhat to keep", "by", "layers", "--keep")
    for each in record["suggestions"]:
        add_row(suggestions, each["by"], each["num_layers"], each["keep"])
    show_table(suggestions)
    correlation = record["correlation"]
    names = [criterion["name"] for criterion in record["criteria"]]
    first = names.index(record["layer_scores_by"])
    others = (f"{name} {row[first]:+.2f}" for name, row in zip(names, correlation, strict=True) if name != names[first])
    print(f"\nrank correlation with {names[first]}: {', '.join(others)}")
    print(f"{out / 'report.html'}")


def _print_against(record: Record) -> None:
    other = record["against"]
    table = new_table("\nside by side", "", "layers", "lazy", "rank-1 heads", "mean rank", "loss")
    for each in (record, other):
        overall = each["overall"]
        lazy = f"{len(overall['lazy_layers'])}{_listed(overall['lazy_layers'])}"
        share = f"{100 * overall['rank1_head_ratio']:.0f} %"
        add_row(
            table, each["model"]["name"], each["model"]["num_hidden_layers"], lazy, share,
            f"{overall['mean_rank']:.2f}", f"{overall['nll']:.3f}",
        )  # fmt: skip
    show_table(table)


def _listed(indices: list[int]) -> str:
    return f" ({', '.join(map(str, indices))})" if indices else ""


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
