"""Charts over the layers of a model: bars or lines, how far they vary, and columns that stand out.

All of one width place a layer at the same distance from the left, and so do the heat maps of heads, so that a layer is
one column down the page. Few layers can dwarf all others (the first and the last, most often): then the axis ends
where the others do, and the values that leave it are written beside the name of the axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scionlm.report.axes import Scale, drawable, nice_ticks, text_width, tick_labels
from scionlm.report.heatmap import stride
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.svg import SMALL, Caption, box, drawing, label, line
from scionlm.report.wording import quantity

LEFT, WIDEST = 52.0, 104.0

# Markers closer than so many pixels would hide their line; with more of them a page becomes heavy.
_MAX_MARKERS, _MARKED_FROM = 120, 14
# At most so many values leave the axis, and only far ones: this many times the next, and the least of them this many.
_MAX_CUT, _FAR, _STEP = 4, 3.0, 1.6


@dataclass(frozen=True)
class Line:
    """A value a place, missing ones None; `error` is its spread, `strength` how strong the line is drawn.

    `places` are the columns, counted from 0, fractions allowed; without it the values stand in one after another.
    Neighbors are `joined` by a stroke however far they are from each other, or only where they are in adjacent columns.
    """

    name: str
    values: Sequence[float | None]
    tone: str = "child"
    error: Sequence[float | None] = ()
    strength: float = 1.0
    places: Sequence[float] | None = None
    joined: bool = True

    @property
    def points(self) -> list[tuple[float, float, float] | None]:
        """Return (place, value, spread) of each value, None where there is none."""
        places = self.places if self.places is not None else range(len(self.values))
        errors = [*self.error, *[None] * len(self.values)]
        found: list[tuple[float, float, float] | None] = []
        for place, value, error in zip(places, self.values, errors, strict=False):
            known = value is not None and drawable(value)
            found.append((place, value, error if error and drawable(error) else 0.0) if known else None)  # pyright: ignore[reportArgumentType]
        return found


@dataclass(frozen=True)
class LayerChart:
    """What is drawn.

    Attributes:
        lines: Lines, or one of bars.
        labels: Name of each column.
        y_label: What is measured.
        x_label: What the columns are.
        bars: Draw the first line as bars.
        marked: Columns that stand out, and what they are called.
        error: What the spread is called in the legend.
        cut: Let few large values leave the axis.
        first: The column where numbering begins; one before it is named only where there is room.
    """

    lines: Sequence[Line]
    labels: Sequence[str]
    y_label: str
    x_label: str = "layer"
    bars: bool = False
    marked: tuple[Sequence[int], str] = ((), "")
    error: str = ""
    cut: bool = False
    first: int = 0


def layer_chart(caption: Caption, width: int, height: int, chart: LayerChart) -> Markup:
    """Return the chart as an svg of about that size; without a single value, one that says so."""
    values = [point[1] for one in chart.lines for point in one.points if point]
    if not values or not chart.labels:
        return drawing(caption, width, 60, label(width / 2, 35, "nothing was recorded", "label", "middle"))
    highest = ceiling(values) if chart.cut else max(values)
    spreads = [s * d + v for one in chart.lines for p in one.points if p for v, d in [p[1:]] for s in (-1, 1)]
    spreads = [value for value in spreads if drawable(value)]
    low = min(0.0, *values, *([] if min(values) >= 0 else spreads))
    high = highest if highest < max(values) else max(highest, *spreads, 0.0)
    legend, top = _legend(chart, width)
    away = _wrapped(_away(chart, highest), width)
    ticks = nice_ticks(low, high, 6 if height > 200 else 4)
    y = Scale(ticks[0], ticks[-1], top + 24 + height, top + 24)
    pitch = min((width - LEFT - 8) / len(chart.labels), WIDEST)
    x = Scale(-0.5, len(chart.labels) - 0.5, LEFT, LEFT + len(chart.labels) * pitch)
    drawn = _bars(chart.lines[0], x, y, chart) if chart.bars else [_line(one, x, y, chart) for one in chart.lines]
    named = label(0, top + 9, chart.y_label, "small")
    x_name = label((x.start + x.end) / 2, y.start + 38, chart.x_label, "small", "middle")
    below = [label(0, y.start + 58 + 17 * k, row, "small") for k, row in enumerate(away)]
    parts = (_marks(chart, x, y), _axes(chart, x, y, ticks), drawn, named, x_name, below)
    return drawing(caption, width, y.start + 44 + 17 * len(away), legend, parts)


def ceiling(values: Sequence[float]) -> float:
    """Return where an axis ends: at the largest value, or below a few that dwarf the rest.

    Example:
        >>> ceiling([9.0, 1.0, 0.8, 0.9, 0.7, 0.9, 1.1, 1.0]), ceiling([3.0, 2.0, 1.0])
        (1.1, 3.0)
    """
    falling = sorted(values, reverse=True)
    found = falling[0]
    for k in range(1, min(_MAX_CUT, len(falling) // 6) + 1):
        if falling[k] > 0 and falling[k - 1] > _STEP * falling[k] and falling[0] > _FAR * falling[k]:
            found = falling[k]
    return found


def _away(chart: LayerChart, highest: float) -> list[str]:
    """The values beyond the end of the axis, the largest first."""
    far = [(p[1], _column(chart, p[0])) for one in chart.lines for p in one.points if p and p[1] > highest]
    return [f"{name} at {quantity(value)}" for value, name in sorted(far, key=lambda pair: -pair[0])]


def _wrapped(entries: Sequence[str], width: int) -> list[str]:
    rows: list[str] = []
    for entry in [*(f"{each}, " for each in entries[:-1]), *entries[-1:]]:
        if rows and text_width(rows[-1] + entry, SMALL) <= width:
            rows[-1] += entry
        else:
            rows.append(entry if rows else f"off the scale: {entry}")
    return rows


def _column(chart: LayerChart, place: float) -> str:
    k = round(place)
    return chart.labels[k] if 0 <= k < len(chart.labels) else f"{place:g}"


def _axes(chart: LayerChart, x: Scale, y: Scale, ticks: Sequence[float]) -> Content:
    zero = y(0.0)
    grid = [line(x.start, y(tick), x.end, y(tick), "grid") for tick in ticks if tick]
    names = [
        label(x.start - 8, y(tick) + 4, text, "small", "end")
        for tick, text in zip(ticks, tick_labels(ticks), strict=True)
    ]
    pitch = abs(x(1) - x(0))
    every = stride(max(text_width(name, SMALL) for name in chart.labels[chart.first :] or chart.labels) + 6, pitch)
    columns = [
        label(x(k), y.start + 18, name, "small", "middle")
        for k, name in enumerate(chart.labels)
        if (k >= chart.first and (k - chart.first) % every == 0) or (k < chart.first and pitch > 36)
    ]
    return [grid, line(x.start, zero, x.end, zero, "axis"), names, columns]


def _marks(chart: LayerChart, x: Scale, y: Scale) -> Content:
    half = abs(x(1) - x(0)) / 2
    runs: list[list[int]] = []
    for k in sorted({k for k in chart.marked[0] if 0 <= k < len(chart.labels)}):
        if runs and runs[-1][1] == k - 1:
            runs[-1][1] = k
        else:
            runs.append([k, k])
    height = y.start - y.end
    return [box(x(a) - half, y.end, x(b) - x(a) + 2 * half, height, "marked", 0) for a, b in runs]


def _said(chart: LayerChart, one: Line, point: tuple[float, float, float]) -> str:
    spread = f" ± {quantity(point[2])}" if point[2] else ""
    name = f"{one.name}, " if len(chart.lines) > 1 else ""
    return f"{name}{chart.x_label} {_column(chart, point[0])}: {quantity(point[1])}{spread}"


def _bars(one: Line, x: Scale, y: Scale, chart: LayerChart) -> Content:
    half = max(min(abs(x(1) - x(0)) * 0.36, 18.0), 1.0)
    zero = y(0.0)
    drawn: list[Content] = []
    for point in one.points:
        if point is None:
            continue
        place, value, error = point
        at, end = x(place), _inside(y, value)
        bar = box(at - half, min(end, zero), 2 * half, max(abs(end - zero), 0.8), f"fill {one.tone}", min(half, 1.5))
        parts: list[Content] = [tag("title", _said(chart, one, point)), bar]
        if value > y.high:
            parts.append(line(at - half - 2, y.end + 9, at + half + 2, y.end + 4, "cut"))
        elif error:
            parts.append(line(at, _inside(y, value - error), at, _inside(y, value + error), "whisker"))
        drawn.append(tag("g", parts))
    return drawn


def _inside(y: Scale, value: float) -> float:
    return y(min(max(value, y.low), y.high))


def _line(one: Line, x: Scale, y: Scale, chart: LayerChart) -> Content:
    runs: list[list[tuple[float, float, float]]] = [[]]
    for point in one.points:
        if point is None or (runs[-1] and not _follows(one, runs[-1][-1][0], point[0])):
            runs.append([])
        if point is not None:
            runs[-1].append(point)
    points = [point for run in runs for point in run]
    bands: list[Content] = [
        _band(run, x, y, one.tone) for run in runs if len(run) > 1 and any(point[2] for point in run)
    ]
    alone = [run[0] for run in runs if len(run) == 1 and run[0][2]]
    bands += [
        line(x(at), _inside(y, value - error), x(at), _inside(y, value + error), f"line slim {one.tone}")
        for at, value, error in alone
    ]
    path = "".join(
        f"{'L' if k else 'M'}{x(point[0]):.1f} {_inside(y, point[1]):.1f}"
        for run in runs
        for k, point in enumerate(run)
    )
    strength = f"{one.strength:.2f}" if one.strength < 1 else None
    drawn: list[Content] = [*bands, tag("path", d=path, class_=f"line slim {one.tone}", opacity=strength)]
    crowded = len(points) > _MAX_MARKERS or (one.joined and abs(x(1) - x(0)) < _MARKED_FROM)
    if not crowded or len(points) == 1:
        radius = min(3.2, max(1.2, abs(x(1) - x(0)) / 4))
        drawn += [_marker(one, x(p[0]), _inside(y, p[1]), radius, _said(chart, one, p)) for p in points]
    return drawn


def _follows(one: Line, place: float, following: float) -> bool:
    return place < following and (one.joined or following - place <= 1)


def _band(run: Sequence[tuple[float, float, float]], x: Scale, y: Scale, tone: str) -> Markup:
    above = [(x(place), _inside(y, value + error)) for place, value, error in run]
    below = [(x(place), _inside(y, value - error)) for place, value, error in reversed(run)]
    edge = "L".join(f"{at:.1f} {height:.1f}" for at, height in [*above, *below])
    return tag("path", d=f"M{edge}Z", class_=f"band {tone}")


def _marker(one: Line, x: float, y: float, radius: float, said: str) -> Markup:
    """A square where the tone is that of a control: for those to whom the colors look alike."""
    strength = f"{one.strength:.2f}" if one.strength < 1 else None
    if one.tone == "control":
        place = {"x": x - radius, "y": y - radius, "width": 2 * radius, "height": 2 * radius}
        return tag("rect", tag("title", said), class_="marker control", opacity=strength, **place)
    return tag("circle", tag("title", said), cx=x, cy=y, r=radius, class_=f"marker {one.tone}", opacity=strength)


def _legend(chart: LayerChart, width: int) -> tuple[Content, float]:
    """The legend and the height it takes; nothing where there is one line and nothing beside it."""
    named: list[tuple[str, str, float]] = []
    if len(chart.lines) > 1:
        named += [(one.name, f"line slim {one.tone}", one.strength) for one in chart.lines]
    if chart.error and any(point and point[2] for one in chart.lines for point in one.points):
        named.append((chart.error, "whisker" if chart.bars else f"band {chart.lines[0].tone}", 1.0))
    if any(0 <= k < len(chart.labels) for k in chart.marked[0]):
        named.append((chart.marked[1], "marked", 1.0))
    entries: list[Content] = []
    x, y = 0.0, 14.0
    for given, style, strength in named:
        name = clip(given, int(width / SMALL / 0.7))
        if x and x + 30 + text_width(name, SMALL) > width:
            x, y = 0.0, y + 20
        if style.startswith(("band", "marked")):
            sign = box(x, y - 10, 22, 12, style, 2)
        else:
            sign = tag("line", x1=x, y1=y - 4, x2=x + 22, y2=y - 4, class_=style, opacity=f"{strength:.2f}")
        entries += [sign, label(x + 28, y, name, "small")]
        x += 28 + text_width(name, SMALL) + 24
    return entries, y + 12 if entries else 0.0
