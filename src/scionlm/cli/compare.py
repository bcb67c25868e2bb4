"""What `scion compare`, and `scion run` of a sweep, print for people."""

from pathlib import Path
from typing import Any

from rich.table import Table

from scionlm.cli.tables import add_row, new_table, show_table
from scionlm.core.log import format_count, format_seconds

_MAX_DOMAINS = 4  # more columns do not fit into a terminal; compare.md has them all


def print_comparison(found: dict[str, Any], out: Path) -> None:
    """Print a comparison: what won, a row a run, and where the page is."""
    domains = found["domains"][:_MAX_DOMAINS]
    table = new_table(
        found["summary"][0],
        "held-out nll (nats)", "layers", "params", "seed", "tokens", "time", *domains, "mean", "gap closed",
    )  # fmt: skip
    for source in found["sources"]:
        add_row(table, f"{source['name']} (source)", *_sizes(source), "", "", "", *_losses(source, domains), "")
    rows = {row["name"]: row for row in found["rows"]}
    for group in found["groups"]:
        members = [rows.pop(name) for name in group["rows"]]
        if len(members) > 1:
            losses = [*_losses(group, domains)[:-1], f"{group['mean']:.3f} \u00b1 {group['std']:.3f}"]
            cells = [*_sizes(members[0]), f"{group['n']} seeds", _count(members[0]["tokens"]), ""]
            add_row(table, group["name"], *cells, *losses, _share(group))
        for row in members:
            _add(table, row, domains, "  " if len(members) > 1 else "")
    for row in rows.values():
        _add(table, row, domains)
    show_table(table)
    print()
    for sentence in found["summary"][1:]:
        print(sentence)
    print(f"page: {out / 'compare.html'}")


def _add(table: Table, row: dict[str, Any], domains: list[str], indent: str = "") -> None:
    seconds = format_seconds(row["seconds"]) if row["seconds"] is not None else ""
    cells = [*_sizes(row), "" if row["seed"] is None else row["seed"], _count(row["tokens"]), seconds]
    add_row(table, indent + _name(row), *cells, *_losses(row, domains), _share(row))


def _name(row: dict[str, Any]) -> str:
    notes = [] if row["state"] == "done" else [row["state"]]
    notes += ["not comparable"] if row["not_comparable"] else []
    return f"{row['name']} ({', '.join(notes)})" if notes else row["name"]


def _sizes(row: dict[str, Any]) -> list[object]:
    layers = row["num_hidden_layers"]
    return ["" if layers is None else layers, _count(row["num_parameters"])]


def _count(value: int | None) -> str:
    return "" if value is None else format_count(value)


def _losses(row: dict[str, Any], domains: list[str]) -> list[str]:
    found = [row["domains"].get(name) for name in domains] + [row["mean"]]
    return ["" if value is None else f"{value:.3f}" for value in found]


def _share(row: dict[str, Any]) -> str:
    return "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %"
