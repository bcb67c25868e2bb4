"""How attention has collapsed: rank and mass by layer and head, by threshold, length and domain."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from scionlm.report.analysis_chart import LEFT, WIDEST, LayerChart, Line, layer_chart
from scionlm.report.analysis_maps import maps_gallery
from scionlm.report.analysis_read import (
    Look,
    figure,
    finite,
    indices,
    known,
    numbers,
    of,
    rows,
    short,
    small_figure,
)
from scionlm.report.heatmap import HeatMap, Tone, heat_map
from scionlm.report.html import Content, Markup, RowGroup, name_of, section, table, tag
from scionlm.report.svg import Caption, responsive
from scionlm.report.values import integer, text
from scionlm.report.wording import NONE, exact, index_ranges, nats, percent, quantity

_WHOLE, _HALF = (230, 190), (150, 150)

# Lines of a sweep that still can be told apart.
_MAX_LINES = 6


def attention_section(look: Look, maps: Mapping[str, Any]) -> Markup:
    """Return the section on attention."""
    return section(
        "attention",
        "Attention",
        _left_out(look),
        _by_layer(look),
        _by_head(look),
        _sweeps(look),
        _lengths(look),
        _domains(look),
        maps_gallery(maps, look),
    )


def _left_out(look: Look) -> Content:
    if look.num_layers <= len(look.layers) or not look.layers:
        return None
    shown = f"The first {of(len(look.layers), 'layer')} of {exact(look.num_layers)} are drawn"
    return tag("p", f"{shown}; the others are in analysis.json.")


def chart_of(ident: str, title: str, chart: LayerChart, half: bool = False) -> Markup:
    """Return a chart for the whole width of the page or half of it, wide and narrow."""
    caption = Caption(ident, title, _described(chart))
    sizes = _HALF if half else _WHOLE

    def draw(named: Caption, width: int) -> Markup:
        wide = width > 600
        return layer_chart(named, (430 if wide else 320) if half else width, sizes[0 if wide else 1], chart)

    return responsive(caption, draw)


def _described(chart: LayerChart) -> str:
    said: list[str] = []
    for one in chart.lines[:8]:
        values = known(one.values)
        if values:
            span = f"from {quantity(min(values))} to {quantity(max(values))}"
            said.append(f"{short(one.name)}: {of(len(values), 'value')}, {span}.")
    return " ".join(said) or "Nothing was recorded."


def map_of(ident: str, title: str, data: HeatMap, half: bool = False) -> Markup:
    """Return a heat map for the whole width of the page or half of it, wide and narrow."""
    values = [value for row in data.values for value in known(row)]
    span = f", from {data.show(min(values))} to {data.show(max(values))}" if values else ""
    caption = Caption(ident, title, f"{of(len(values), 'cell')} of {data.axes[2]}{span}.")
    return responsive(caption, lambda named, width: heat_map(named, (430, 320)[width < 600] if half else width, data))


def _by_layer(look: Look) -> Content:
    marked = (look.lazy, "lazy layer")
    n = integer(look.record, "num_sequences")
    spread = f"\u00b1 standard deviation over {of(n, 'sequence') if n else 'sequences'}"
    rank = LayerChart(
        [Line("MaxRank", look.column("max_rank"), error=look.column("max_rank_std"))],
        look.labels,
        "MaxRank",
        marked=marked,
        error=spread,
    )
    mass = LayerChart(
        [Line("mean mass", look.column("mean_mass"), "source", error=look.column("mean_mass_std"))],
        look.labels,
        "mean m*",
        marked=marked,
        error=spread,
    )
    tau, eta = finite(look.record, "tau"), finite(look.record, "eta")
    note = (
        "MaxRank is the mean rank k* of the head where it is largest: how many directions hold "
        f"{_share(tau)} of the energy of its attention matrix. At this length it can be anything from 1 to "
        f"{exact(integer(look.record, 'seq_len'))}, so compare it only with ranks at the same length."
    )
    mass_note = (
        f"How many columns, tokens that are looked at, hold {_share(eta)} of the mass of an attention matrix; "
        "mean over the heads of a layer."
    )
    title = f"MaxRank by layer, sequences of {look.seq_len}"
    mass_title = f"Mean column mass by layer, sequences of {look.seq_len}"
    return [
        figure(title, chart_of("max-rank", title, rank), note),
        figure(mass_title, chart_of("mean-mass", mass_title, mass), mass_note),
    ]


def _share(value: float | None) -> str:
    return "the given share" if value is None else f"{value * 100:g}%"


def few_digits(value: float) -> str:
    """Return a rank or a mass: 1, 8.96, 78.7."""
    return f"{value:.3g}" if abs(value) < 1000 else exact(value)


def head_map(look: Look, key: str, name: str, tone: Tone, show: Callable[[float], str]) -> HeatMap:
    """Return the heat map of a number of each head; its columns line up with the charts by layer."""
    values = look.heads(key)
    names = [str(head) for head in range(len(values))]
    return HeatMap(values, names, look.labels, ("head", "layer", name), tone, show, left=LEFT, widest=WIDEST)


def _by_head(look: Look) -> Content:
    ranks = [value for row in look.heads("rank") for value in known(row)]
    masses = [value for row in look.heads("mass") for value in known(row)]
    if not ranks and not masses:
        return None
    highest = max(*ranks, *masses, 2.0)
    counts = Tone(1.0, highest, logarithmic=True)
    maps = (
        ("rank", "rank k*", counts, few_digits, "Rank k* of each head"),
        ("mass", "mass m*", counts, few_digits, "Columns that hold most of the mass, m*, of each head"),
        ("sink_mass", "share of the mass", Tone(0.0, 1.0), partial(nats, digits=2), "Mass of each head's sink"),
    )
    notes = (
        "The tone goes by the logarithm: the palest cells are heads of rank 1. Rest the pointer on a cell to read it.",
        "On the same scale as the ranks. Where m* is near 1, nearly all tokens look at one: the head is a sink.",
        "The share of the mass in the one column that holds most of it.",
    )
    drawn: list[Content] = []
    for (key, name, tone, show, title), note in zip(maps, notes, strict=True):
        whole = f"{title}, sequences of {look.seq_len}"
        drawn.append(figure(whole, map_of(f"heads-{key}", whole, head_map(look, key, name, tone, show)), note))
    return drawn


def _sweeps(look: Look) -> Content:
    taus, etas = rows(look.record, "taus"), rows(look.record, "etas")
    if not taus and not etas:
        return None
    by_tau = _swept(look, taus, "tau", "max_rank", "MaxRank")
    by_eta = _swept(look, etas, "eta", "mean_mass", "mean m*")
    titles = "MaxRank by threshold tau", "Mean mass by threshold eta"
    pictures = [
        small_figure(title, chart_of(f"sweep-{key}", f"{title}, sequences of {look.seq_len}", chart, half=True))
        for title, key, chart in zip(titles, ("tau", "eta"), (by_tau, by_eta), strict=True)
        if chart is not None
    ]
    header = ("tau", "lazy layers", "rank-1 heads", "mean rank")
    body = [[_number(finite(one, "tau")), *_counted(one)] for one in taus]
    caption = f"By the threshold of the rank, sequences of {look.seq_len}"
    return [
        tag("h3", "Does it depend on the threshold?", class_="sub"),
        tag("div", pictures, class_="columns"),
        table("taus-table", caption, header, [RowGroup(None, body)]) if body else None,
    ]


def _counted(one: Mapping[str, Any]) -> list[Content]:
    """Cells of a table: lazy layers, the share of rank-1 heads, the mean rank."""
    lazy, ratio = indices(one.get("lazy_layers")), finite(one, "rank1_head_ratio")
    named = f"{len(lazy)}: {short(index_ranges(lazy))}" if lazy else "none"
    shown = named if "lazy_layers" in one else NONE
    return [shown, NONE if ratio is None else percent(ratio), nats(finite(one, "mean_rank"), 1)]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _swept(look: Look, found: Sequence[Mapping[str, Any]], key: str, column: str, name: str) -> LayerChart | None:
    """Return a line for each value of a setting, the larger the stronger; None where nothing was swept."""
    if not found:
        return None
    shown = list(found[:_MAX_LINES])
    lines = [
        Line(
            f"{key.replace('seq_len', 'tokens')} {_number(finite(one, key))}",
            numbers(one.get(column))[: len(look.layers)],
            strength=(k + 1.0) / len(shown),
        )
        for k, one in enumerate(shown)
    ]
    return LayerChart(lines, look.labels, name, marked=(look.lazy, "lazy layer"))


def _lengths(look: Look) -> Content:
    found = rows(look.record, "lengths")
    if len(found) < 2:
        return None
    pictures = [
        small_figure(title, chart_of(f"length-{key}", title, chart, half=True))
        for title, key, chart in (
            ("MaxRank by length", "rank", _swept(look, found, "seq_len", "max_rank", "MaxRank")),
            ("Mean mass by length", "mass", _swept(look, found, "seq_len", "mean_mass", "mean m*")),
        )
        if chart is not None
    ]
    body = [[_length(one), *_counted(one)] for one in found]
    header = ("tokens", "lazy layers", "rank-1 heads", "mean rank")
    note = (
        "The first tokens of the same sequences; attention is causal, so this is what the model does on shorter text."
    )
    return [
        tag("h3", "Does it depend on the length?", class_="sub"),
        tag("p", note, class_="note"),
        tag("div", pictures, class_="columns"),
        table("lengths-table", "By sequence length", header, [RowGroup(None, body)]),
    ]


def _length(one: Mapping[str, Any]) -> str:
    length = integer(one, "seq_len")
    return NONE if length is None else f"{length:,}"


def _more(look: Look, shown: Sequence[object]) -> str:
    stored = look.record.get("domains")
    count = len(stored) if isinstance(stored, list) else 0
    return f"; the first {len(shown)} of {count:,}" if count > len(shown) else ""


def _domains(look: Look) -> Content:
    found = rows(look.record, "domains")
    if not found:
        return None
    names = [short(text(one, "name") or "no name")[:24] for one in found]
    header = ("domain", "sequences", "lazy layers", "rank-1 heads", "mean rank")
    body = [
        [name_of(text(one, "name") or "no name", 40), exact(integer(one, "num_sequences")), *_counted(one)]
        for one in found
    ]
    values = [numbers(one.get("max_rank"))[: len(look.layers)] for one in found]
    highest = max((value for row in values for value in known(row)), default=2.0)
    data = HeatMap(
        values,
        names,
        look.labels,
        ("domain", "layer", "MaxRank"),
        Tone(1.0, max(highest, 2.0), logarithmic=True),
        few_digits,
        left=LEFT,
        widest=WIDEST,
    )
    title = f"MaxRank by domain, sequences of {look.seq_len}"
    return [
        tag("h3", "Does it depend on the text?", class_="sub"),
        figure(title, map_of("domain-map", title, data)) if len(found) > 1 else None,
        table(
            "domains-table",
            f"By domain, sequences of {look.seq_len}{_more(look, found)}",
            header,
            [RowGroup(None, body)],
        ),
    ]
