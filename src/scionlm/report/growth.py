"""Rounds of growth: what each child had and cost, how far it was from the reference, and where its layers came from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scionlm.report.collect import Run
from scionlm.report.html import Content, Markup, RowGroup, card, join, name_of, section, table, tag
from scionlm.report.linechart import Chart, Reference, Series, responsive_chart
from scionlm.report.svg import MAX_LAYERS, Caption, box, drawing, label, responsive
from scionlm.report.values import mapping, number, text
from scionlm.report.wording import NONE, count, duration, exact, nats, scientific

_MAX_ROUNDS = 60
_Record = Mapping[str, Any]


def growth_section(run: Run) -> Markup | None:
    """Return the rounds of a run that grows; None for one that does not."""
    rounds = _rounds(run.growth)
    reference = mapping(run.growth.get("reference"))
    if not run.growth or not mapping(run.config.get("grow")):
        return None
    body = join(_words(run, reference), _figure(rounds, reference), _origins(rounds), _table(run, rounds))
    return section("growth", "Growth, round by round", body)


def _rounds(growth: _Record) -> list[_Record]:
    found = growth.get("rounds")
    return [mapping(one) for one in found][:_MAX_ROUNDS] if isinstance(found, list) else []


def _words(run: Run, reference: _Record) -> Markup:
    grow, why = mapping(run.config.get("grow")), text(run.growth, "why")
    windows, sizes = number(reference, "num_sequences"), mapping(reference.get("num_tokens"))
    tokens = sum(value for value in sizes.values() if isinstance(value, int))
    begins = {
        "source": "Each round begins anew with layers of the source.",
        "student": "Each round goes on with the trained child and adds layers.",
    }.get(text(grow, "from") or "", "")
    chosen = number(run.growth, "result_round")
    if text(run.growth, "outcome") == "running":
        why = f"next: {why}" if why else why
    said = [tag("bdi", f"{why[:1].upper()}{why[1:]}. ") if why else "", f"{begins} "]
    if chosen is not None and math.isfinite(chosen):
        said.append(f"The result is the child of round {chosen:.0f}. ")
    decided = f"What decides is the loss on {exact(tokens)} held-out tokens" if tokens else ""
    if decided and windows is not None:
        decided += f" in {exact(windows)} windows, each set against the same window of the reference."
    return join(tag("p", *said), tag("p", decided, class_="note") if decided else None)


def _figure(rounds: Sequence[_Record], reference: _Record) -> Markup | None:
    """The held-out loss by the number of layers, with the reference as a line."""
    points = [(layers, nll) for one in rounds if (layers := number(one, "layers")) and (nll := number(one, "nll"))]
    target = number(reference, "nll")
    if len(points) < 2 or target is None:
        return None
    series = [Series("child of each round", points, "child", end=nats(points[-1][1]))]
    references = [Reference("reference", target, "source", f"reference {nats(target)}")]
    chart = Chart(series, references, "layers", "nats per token, lower is better")
    described = "; ".join(f"{x:.0f} layers: {nats(y, 3)}" for x, y in points)
    caption = Caption("growth-loss", "Held-out loss by round", f"{described}; the reference: {nats(target, 3)}.")
    return card(responsive_chart(caption, chart))


def _table(run: Run, rounds: Sequence[_Record]) -> Markup | None:
    if not rounds:
        return None
    reference = mapping(run.growth.get("reference"))
    rows: list[tuple[Content, ...]] = [
        (
            tag("b", "reference", class_="source"),
            exact(number(reference, "layers")),
            nats(number(reference, "nll"), 4),
            "",
            *_costs(reference),
        )
    ]
    rows += [
        (
            f"round {exact(number(one, 'round'))}",
            exact(number(one, "layers")),
            nats(number(one, "nll"), 4),
            _interval(mapping(one.get("difference"))),
            *_costs(one),
        )
        for one in rounds
    ]
    rows.append(("all rounds", "", "", "", *_costs(mapping(run.growth.get("total")))))
    name = text(reference, "name")
    confidence = number(mapping(rounds[0].get("difference")), "confidence")
    sure = f", with its {confidence * 100:.0f}% interval" if confidence is not None else ""
    title = ["Rounds beside ", name_of(name), sure] if name else ["Rounds beside the reference", sure]
    header = ("", "layers", "nats per token", "less the reference's", "tokens", "operations", "time")
    return table("growth-table", title, header, [RowGroup(None, rows)])


def _interval(difference: _Record) -> str:
    mean, low, high = (number(difference, key) for key in ("mean", "low", "high"))
    if mean is None:
        return NONE
    return f"{mean:+.4f}" + ("" if low is None or high is None else f" ({low:+.4f} to {high:+.4f})")


def _costs(record: _Record) -> tuple[str, str, str]:
    flops = number(record, "flops")
    return (
        count(number(record, "tokens")),
        NONE if flops is None or not math.isfinite(flops) else scientific(flops),
        duration(number(record, "seconds")) or NONE,
    )


def _origins(rounds: Sequence[_Record]) -> Markup | None:
    """A row of cells for each round: layers that were trained before, new ones of the source, fresh ones."""
    drawn: list[tuple[str, list[tuple[str, str]]]] = []
    for one in rounds:
        layers = one.get("origins")
        cells = [_cell(mapping(layer)) for layer in layers] if isinstance(layers, list) else []
        if 0 < len(cells) <= MAX_LAYERS:
            drawn.append((f"round {exact(number(one, 'round'))}", cells))
    if not drawn:
        return None
    words = "; ".join(f"{name}: {', '.join(what for what, _ in cells)}" for name, cells in drawn)
    caption = Caption("growth-layers", "Where the layers of each round come from", f"{words[:4000]}.")
    picture = responsive(caption, lambda named, width: _draw(named, width, drawn))
    note = (
        "Number: the layer of the source that it was. In the color of the child: taken from the source for this round; "
        "of the source: trained in the round before already. Without a number: fresh."
    )
    return card(picture, note)


def _cell(layer: _Record) -> tuple[str, str]:
    """Return what a layer is, and how its cell is filled."""
    origin, trained = number(layer, "source_layer"), number(layer, "student_layer")
    name = f"{origin:.0f}" if origin is not None and math.isfinite(origin) else "fresh"
    if trained is not None:
        return name, "fill source"
    return name, "cell kept" if text(layer, "init") == "source" else "cell"


def _draw(caption: Caption, width: int, rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Markup:
    left, gap, height = 64.0, 3.0, 24.0
    most = max(len(cells) for _, cells in rows)
    size = min((width - left) / most - gap, 40.0)
    pieces: list[Content] = []
    for row, (name, cells) in enumerate(rows):
        y = 4 + row * (height + 8)
        pieces.append(label(0, y + 16, name, "small"))
        for place, (what, style) in enumerate(cells):
            x = left + place * (size + gap)
            pieces.append(box(x, y, size, height, style, 3))
            if size >= 20 and what != "fresh":
                pieces.append(label(x + size / 2, y + 16, what, "cell-number", "middle"))
    return drawing(caption, width, 8 + len(rows) * (height + 8), pieces)
