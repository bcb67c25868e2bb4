"""A line chart: axes with round ticks, a legend, labels at the ends of the lines, dashed reference lines.

A point that is not finite breaks its line, so that a loss that diverged is seen as a gap and not as a wrong stroke.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from scionlm.report.axes import Scale, drawable, nice_ticks, spread, text_width, tick_labels
from scionlm.report.html import Content, Markup, tag
from scionlm.report.svg import LABEL, SMALL, Caption, drawing, halo, label, line, responsive

# With more points than this a marker on each would be a caterpillar.
_MAX_MARKERS = 40


@dataclass(frozen=True)
class Series:
    """A line; `tone` is its color class, `thin` draws it faintly behind the others, `end` is the label at its end.

    One that is not `listed` has no entry in the legend: another of the same color stands for it. One that is not
    `marked` has no marker on its points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    tone: str
    thin: bool = False
    end: str | None = None
    listed: bool = True
    marked: bool = True


@dataclass(frozen=True)
class Reference:
    """A value to compare with, as a dashed line across the chart."""

    name: str
    value: float
    tone: str
    end: str | None = None


@dataclass(frozen=True)
class Callout:
    """A point of a line that has a ring around it and words beside it."""

    x: float
    y: float
    tone: str
    words: str


@dataclass(frozen=True)
class Chart:
    """What is drawn: series, references, the names of the axes, and the range of y where charts must agree on it.

    `events` are places on the x axis that a thin upright line marks. `stretches` are parts of it, each from where it
    begins to the next one; their names stand at the top where there is room. `x_marks` are places and words for the
    ticks of the x axis in the place of round numbers, as many as have room: so x may be any function of what it is.
    """

    series: Sequence[Series]
    references: Sequence[Reference] = ()
    x_label: str = ""
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    legend: bool = field(default=True)
    events: Sequence[float] = ()
    stretches: Sequence[tuple[float, str]] = ()
    x_marks: Sequence[tuple[float, str]] = ()
    callouts: Sequence[Callout] = ()


@dataclass(frozen=True)
class _Frame:
    """The plot area in pixels with its scales and ticks."""

    x: Scale
    y: Scale
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[float]


def value_range(series: Sequence[Series], references: Sequence[Reference] = ()) -> tuple[float, float] | None:
    """Return the least and the greatest value that would be drawn, or None where there is nothing to draw."""
    values = [y for one in series for x, y in one.points if drawable(x) and drawable(y)]
    values += [reference.value for reference in references if drawable(reference.value)]
    return (min(values), max(values)) if values else None


def responsive_chart(
    caption: Caption, chart: Chart, heights: tuple[int, int] = (300, 260), narrow: Chart | None = None
) -> Markup:
    """Return a line chart for wide and for narrow windows, of these heights; `narrow` takes its place in the latter."""

    def draw(named: Caption, width: int) -> Markup:
        if width > 600:
            return line_chart(named, width, heights[0], chart)
        return line_chart(named, width, heights[1], narrow or chart)

    return responsive(caption, draw)


def bare_ends(chart: Chart) -> Chart:
    """Return a chart with values alone at the ends of its lines: on a phone labels would take a third of the width."""
    series = [replace(one, end=one.end and one.end.rpartition(" ")[2]) for one in chart.series]
    references = [replace(one, end=one.end and one.end.rpartition(" ")[2]) for one in chart.references]
    return replace(chart, series=series, references=references)


def line_chart(caption: Caption, width: int, height: int, chart: Chart) -> Markup:
    """Return the chart as an svg of that size; without a single point to draw, one that says so."""
    span = chart.y_range or value_range(chart.series, chart.references)
    if span is None:
        return drawing(caption, width, 60, label(width / 2, 35, "no loss was recorded", "label", "middle"))
    legend, top = _legend(chart, width) if chart.legend else (None, 6.0)
    room = (24 if chart.y_label else 8) + (6 if chart.callouts or chart.stretches else 0)
    frame = _frame(chart, span, width, height, top + room)
    references = [_reference(reference, frame) for reference in chart.references if drawable(reference.value)]
    thin = [_curve(one, frame) for one in chart.series if one.thin]
    main = [_curve(one, frame) for one in chart.series if not one.thin]
    names = _axis_names(chart, frame, top)
    under = [_axes(frame), _events(chart, frame), references]
    over = [_ends(chart, frame), [_callout(one, frame) for one in chart.callouts]]
    return drawing(caption, width, height, legend, names, under, thin, main, over)


def _frame(chart: Chart, span: tuple[float, float], width: int, height: int, top: float) -> _Frame:
    xs = [x for one in chart.series for x, y in one.points if drawable(x)] or [0.0]
    left_end, right_end = min(xs), max(xs)
    if right_end <= left_end:
        right_end = left_end + 1
    bottom = height - (44 if chart.x_label else 24)
    y_ticks = nice_ticks(*span, intervals=8 if height > 280 else 5)
    left = max(text_width(text, SMALL) for text in tick_labels(y_ticks)) + 10
    ends = [one.end for one in (*chart.series, *chart.references) if one.end]
    right = max((text_width(text, LABEL) for text in ends), default=0) + 14
    x = Scale(left_end, right_end, left, max(width - right, left + 60))
    return _Frame(
        x=x,
        y=Scale(y_ticks[0], y_ticks[-1], bottom, top),
        x_ticks=_with_room(chart.x_marks, x) if chart.x_marks else _round_ticks(x, 6 if width > 600 else 3),
        y_ticks=y_ticks,
    )


def _round_ticks(x: Scale, intervals: int) -> Sequence[tuple[float, str]]:
    ticks = [tick for tick in nice_ticks(x.low, x.high, intervals) if x.low <= tick <= x.high]
    ticks = ticks if len(ticks) > 1 else [x.low, x.high]
    return list(zip(ticks, tick_labels(ticks), strict=True))


def _with_room(marks: Sequence[tuple[float, str]], x: Scale) -> Sequence[tuple[float, str]]:
    """Return every mark, or every other, or every third, ..., so that their words keep apart."""
    inside = [mark for mark in marks if x.low <= mark[0] <= x.high]
    for stride in range(1, len(inside)):
        chosen = inside[::stride]
        gaps = [
            x(right[0]) - x(left[0]) - (text_width(left[1], SMALL) + text_width(right[1], SMALL)) / 2
            for left, right in pairwise(chosen)
        ]
        if min(gaps) >= 8:
            return chosen
    return inside[:1]


def _axes(frame: _Frame) -> Content:
    grid = [line(frame.x.start, frame.y(tick), frame.x.end, frame.y(tick), "grid") for tick in frame.y_ticks[1:]]
    base = line(frame.x.start, frame.y.start, frame.x.end, frame.y.start, "axis")
    y_labels = [
        label(frame.x.start - 8, frame.y(tick) + 4, text, "small", "end")
        for tick, text in zip(frame.y_ticks, tick_labels(frame.y_ticks), strict=True)
    ]
    x_labels = [label(frame.x(tick), frame.y.start + 18, text, "small", "middle") for tick, text in frame.x_ticks]
    return [grid, base, y_labels, x_labels]


def _events(chart: Chart, frame: _Frame) -> Content:
    starts = [at for at, _ in chart.stretches]
    places = [frame.x(at) for at in (*chart.events, *starts) if frame.x.low < at < frame.x.high]
    names: list[Content] = []
    for (at, name), end in zip(chart.stretches, (*starts[1:], frame.x.high), strict=False):
        left, right = frame.x(max(at, frame.x.low)), frame.x(min(end, frame.x.high))
        if right - left > text_width(name, SMALL) + 10:
            names.append(label(left + 3, frame.y.end - 4, name, "small"))
    return [[line(x, frame.y.start, x, frame.y.end, "axis") for x in places], names]


def _axis_names(chart: Chart, frame: _Frame, top: float) -> Content:
    x_name = label((frame.x.start + frame.x.end) / 2, frame.y.start + 38, chart.x_label, "small", "middle")
    y_name = label(0, top + 8, chart.y_label, "small")
    return [x_name if chart.x_label else None, y_name if chart.y_label else None]


def _curve(series: Series, frame: _Frame) -> Content:
    path, pen_down = [], False
    for x, y in series.points:
        if drawable(x) and drawable(y):
            path.append(f"{'L' if pen_down else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen_down = drawable(x) and drawable(y)
    stroke = tag("path", d="".join(path), class_=f"line {series.tone}{' thin' if series.thin else ''}")
    places = [(frame.x(x), frame.y(y)) for x, y in series.points if drawable(x) and drawable(y)]
    if series.thin or not series.marked or len(places) > _MAX_MARKERS:
        return stroke
    return [stroke, [_marker(x, y, series.tone, 3.4) for x, y in places]]


def _marker(x: float, y: float, tone: str, radius: float) -> Markup:
    """Child and control, new and old text differ in shape too, for those to whom the colors look alike."""
    if tone.startswith(("control", "upstream")):
        return tag("rect", x=x - radius, y=y - radius, width=2 * radius, height=2 * radius, class_=f"marker {tone}")
    return tag("circle", cx=x, cy=y, r=radius, class_=f"marker {tone}")


def _callout(callout: Callout, frame: _Frame) -> Content:
    if not (drawable(callout.x) and drawable(callout.y)):
        return None
    x, y = frame.x(callout.x), frame.y(callout.y)
    fits = x + 10 + text_width(callout.words, SMALL) <= frame.x.end
    # Beside a peak and a little above it there is no line.
    at, anchor = (x + 10, "start") if fits else (x - 10, "end")
    words = halo(at, y - 5, callout.words, f"small {callout.tone}", anchor)
    return [tag("circle", cx=x, cy=y, r=6.5, class_=f"ring {callout.tone}"), words]


def _reference(reference: Reference, frame: _Frame) -> Markup:
    y = frame.y(reference.value)
    return line(frame.x.start, y, frame.x.end, y, f"reference {reference.tone}")


def _ends(chart: Chart, frame: _Frame) -> Content:
    """Labels beside the ends of the lines, moved apart where the lines end close together."""
    ends = [(one.end, one.tone, _last(one)) for one in chart.series if one.end]
    ends += [(one.end, one.tone, one.value) for one in chart.references if one.end]
    ends = [(text, tone, value) for text, tone, value in ends if drawable(value)]
    places = spread([frame.y(value) for _, _, value in ends], [LABEL + 2.0] * len(ends), frame.y.end, frame.y.start)
    return [
        label(frame.x.end + 9, y + 5, text, f"label end {tone}")
        for (text, tone, _), y in zip(ends, places, strict=True)
    ]


def _last(series: Series) -> float:
    return next((y for x, y in reversed(series.points) if drawable(x) and drawable(y)), math.nan)


def _legend(chart: Chart, width: int) -> tuple[Content, float]:
    """The legend and the height it takes: entries in a row, in more rows where the width asks for it."""
    entries, x, y = [], 0.0, 14.0
    for one in (*(each for each in chart.series if each.listed), *chart.references):
        if x and x + 30 + text_width(one.name, SMALL) > width:
            x, y = 0.0, y + 20
        dashed = isinstance(one, Reference)
        style = "reference" if dashed else "line thin" if one.thin else "line"
        entries += [line(x, y - 4, x + 22, y - 4, f"{style} {one.tone}"), label(x + 28, y, one.name, "small")]
        if isinstance(one, Series) and one.marked and not one.thin:
            entries.append(_marker(x + 11, y - 4, one.tone, 3.4))
        x += 28 + text_width(one.name, SMALL) + 18
    return entries, y + 12
