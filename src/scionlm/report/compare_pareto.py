"""Quality against cost: the final loss of every model over its size or slowness, and those that none betters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scionlm.report.axes import Scale, nice_ticks, text_width, tick_labels
from scionlm.report.compare_join import Comparison
from scionlm.report.findings import mean_of
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.placing import Box, Spot, place_labels
from scionlm.report.svg import LABEL, SMALL, Caption, drawing, halo, label, line, responsive
from scionlm.report.values import number
from scionlm.report.wording import count, nats, quantity

_NAME = 24
_RADIUS = 5.0
_MOST = 40
_APART = 1.02  # sizes nearer to each other than this are one size
_FAR = 4.0  # what is further away than so many times the range of all others would press these together


@dataclass(frozen=True)
class Sized:
    """A model: what it costs, how good it is, and the style of its mark."""

    name: str
    cost: float
    loss: float
    tone: str


def sized(comparison: Comparison, by_time: bool = False) -> list[Sized]:
    """Return the groups, controls and sources whose cost and loss are known, the lowest loss first.

    The cost is the number of parameters, or the milliseconds that a written token takes.
    Controls that lie far above everything else are left out: they would press the rest together.
    """
    times = _milliseconds(comparison)
    of_sources = _milliseconds(comparison, sources=True)
    given = {str(group.first.folder) for group in comparison.groups if group.first.kind == "model"}
    found: list[Sized] = []
    for group in comparison.groups:
        cost = times.get(group.first.name) if by_time else group.first.num_parameters
        found.append(Sized(group.name, cost or 0.0, group.mean, "control" if group.first.is_control else "child"))
    for base in comparison.sources:
        if base.name in given:
            continue  # as a model, too
        cost, mean = (
            of_sources.get(base.name) if by_time else base.num_parameters,
            mean_of(base.losses, comparison.domains),
        )
        found += [Sized(f"source {base.name}", cost or 0.0, mean, "source")] if mean is not None else []
    found = sorted((one for one in found if one.cost and math.isfinite(one.loss)), key=lambda one: one.loss)
    runs = [one.loss for one in found if one.tone != "control"]
    reach = max(runs) + _FAR * (max(runs) - min(runs)) if runs else math.inf
    return [one for one in found if one.loss <= reach or one.tone != "control"][:_MOST]


def _milliseconds(comparison: Comparison, sources: bool = False) -> dict[str, float]:
    """Return the milliseconds that a written token takes, by the name of the row, as far as that was measured."""
    every = comparison.tasks.models if comparison.tasks is not None else ()
    models = [one for one in every if (one.kind == "source") == sources]
    speeds = {one.name: number(one.inference, "decode_tokens_per_second") for one in models}
    return {name: 1000 / speed for name, speed in speeds.items() if speed}


def pareto(models: Sequence[Sized]) -> list[Sized]:
    """Return the models that no cheaper one, or one of about their cost, betters: from the cheapest on."""

    def bettered(one: Sized) -> bool:
        return any(other.loss < one.loss and other.cost <= _APART * one.cost for other in models)

    return sorted((one for one in models if not bettered(one)), key=lambda one: one.cost)


def pareto_chart(comparison: Comparison, by_time: bool = False) -> Markup | None:
    """Return the drawing; None where there are not two sizes, or times, to compare."""
    models = sized(comparison, by_time)
    costs = [one.cost for one in models]
    if not costs or max(costs) < _APART * min(costs):
        return None
    ident, what, show = ("times", "ms a written token", quantity) if by_time else ("sizes", "parameters", count)
    described = "; ".join(f"{clip(one.name, 40)} {show(one.cost)}, {nats(one.loss, 3)}" for one in models)
    caption = Caption(f"pareto-{ident}", f"Final held-out loss over {what}", f"Points: {described} nats.")
    return responsive(caption, lambda named, width: _draw(named, width, models, what, show))


def _draw(
    caption: Caption, width: int, models: Sequence[Sized], what: str, show: Callable[[float | None], str]
) -> Markup:
    wide = width > 600
    top, bottom = 40.0, 420.0 if wide else 340.0
    losses = [one.loss for one in models]
    y_ticks = nice_ticks(min(losses), max(losses), 6)
    y_texts = tick_labels(y_ticks)
    left = max(text_width(text, SMALL) for text in y_texts) + 10
    margin = 0.06 * (math.log(max(one.cost for one in models)) - math.log(min(one.cost for one in models)))
    ends = [math.log(f(one.cost for one in models)) for f in (min, max)]
    x = Scale(ends[0] - margin, ends[1] + margin, left, width - (58 if wide else 36))
    y = Scale(y_ticks[0], y_ticks[-1], bottom, top)
    x_ticks = _log_ticks(math.exp(x.low), math.exp(x.high), 7 if wide else 3)
    axes: list[Content] = [line(x(math.log(tick)), bottom, x(math.log(tick)), top, "grid") for tick in x_ticks]
    axes += [line(x.start, y(tick), x.end, y(tick), "grid") for tick in y_ticks]
    axes += [label(x(math.log(tick)), bottom + 18, show(tick), "small", "middle") for tick in x_ticks]
    axes += [label(left - 8, y(t) + 4, text, "small", "end") for t, text in zip(y_ticks, y_texts, strict=True)]
    axes += [
        label((x.start + x.end) / 2, bottom + 38, f"{what}, on a logarithmic scale", "small", "middle"),
        label(0, 14, "mean held-out nll in nats, lower is better", "small"),
    ]
    best = pareto(models)
    corners = [(x(math.log(one.cost)), y(one.loss)) for one in best]
    steps = [point for a, b in pairwise(corners) for point in (a, (b[0], a[1]))] + corners[-1:]
    path = "".join(f"{'L' if k else 'M'}{px:.1f} {py:.1f}" for k, (px, py) in enumerate(steps))
    stairs = tag("path", d=path, class_="line child slim") if len(steps) > 1 else None
    spots = [Spot(x(math.log(one.cost)), y(one.loss), _RADIUS, clip(one.name, _NAME)) for one in models]
    soft = [Box(min(a[0], b[0]) - 2, min(a[1], b[1]) - 2, max(a[0], b[0]) + 2, max(a[1], b[1]) + 2)
            for a, b in pairwise(steps)]  # fmt: skip
    # Those on the line are named first; of many the others may find no room.
    order = sorted(range(len(models)), key=lambda k: models[k] not in best)
    size = LABEL if wide else SMALL
    places = place_labels([spots[k] for k in order], size, Box(left, top - 16, float(width), bottom), (), soft)
    style = "label" if wide else "small ink"
    texts = [
        halo(place.x, place.y, spots[k].text, style)
        for k, place in zip(order, places, strict=True)
        if place is not None
    ]
    marks = [
        tag("circle", cx=spot.x, cy=spot.y, r=_RADIUS, class_=f"marker {_style(one, best)}")
        for one, spot in zip(models, spots, strict=True)
    ]
    return drawing(caption, width, bottom + 46, axes, stairs, marks, texts)


def _style(one: Sized, best: Sequence[Sized]) -> str:
    return "child hollow" if one.tone == "child" and one not in best else one.tone


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers in a range, about evenly far apart by their logarithm: `most` of them or fewer."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
        (1, 1.5, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]
