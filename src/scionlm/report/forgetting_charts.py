"""The course of what a continued model forgets and learns: over all tokens, and over the first steps of each stage.

Most of what is forgotten on the way comes within a few steps of a change of text or learning rate and goes again (the
stability gap), so those steps have an axis of doublings of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from scionlm.report.collect import Run
from scionlm.report.curves import Point, mean_over, thinned
from scionlm.report.forgetting_read import Forgetting, Side, Stretch, stretches_of
from scionlm.report.html import Markup, card, clip, join, name_of, tag
from scionlm.report.linechart import (
    Callout,
    Chart,
    Reference,
    Series,
    bare_ends,
    line_chart,
    responsive_chart,
    value_range,
)
from scionlm.report.svg import Caption
from scionlm.report.wording import nats

_POINTS, _MAX_STAGES = 160, 8
_NAME = 18
# Of a stage that was measured after fewer steps there is no beginning to enlarge.
_FEW = 3

# Both sides: their names, as the style sheet calls their colors, and in words.
_TONES = {"upstream": "upstream", "downstream": "child"}


def _sides(forgetting: Forgetting) -> list[tuple[str, Side]]:
    sides = (("upstream", forgetting.upstream), ("downstream", forgetting.downstream))
    return [(name, side) for name, side in sides if side is not None]


def _kept(points: Sequence[Point]) -> list[Point]:
    """Return few enough points to draw, the highest among them."""
    finite = [point for point in points if math.isfinite(point.nll)]
    highest = max(finite, key=lambda point: point.nll, default=None)
    chosen = {point.step: point for point in thinned(points, _POINTS)}
    if highest is not None:
        chosen[highest.step] = highest
    return [chosen[step] for step in sorted(chosen)]


def course_figure(run: Run, forgetting: Forgetting) -> Markup | None:
    """Return the mean losses of both sides over tokens; None where none were measured on the way."""
    lines = [(name, side, _kept(mean_over(run.child.curves, side.domains))) for name, side in _sides(forgetting)]
    lines = [(name, side, points) for name, side, points in lines if points]
    if not lines:
        return None
    series = [
        Series(name, [(p.tokens, p.nll) for p in points], _TONES[name], end=f"{name} {nats(_last(points))}")
        for name, _, points in lines
    ]
    chart = Chart(
        series,
        _references(forgetting),
        "tokens trained on",
        "nats per token, lower is better",
        stretches=[(one.tokens, clip(one.name, _NAME)) for one in stretches_of(run) if one.name],
        callouts=_peaks(forgetting, lambda peak: peak.tokens),
    )
    caption = Caption("course", "Held-out loss of old and new text over tokens", _described(chart))
    picture = responsive_chart(caption, chart, (380, 330), bare_ends(chart))
    note = "Held-out loss as the plain mean over domains. Dashed: before training."
    note += " Ring: where the old text was worst." if chart.callouts else ""
    note += " Upright lines: a stage begins." if len(chart.stretches) > 1 else ""
    return card(picture, note)


def _last(points: Sequence[Point]) -> float:
    return next((point.nll for point in reversed(points) if math.isfinite(point.nll)), math.nan)


def _references(forgetting: Forgetting) -> list[Reference]:
    return [
        Reference(f"{name} before", side.before, _TONES[name], f"before {nats(side.before)}")
        for name, side in _sides(forgetting)
        if side.before is not None
    ]


def _peaks(forgetting: Forgetting, place: Callable[[Point], float]) -> list[Callout]:
    """Return the highest loss on old text as a ring, where it is above both ends."""
    side = forgetting.upstream
    if side is None or side.peak is None or side.peak.nll <= max(side.before or 0.0, side.after or 0.0) + 5e-4:
        return []
    return [Callout(place(side.peak), side.peak.nll, "upstream", f"peak {nats(side.peak.nll)}")]


def _described(chart: Chart) -> str:
    lines = [
        f"{one.name} from {nats(one.points[0][1])} to {nats(one.points[-1][1])}" for one in chart.series if one.points
    ]
    lines += [f"{one.name} {nats(one.value)}" for one in chart.references]
    lines += [one.words for one in chart.callouts]
    return f"Lines: {'; '.join(lines)} nats."


def first_steps(run: Run, forgetting: Forgetting) -> Markup | None:
    """Return the same over the steps of each stage, on an axis of doublings; None where too little was measured."""
    found = [(stretch, _stage_chart(run, forgetting, stretch)) for stretch in stretches_of(run)[:_MAX_STAGES]]
    charts = [(stretch, chart) for stretch, chart in found if chart is not None]
    if not charts:
        return None
    note = "From tick to tick twice as many steps, so that the first ones can be told apart."
    if len(charts) == 1:
        chart = charts[0][1]
        caption = Caption("first-steps", "Held-out loss over the steps, in doublings", _described(chart))
        return card(responsive_chart(caption, chart, (320, 290), bare_ends(chart)), note, "The first steps, enlarged")
    spans = [span for _, chart in charts if (span := value_range(chart.series, chart.references)) is not None]
    span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
    figures = [
        tag(
            "figure",
            tag("h3", name_of(stretch.name, 40)),
            line_chart(
                Caption(f"first-steps-{k}", "Held-out loss over the steps of a stage, in doublings", _described(chart)),
                270,
                200,
                replace(bare_ends(chart), y_range=span, y_label="", legend=False),
            ),
            class_="card",
        )
        for k, (stretch, chart) in enumerate(charts)
    ]
    title = tag("h3", "The first steps of each stage, enlarged", class_="sub")
    more = " All on the same scale of nats; blue is the old text, green the new."
    return join(title, tag("p", note + more, class_="note"), tag("div", figures, class_="multiples"))


def _stage_chart(run: Run, forgetting: Forgetting, stretch: Stretch) -> Chart | None:
    """Return the losses of a stage by the doublings of its steps."""
    series: list[Series] = []
    last = 0
    for name, side in _sides(forgetting):
        points = [
            point
            for point in _kept(mean_over(run.child.curves, side.domains))
            if stretch.step <= point.step <= (math.inf if stretch.end is None else stretch.end)
        ]
        if len(points) <= _FEW:
            continue
        last = max(last, points[-1].step - stretch.step)
        line = [(_doublings(point.step - stretch.step), point.nll) for point in points]
        series.append(Series(name, line, _TONES[name], end=f"{name} {nats(_last(points))}"))
    if not series:
        return None

    peak = forgetting.upstream.peak if forgetting.upstream else None
    is_here = peak is not None and stretch.step < peak.step <= (math.inf if stretch.end is None else stretch.end)
    return Chart(
        series,
        _references(forgetting),
        "steps since it began",
        "nats per token, lower is better",
        x_marks=[(-1.0, "0"), *((float(k), f"{2**k:,}") for k in range(last.bit_length()))],
        callouts=_peaks(forgetting, lambda peak: _doublings(peak.step - stretch.step)) if is_here else [],
    )


def _doublings(steps: int) -> float:
    """Return the place of a step on the axis; 0 stands one doubling before 1."""
    return math.log2(steps) if steps > 0 else -1.0
