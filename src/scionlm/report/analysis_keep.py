"""Whether criteria agree on what layers are worth, and which layers each of them would keep."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from scionlm.report.analysis_attention import map_of
from scionlm.report.analysis_layers import MAX_CRITERIA, NAMES, criteria
from scionlm.report.analysis_read import Look, figure, matrix, named_indices, of, rows, short
from scionlm.report.heatmap import HeatMap, Tone, heat_map
from scionlm.report.html import Content, Markup, RowGroup, clip, name_of, section, table, tag
from scionlm.report.svg import Caption, responsive
from scionlm.report.values import integer, text
from scionlm.report.wording import NONE, exact, index_ranges, nats

_FOUND = {
    "first": "first",
    "angular_block": "angular block",
    "greedy": "greedy removal",
    "before_lazy_group": "before the lazy group",
    "potent_prefix": "before the first lazy",
}

# Names that mean themselves in every shell and on every screen; others are left for the reader to put in.
_PLAIN = re.compile(r"[\w./:@+~-][\w./:@+~ -]*", re.ASCII)


def agreement_section(look: Look) -> Markup | None:
    """Return the section on how far criteria agree; None where there are not two."""
    names = [name for name, _ in criteria(look)]
    values = [row[: len(names)] for row in matrix(look.record.get("correlation"), MAX_CRITERIA)][: len(names)]
    if len(values) < 2:
        return None
    title = "Spearman correlation of what criteria say of the layers"
    caption = Caption("agreement", title, f"{of(len(names), 'criterion').replace('ons', 'a')}, each with each other.")

    def draw(named: Caption, width: int) -> Markup:
        wide = width > 600
        numbered = [f"{k + 1} {name}" for k, name in enumerate(names)]
        columns = [str(k + 1) for k in range(len(names))]
        data = HeatMap(
            values,
            [clip(name, 26 if wide else 16) for name in numbered],
            columns,
            ("and", "criteria", "correlation" if wide else "in hundredths"),
            Tone(0.0, 1.0),
            lambda value: nats(value, 2).replace("-", "\u2212"),
            numbers=True,
            widest=72,
        )
        return heat_map(named, width, data)

    note = (
        "1: they put the layers in the same order; 0: one says nothing of the other; orange: opposite orders. Criteria "
        "that were made from nearly the same numbers agree for that reason."
    )
    picture = figure(title, responsive(caption, draw), note)
    return section("agree", "Do the criteria agree?", _said(names, values), picture)


def _said(names: list[str], values: list[list[float | None]]) -> Content:
    """The pairs that agree most and least, in words."""
    pairs = [
        (value, names[i], names[k])
        for i, row in enumerate(values)
        for k, value in enumerate(row[:i])
        if value is not None
    ]
    if len(pairs) < 2:
        return None
    most, least = max(pairs), min(pairs)
    said = f"Most alike are {most[1]} and {most[2]} ({nats(most[0])}), least {least[1]} and {least[2]} "
    return tag("p", said, f"({nats(least[0])}).".replace("-", "\u2212"))


def keep_section(look: Look) -> Markup | None:
    """Return the section on which layers to keep; None where nothing was suggested."""
    found = rows(look.record, "suggestions")
    if not found:
        return None
    header = ("by", "layers", tag("span", "command", class_="left"))
    body: list[list[Content]] = [
        [_name(one), exact(integer(one, "num_layers")), tag("code", _command(look, one) or NONE, class_="left")]
        for one in found
    ]
    reasons = [
        tag("li", tag("b", _name(one)), ": ", clip(why, 200)) for one in found if (why := text(one, "why")) is not None
    ]
    default = text(look.record, "layer_scores_by")
    chosen: Content = (
        [" The layer scores in analysis.json are those of ", tag("b", NAMES.get(default) or name_of(default, 40)), "."]
        if default
        else None
    )
    note = (
        "Each row is what one criterion would keep; none of them was trained, so which child learns best is not known "
        "from this. Inheritune keeps the first layers."
    )
    return section(
        "keep",
        "What to keep",
        tag("p", note, chosen),
        _strip(look, found),
        table("keep-table", "As commands; put a folder for OUT", header, [RowGroup(None, body)]),
        tag("details", tag("summary", "Why these"), tag("ul", reasons, class_="note")) if reasons else None,
    )


def _name(one: Mapping[str, Any]) -> str:
    by = text(one, "by") or "no name"
    return _FOUND.get(by) or NAMES.get(by) or short(by)


def _command(look: Look, one: Mapping[str, Any]) -> str | None:
    keep = text(one, "keep")
    if named_indices(keep, look.num_layers) is None:
        return None
    name = look.name if text(look.model, "name") else ""
    model = shlex.quote(name) if _PLAIN.fullmatch(name) and not name.startswith("-") and len(name) < 200 else "MODEL"
    return f"scion inherit {model} --keep {keep} -o OUT"


def _strip(look: Look, found: list[Mapping[str, Any]]) -> Content:
    """Layers as columns, a row for each suggestion: filled where it keeps the layer."""
    kept = [(_name(one), named_indices(text(one, "keep"), look.num_layers)) for one in found]
    shown = [(name, set(layers)) for name, layers in kept if layers is not None]
    if not shown or not look.layers:
        return None
    values: list[list[float | None]] = [
        [1.0 if k in layers else 0.0 for k in range(len(look.layers))] for _, layers in shown
    ]
    votes = [sum(k in layers for _, layers in shown) for k in range(len(look.layers))]
    data = HeatMap(
        values,
        [clip(name, 24) for name, _ in shown],
        look.labels,
        ("by", "layer", "kept"),
        Tone(0.0, 1.0),
        lambda value: "kept" if value else "not",
        legend=False,
    )
    most = max(votes)
    all_of = [k for k, number_of in enumerate(votes) if number_of == len(shown)]
    note = f"Kept by all: {index_ranges(all_of)}." if all_of else f"No layer is kept by all; at most {most} agree."
    title = "Which layers each would keep"
    return figure(title, map_of("kept", title, data), note)
