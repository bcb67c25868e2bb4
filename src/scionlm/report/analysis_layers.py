"""What each layer is worth: what the loss says, what it does to the residual stream, and how alike layers are."""

from functools import partial

from scionlm.report.analysis_attention import chart_of, map_of
from scionlm.report.analysis_chart import LayerChart, Line
from scionlm.report.analysis_read import (
    Look,
    figure,
    finite,
    indices,
    known,
    matrix,
    numbers,
    of,
    rows,
    short,
    small_figure,
)
from scionlm.report.heatmap import HeatMap, Tone
from scionlm.report.html import Content, Markup, RowGroup, clip, section, table, tag
from scionlm.report.values import integer, mapping, text
from scionlm.report.wording import NONE, nats, quantity

NAMES = {
    "removal": "removal",
    "taylor": "Taylor",
    "block_influence": "block influence",
    "angular_distance": "angular distance",
    "update_norm": "update norm",
    "cka_distance": "CKA distance",
    "lens": "lens gain",
    "weight_norm": "weight norm",
    "max_rank": "MaxRank",
    "mean_mass": "mean mass",
}

_SMALL = (
    ("block_influence", "Block influence", "1 \u2212 cosine of what goes in and what comes out"),
    ("angular_distance", "Angular distance", "turn of the last token, an angle over \u03c0"),
    ("taylor", "Taylor", "the loss without the layer, to first order (nats)"),
    ("cka_distance", "CKA distance", "1 \u2212 CKA of the hidden states before and after"),
    ("update_norm", "Update norm", "what the layer adds, over what it reads"),
    ("output_norm", "Norm of what comes out", "L2, mean over tokens"),
    ("weight_norm", "Norm of the weights", "L2"),
)

MAX_CRITERIA = 24


def worth_section(look: Look) -> Markup:
    """Return the section on what each layer is worth."""
    return section(
        "worth",
        "What each layer is worth",
        _removal(look),
        _lens(look),
        tag("div", [_small(look, *one) for one in _SMALL], _gradients(look), class_="columns"),
        _alike(look),
        _greedy(look),
        _criteria_table(look),
    )


def _removal(look: Look) -> Content:
    values = look.column("removal")
    if not known(values):
        return None
    n = integer(look.record, "loss_sequences")
    chart = LayerChart(
        [Line("removal", values, error=look.column("removal_error"))],
        look.labels,
        "loss without it, less that with it (nats)",
        bars=True,
        marked=(look.lazy, "lazy layer"),
        error="\u00b1 standard error",
        cut=True,
    )
    loss = finite(look.overall, "nll")
    whole = f" With all layers it is {nats(loss)} nats." if loss is not None else ""
    on = f", on {of(n, 'sequence')}" if n else ""
    note = (
        f"One layer at a time passes on what it reads, without training{on}."
        f"{whole} Errors are of the difference on the same sequences. What one layer costs says little of what several "
        "cost together."
    )
    title = "Loss without each layer"
    return figure(title, chart_of("removal", title, chart), note)


def _lens(look: Look) -> Content:
    found = rows(look.record, "lens", len(look.layers) + 1)
    values = [finite(one, "nll") for one in found]
    if len(known(values)) < 2:
        return None
    chart = LayerChart(
        [Line("lens", values, "source", error=[finite(one, "error") for one in found])],
        ["embed", *look.labels][: len(found)],
        "loss (nats)",
        "after layer",
        first=1,
        error="\u00b1 standard error",
        cut=True,
    )
    title = "Loss if the model ended there (logit lens)"
    note = (
        "Final norm and head read what comes out of each layer; the first value is of the embedding. They were trained "
        "for the last layer only, so a high loss early on does not say that nothing is known there."
    )
    return figure(title, chart_of("lens", title, chart), note)


def _small(look: Look, key: str, title: str, what: str) -> Content:
    values = look.column(key)
    if not known(values):
        return None
    chart = LayerChart([Line(title, values, "source")], look.labels, what, bars=True, cut=True)
    return small_figure(title, chart_of(f"small-{key}", f"{title} of each layer", chart, half=True))


def _gradients(look: Look) -> Content:
    pairs = (("queries", "query_gradient", "child"), ("keys", "key_gradient", "control"))
    lines = [Line(name, look.column(key), tone) for name, key, tone in pairs if known(look.column(key))]
    if not lines:
        return None
    chart = LayerChart(lines, look.labels, "L2 norm of the gradient of the loss", cut=True)
    title = "Gradient of query and key weights"
    return small_figure(title, chart_of("gradients", title, chart, half=True))


def _alike(look: Look) -> Content:
    """Similarity and angular distance of the hidden states between all layers, the embedding first."""
    maps = (
        ("similarity", "CKA similarity", "of hidden states", Tone(0.0, 1.0)),
        ("angular", "Angular distance", "of the last token", None),
    )
    drawn: list[Content] = []
    for key, title, what, tone in maps:
        values = matrix(look.record.get(key))
        found = known([value for row in values for value in row])
        if not found:
            continue
        names = ["0", *(str(k + 1) for k in range(len(values) - 1))]
        data = HeatMap(
            values,
            names,
            names,
            ("after", "layers done", title),
            tone or Tone(0.0, max(*found, 1e-9)),
            partial(nats, digits=3),
            square=True,
        )
        whole = f"{title} {what}"
        drawn.append(small_figure(whole, map_of(f"alike-{key}", whole, data, half=True)))
    if not drawn:
        return None
    note = (
        "Each place is behind so many layers: 0 is the embedding, 1 behind layer 0, and so on. A block of high "
        "similarity, or of small distance, is a run of layers that change little. CKA is dominated by the few "
        "directions of the largest variance."
    )
    return [
        tag("h3", "How alike the states behind the layers are", class_="sub"),
        tag("div", drawn, class_="columns"),
        tag("p", note, class_="note"),
    ]


def _greedy(look: Look) -> Content:
    record = mapping(look.record.get("greedy"))
    order, losses = indices(record.get("order")), numbers(record.get("nll"))
    steps = min(len(order), len(losses))
    if not steps:
        return None
    loss = finite(look.overall, "nll")
    values, labels = [loss, *losses[:steps]], ["0", *(str(k + 1) for k in range(steps))]
    chart = LayerChart([Line("loss", values)], labels, "loss (nats)", "layers taken out")
    title = "Loss as layers are taken out one after another"
    named = ", ".join(f"{k} ({nats(value)})" for k, value in zip(order, losses, strict=False))
    note = (
        "Each time the layer goes whose removal costs least, without training. It is chosen and measured on the same "
        f"sequences, so on other text the loss may be higher. In order, with the loss after each: {clip(named, 1200)}."
    )
    return figure(title, chart_of("greedy", title, chart), note)


def criteria(look: Look) -> list[tuple[str, list[float | None]]]:
    """Return the name of each criterion as people say it, and what it gives each layer."""
    return [
        (NAMES.get(name := text(one, "name") or "no name", short(name)), numbers(one.get("scores"))[: len(look.layers)])
        for one in rows(look.record, "criteria", MAX_CRITERIA)
    ]


def _criteria_table(look: Look) -> Content:
    found = criteria(look)
    if not found:
        return None
    header = ("layer", *(name for name, _ in found))
    lazy = set(look.lazy)
    body: list[list[Content]] = [
        [
            [str(k), tag("span", " lazy", class_="soft") if k in lazy else None],
            *(_cell(scores, k) for _, scores in found),
        ]
        for k in range(len(look.layers))
    ]
    inside = table("criteria-table", "The higher, the more a layer is worth by it", header, [RowGroup(None, body)])
    what = [tag("li", tag("b", name), ": ", clip(said, 200)) for name, said in _meanings(look)]
    about = tag("ul", what, class_="note") if what else None
    return tag("details", tag("summary", "All criteria, layer by layer"), inside, about)


def _cell(scores: list[float | None], k: int) -> str:
    value = scores[k] if k < len(scores) else None
    return NONE if value is None else quantity(value)


def _meanings(look: Look) -> list[tuple[str, str]]:
    found = rows(look.record, "criteria", MAX_CRITERIA)
    pairs = [(text(one, "name"), text(one, "what")) for one in found]
    return [(NAMES.get(name, short(name)), what) for name, what in pairs if name and what]
