"""Two models side by side: what was measured on both in the same way."""

from collections.abc import Mapping, Sequence
from typing import Any

from scionlm.report.analysis_attention import chart_of
from scionlm.report.analysis_chart import LayerChart, Line
from scionlm.report.analysis_read import Look, figure, finite, known, rows
from scionlm.report.html import Content, Markup, RowGroup, clip, name_of, section, table, tag
from scionlm.report.svg import MAX_LAYERS
from scionlm.report.values import integer, mapping, text
from scionlm.report.wording import NONE, count, exact, nats, percent

# Columns of a chart on which two models are laid by their relative depth.
_DEPTHS, _DEPTH = 100, "depth of the layer, in percent"


def beside_section(look: Look, other: Look | None) -> Markup | None:
    """Return the section on both models; None where there is only one."""
    if other is None:
        return None
    names = _short_names(look, other)
    return section("beside", "Side by side", beside_charts(look, other, names), _table(look, other))


def _short_names(look: Look, other: Look) -> tuple[str, str]:
    """Names for a legend, where a long path would leave no room for the other one."""
    here, there = (clip(one.name if len(one.name) < 28 else "…" + one.name[-26:], 28) for one in (look, other))
    return (here, there) if here != there else (f"{here} (this)", f"{there} (other)")


def beside_charts(look: Look, other: Look, names: tuple[str, str]) -> list[Content]:
    """Return charts of rank and mass by layer, of both models by these names."""
    mine, theirs, labels, x_label = places(look, other)
    joined = x_label == _DEPTH
    drawn: list[Content] = []
    shown = (("max_rank", "MaxRank", "MaxRank"), ("mean_mass", "Mean column mass", "mean m*"))
    for key, title, y_label in shown:
        lines = [
            Line(names[0], look.column(key), "source", look.column(f"{key}_std"), places=mine, joined=joined),
            Line(names[1], other.column(key), "child", other.column(f"{key}_std"), places=theirs, joined=joined),
        ]
        if not any(known(one.values) for one in lines):
            continue
        error = "\u00b1 standard deviation over sequences"
        chart = LayerChart(lines, labels, y_label, x_label, error=error)
        whole = f"{title} of both, sequences of {look.seq_len}"
        drawn.append(figure(whole, chart_of(f"beside-{key}", whole, chart)))
    return drawn


def places(look: Look, other: Look) -> tuple[Sequence[float], Sequence[float], list[str], str]:
    """Return where the layers of both stand on one axis, the names of its columns, and its own name.

    Where one was made of the other, or both of the same source, a layer stands where it came from; else at its own
    index where both have as many layers, and at its relative depth where not.
    """
    numbers = len(look.layers), len(other.layers)
    own: tuple[list[float], list[float]] = (
        [float(k) for k in range(numbers[0])],
        [float(k) for k in range(numbers[1])],
    )
    found = places_in(other, look.name, look.num_layers)
    if found is not None:
        return own[0], found, look.labels, f"layer of {clip(look.name, 40)}"
    found = places_in(look, other.name, other.num_layers)
    if found is not None:
        return found, own[1], other.labels, f"layer of {clip(other.name, 40)}"
    for name, total in _sources(look):
        mine, theirs = places_in(look, name, total), places_in(other, name, total)
        if mine is not None and theirs is not None:
            return mine, theirs, [str(k) for k in range(total)], f"layer of {clip(name, 40)}"
    if numbers[0] == numbers[1]:
        return own[0], own[1], look.labels, "layer"
    depths = [str(k) for k in range(_DEPTHS + 1)]
    return _relative(numbers[0]), _relative(numbers[1]), depths, _DEPTH


def _relative(total: int) -> list[float]:
    return [_DEPTHS * k / max(total - 1, 1) for k in range(total)]


def _steps(look: Look) -> list[list[Mapping[str, Any]]]:
    """Where each layer came from, the newest step first; empty where it is not known of all of them."""
    stored = look.model.get("origins")
    if not isinstance(stored, list) or len(stored) != look.num_layers:
        return []
    return [[mapping(step) for step in steps[:40]] if isinstance(steps, list) else [] for steps in stored[:MAX_LAYERS]]


def _sources(look: Look) -> list[tuple[str, int]]:
    """Return (name, layers) of the models the first layer came from, the newest first."""
    steps = _steps(look)
    pairs = [(text(step, "name"), integer(step, "of")) for step in (steps[0] if steps else [])]
    return [(name, total) for name, total in pairs if name and total and 0 < total <= MAX_LAYERS]


def places_in(look: Look, name: str, total: int) -> list[float] | None:
    """Return the layer of the model `name`, of `total` layers, that each layer came from; None unless all did."""
    found: list[float] = []
    for steps in _steps(look):
        indices = [integer(s, "index") for s in steps if text(s, "name") == name and integer(s, "of") == total]
        index = next((index for index in indices if index is not None and 0 <= index < total), None)
        if index is None:
            return None
        found.append(float(index))
    return found or None


def _table(look: Look, other: Look) -> Markup:
    both = (look, other)
    body: list[list[Content]] = [
        ["layers", *(exact(one.num_layers) for one in both)],
        ["parameters", *(count(integer(one.model, "num_parameters")) for one in both)],
        ["loss (nats)", *(nats(finite(one.overall, "nll")) for one in both)],
        ["lazy layers", *(_lazy(one) for one in both)],
        ["rank-1 heads", *(_share(one, "rank1_head_ratio") for one in both)],
        ["mean rank", *(nats(finite(one.overall, "mean_rank"), 1) for one in both)],
        ["sinks at the first token", *(_share(one, "sink_at_first_token") for one in both)],
        ["mass of the sinks", *(_share(one, "sink_mass") for one in both)],
        *_groups(both),
    ]
    header = ("", name_of(look.name, 40), name_of(other.name, 40))
    caption = f"Over all layers and heads, sequences of {look.seq_len}"
    note = (
        "Both were measured on the same sequences. A higher rank is not a lower loss: compare the two rows."
        if all(finite(one.overall, "nll") is not None for one in both)
        else None
    )
    below = tag("p", note, class_="note") if note else None
    return tag("div", table("beside-table", caption, header, [RowGroup(None, body)]), below)


def _groups(both: tuple[Look, Look]) -> list[list[Content]]:
    """AvgRank and AvgMass of each half."""
    found = [{text(group, "name"): group for group in rows(one.record, "groups", 8)} for one in both]
    lines: list[list[Content]] = []
    for name in [name for name in found[0] if name and name in found[1]]:
        for key, said in (("avg_rank", "AvgRank"), ("avg_mass", "AvgMass")):
            lines.append([f"{said}, {clip(name, 40)}", *(nats(finite(groups[name], key), 1) for groups in found)])
    return lines


def _lazy(one: Look) -> str:
    return f"{len(one.lazy)} of {one.num_layers}" if "lazy_layers" in one.overall else NONE


def _share(one: Look, key: str) -> str:
    value = finite(one.overall, key)
    return NONE if value is None else percent(value)
