"""What `scion compare`, and `scion run` of a sweep, print for people."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from scionlm.cli.evaluate import task_names
from scionlm.cli.tables import add_row, new_table, show_table
from scionlm.core.errors import UsageError
from scionlm.core.log import format_count, format_seconds

if TYPE_CHECKING:
    from scionlm.recipes.evaluate import EvaluateOptions

_MAX_TASKS = 5
_OF_TASKS = {"--limit": "limit", "--num-fewshot": "num_fewshot", "--allow-task-code": "allow_task_code"}
_MAX_DOMAINS = 4  # more columns do not fit into a terminal; compare.md has them all

_Record = dict[str, Any]
_Columns = Sequence[tuple[str, Callable[[_Record], str]]]


def print_comparison(found: _Record, out: Path) -> None:
    """Print a comparison: what won, a row a run, and where the page is."""
    columns = _columns(found)
    table = new_table(found["summary"][0], "held-out nll (nats)", *(title for title, _ in columns))
    for source in found["sources"]:
        _add(table, f"{source['name']} (source)", source, columns)
    rows = {row["name"]: row for row in found["rows"]}
    for group in found["groups"]:
        members = [rows.pop(name) for name in group["rows"]]
        if len(members) > 1:
            _add(table, group["name"], _of_seeds(group, members[0], found["frontier"]), columns)
        for row in members:
            _add(table, ("  " if len(members) > 1 else "") + _name(row), row, columns)
    for row in rows.values():
        _add(table, _name(row), row, columns)
    show_table(table)
    if found["tasks"] and found["tasks"]["metrics"]:
        _print_tasks(found["tasks"])
    print()
    for sentence in found["summary"][1:]:
        print(sentence)
    print(f"page: {out / 'compare.html'}")


def scores_asked(tasks: str | None, how: _Record) -> "EvaluateOptions | None":
    """Return what the flags of `scion compare` ask for beside losses; None where that is nothing.

    Args:
        tasks: Names, with commas between them.
        how: Other fields of `EvaluateOptions`.

    Raises:
        UsageError: Something is said of tasks, and there are none.
    """
    names = task_names(tasks)
    if not (names or how["suites"] or how["tasks_dir"]):
        unused = [flag for flag, key in _OF_TASKS.items() if how[key] is not None and how[key] is not False]
        if unused:
            raise UsageError(f"{unused[0]} is for tasks; give --tasks, --suite or --tasks-dir")
        if not how["speed"]:
            return None
    from scionlm.recipes.evaluate import EvaluateOptions

    return EvaluateOptions(losses=False, tasks=names, **how)


def _print_tasks(found: _Record) -> None:
    """Print the scores, a row a model."""
    names = list(found["metrics"])[:_MAX_TASKS]
    paired = any(one["difference"] for one in found["models"])
    columns = [*names, "mean", *([f"less {found['against']}"] if paired else [])]
    table = new_table("\nscores, with their standard errors over items", "", *columns)
    for one in found["models"]:
        if one["scores"]:
            cells = [_score(one["scores"].get(name)) for name in names]
            last = [_apart(one["difference"])] if paired else []
            add_row(table, one["name"], *cells, _plain(one["mean"]), *last)
    show_table(table)


def _score(score: _Record | None) -> str:
    if score is None:
        return ""
    return f"{score['value']:.3f}" + (f" ± {score['stderr']:.3f}" if score["stderr"] is not None else "")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _apart(found: _Record | None) -> str:
    if found is None:
        return ""
    ends = f" ({found['low']:+.3f} to {found['high']:+.3f})" if found["low"] is not None else ""
    return f"{found['mean']:+.3f}{ends}"


def _columns(found: _Record) -> _Columns:
    """Return the columns and how each is read of a record.

    Where there is a frontier, its two sides are in the place of the domains, and what is the same for most is left out:
    more does not fit.
    """
    gap = [("gap closed", _share)] if any(row["gap_closed"] is not None for row in found["rows"]) else []
    behind = [("behind", _behind)] if any(group["behind_best"] for group in found["groups"]) else []
    if not found["frontier"]:
        domains = [(name, partial(_domain, name)) for name in found["domains"][: _MAX_DOMAINS - 2 * len(behind)]]
        sizes = [("layers", _layers), ("params", partial(_count, "num_parameters"))]
        costs = [("seed", _seed), ("tokens", partial(_count, "tokens")), ("time", _time)]
        return [*sizes, *costs, *domains, ("mean", partial(_number, "mean")), *behind, *gap]
    sides = [(name, partial(_number, name)) for name in ("upstream", "downstream", "mean")]
    changes = [
        ("forgets", partial(_number, "forgetting", sign="+")),
        ("gains", partial(_number, "adaptation", sign="+")),
    ]
    return [
        ("params", partial(_count, "num_parameters")), ("seed", _seed), ("tokens", partial(_count, "tokens")),
        *sides, *changes, *gap,
    ]  # fmt: skip


def _of_seeds(group: _Record, first: _Record, frontier: _Record | None) -> _Record:
    """Return the record of a group of seeds: means with their spread, and the sizes that they share."""
    shared = {key: first[key] for key in ("num_hidden_layers", "num_parameters", "tokens")}
    if frontier is None:
        return shared | group | {"seed": f"{group['n']} seeds", "mean_std": group["std"]}
    # What is forgotten and gained has the spread; of the losses it would be the same again.
    point = next((point for point in frontier["points"] if point["rows"] == group["rows"]), {})
    values = {key: point.get(key) for key in ("upstream", "downstream")}
    changes = {key: point.get(key) for what in ("forgetting", "adaptation") for key in (what, f"{what}_std")}
    return shared | group | values | changes | {"seed": f"{group['n']} seeds"}


def _add(table: Table, name: str, record: _Record, columns: _Columns) -> None:
    add_row(table, name, *(read(record) for _, read in columns))


def _name(row: _Record) -> str:
    notes = [] if row["state"] == "done" else [row["state"]]
    notes += ["not comparable"] if row["not_comparable"] else []
    return f"{row['name']} ({', '.join(notes)})" if notes else row["name"]


def _behind(record: _Record) -> str:
    behind = record.get("behind_best")
    return f"{behind['mean']:.3f} ± {behind['std']:.3f}" if behind else ""


def _layers(record: _Record) -> str:
    layers = record["num_hidden_layers"]
    return "" if layers is None else str(layers)


def _count(key: str, record: _Record) -> str:
    value = record.get(key)
    return "" if value is None else format_count(value)


def _seed(record: _Record) -> str:
    seed = record.get("seed")
    return "" if seed is None else str(seed)


def _time(record: _Record) -> str:
    seconds = record.get("seconds")
    return "" if seconds is None else format_seconds(seconds)


def _domain(name: str, record: _Record) -> str:
    value = record["domains"].get(name)
    return "" if value is None else f"{value:.3f}"


def _number(key: str, record: _Record, sign: str = "-") -> str:
    """Return a number, with the spread of seeds where there is one."""
    value, spread = record.get(key), record.get(f"{key}_std")
    return "" if value is None else f"{value:{sign}.3f}" + (f" \u00b1 {spread:.3f}" if spread is not None else "")


def _share(record: _Record) -> str:
    share = record.get("gap_closed")
    return "" if share is None else f"{100 * share:.0f} %"
