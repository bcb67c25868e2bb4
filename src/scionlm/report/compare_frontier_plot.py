"""The frontier as a drawing: forgetting to the right, adaptation upwards, a point for each group of runs.

Faint slanted lines join what has the same net; a stepped line joins what nothing else beats on both. Points are named
where all names have room, else they have the numbers of the table below.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scionlm.report.axes import Scale, nice_ticks, text_width, tick_labels
from scionlm.report.compare_frontier import Frontier, Point, Value
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.placing import Box, Spot, place_labels
from scionlm.report.svg import LABEL, SMALL, Caption, drawing, halo, label, line, responsive
from scionlm.report.wording import nats, signed

_POINTS = 40
_NAME = 28
_RADIUS, _RING = 5.0, 9.0
# What is further away than so many times what the best are from each other and from the start would press them
# together: baselines sooner than the runs that this is about.
_FAR, _FAR_BASELINE = 4.0, 1.0
_LEAST = 0.02  # nats: a frame smaller than that would draw noise large


@dataclass(frozen=True)
class _Frame:
    x: Scale
    y: Scale
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def at(self, point: Point) -> tuple[float, float]:
        return self.x(point.forgetting.mean), self.y(point.adaptation.mean)

    @property
    def box(self) -> Box:
        return Box(self.x.start, self.y.end, self.x.end, self.y.start)


def frontier_chart(frontier: Frontier) -> tuple[Markup, str]:
    """Return the drawing, and in words what is not in it."""
    shown, away = _inside(frontier)
    numbers = {point.rows: k for k, point in enumerate(frontier.points, 1)}
    described = "; ".join(
        f"{clip(point.name, 40)} {signed(point.forgetting.mean)}, {signed(point.adaptation.mean)}" for point in shown
    )
    caption = Caption("frontier-plot", "Forgetting and adaptation", f"Points, nats forgotten and gained: {described}.")
    picture = responsive(caption, lambda named, width: _draw(named, width, frontier, shown, numbers))
    told = [f"{clip(p.name, 60)} (forgets {_plain(p.forgetting)}, gains {_plain(p.adaptation)})" for p in away]
    every = len(frontier.points)
    cut = f" Of {every} points {len(shown)} are drawn." if len(shown) + len(away) < every else ""
    return picture, cut + (f" Outside of the frame: {', '.join(told)}." if told else "")


def _plain(value: Value) -> str:
    return nats(value.mean).replace("-", "\u2212")


_Area = tuple[float, float, float, float]


def _inside(frontier: Frontier) -> tuple[list[Point], list[Point]]:
    """Return the points that have a place in the frame, and those that are told beside it."""
    core = _core(frontier.non_dominated) or frontier.candidates[:1]
    near = [point for point in frontier.candidates if point in core or _is_near(point, _area(core), _FAR)]
    area = _area(near)
    chosen = [p for p in frontier.points if p in near or (p.baseline and _is_near(p, area, _FAR_BASELINE))]
    # Of too many those that matter go first.
    order = sorted(chosen, key=lambda p: (p != frontier.recommended, p not in core, p.baseline))[:_POINTS]
    return order, [point for point in frontier.points if point not in chosen]


def _core(non_dominated: Sequence[Point]) -> list[Point]:
    """Return the frontier without an end that gains a little more for very much more that it forgets."""
    core = list(non_dominated)
    while len(core) > 1 and not _is_near(core[-1], _area(core[:-1]), _FAR):
        core.pop()
    return core


def _area(points: Iterable[Point]) -> _Area:
    """Return the range of forgetting and of adaptation of points with their spread, and of the start."""
    listed = list(points)
    xs = [0.0, *(end for point in listed for end in point.forgetting.ends)]
    ys = [0.0, *(end for point in listed for end in point.adaptation.ends)]
    return min(xs), max(xs), min(ys), max(ys)


def _is_near(point: Point, area: _Area, times: float) -> bool:
    left, right, low, high = area
    reach = times * max(right - left, high - low, _LEAST)  # both axes are nats
    x, y = point.forgetting.mean, point.adaptation.mean
    return left - reach <= x <= right + reach and low - reach <= y <= high + reach


def _draw(
    caption: Caption, width: int, frontier: Frontier, shown: Sequence[Point], numbers: dict[tuple[str, ...], int]
) -> Markup:
    wide = width > 600
    legend, top = _legend(frontier, shown, width)
    frame = _frame(shown, width, 470 if wide else 360, top + 40)
    names = [clip(point.name, _NAME) for point in shown]
    spots = _spots(frontier, frame, shown, names)
    walls = [_box(*frame.at(point), end, at) for point in shown for end, at in _whiskers(point, frame)]
    soft = [_box(a[0], a[1], b[0], b[1]) for a, b in pairwise(_stairs(frontier, shown, frame))]
    start = Spot(frame.x(0.0), frame.y(0.0), _RADIUS, "start")
    size = LABEL
    places = place_labels([*spots, start], size, frame.box, walls, soft)
    if None in places[:-1]:
        size = LABEL if wide else SMALL
        spots = _spots(frontier, frame, shown, [str(numbers[point.rows]) for point in shown])
        places = place_labels([*spots, start], size, frame.box, walls, soft)
    styles = ["value" if point is frontier.recommended else "" for point in shown] + ["source"]
    texts = [
        halo(place.x, place.y, spot.text, f"{'label' if size == LABEL else 'small ink'} {style}".rstrip())
        for spot, place, style in zip([*spots, start], places, styles, strict=True)
        if place is not None
    ]
    bottom = frame.y.start + 46
    points = [_mark(point, frontier, frame) for point in reversed(shown)]
    origin = tag("path", d=_diamond(start.x, start.y), class_="marker source")
    under = [_axes(frame), _net_lines(frame, wide), _stair_line(frontier, shown, frame)]
    return drawing(caption, width, bottom, legend, under, origin, points, texts)


def _spots(frontier: Frontier, frame: _Frame, shown: Sequence[Point], texts: Sequence[str]) -> list[Spot]:
    return [
        Spot(*frame.at(point), _RING if point is frontier.recommended else _RADIUS, text)
        for point, text in zip(shown, texts, strict=True)
    ]


def _frame(shown: Sequence[Point], width: int, height: int, top: float) -> _Frame:
    left, right, low, high = _area(shown)
    x_ticks = nice_ticks(left, max(right, left + _LEAST), 6 if width > 600 else 3)
    y_ticks = nice_ticks(low, max(high, low + _LEAST), 6)
    room = max(text_width(text, SMALL) for text in tick_labels(y_ticks)) + 10
    return _Frame(
        Scale(x_ticks[0], x_ticks[-1], room, width - (58 if width > 600 else 36)),
        Scale(y_ticks[0], y_ticks[-1], height, top),
        x_ticks,
        y_ticks,
    )


def _axes(frame: _Frame) -> Content:
    grid = [line(frame.x(tick), frame.y.start, frame.x(tick), frame.y.end, "grid") for tick in frame.x_ticks]
    grid += [line(frame.x.start, frame.y(tick), frame.x.end, frame.y(tick), "grid") for tick in frame.y_ticks]
    zero = [line(frame.x(0.0), frame.y.start, frame.x(0.0), frame.y.end, "axis zero")]
    zero += [line(frame.x.start, frame.y(0.0), frame.x.end, frame.y(0.0), "axis zero")]
    x_labels = [
        label(frame.x(tick), frame.y.start + 18, text, "small", "middle")
        for tick, text in zip(frame.x_ticks, tick_labels(frame.x_ticks), strict=True)
    ]
    y_labels = [
        label(frame.x.start - 8, frame.y(tick) + 4, text, "small", "end")
        for tick, text in zip(frame.y_ticks, tick_labels(frame.y_ticks), strict=True)
    ]
    middle = (frame.x.start + frame.x.end) / 2
    names = [
        label(middle, frame.y.start + 38, "forgotten of the old text, in nats; lower is better", "small", "middle"),
        label(0, frame.y.end - 28, "learned of the new text, in nats; higher is better", "small"),
    ]
    return [grid, zero, x_labels, y_labels, names]


def _net_lines(frame: _Frame, wide: bool) -> Content:
    """Faint lines of equal net, adaptation = forgetting + net, each with its net where it leaves the frame."""
    x, y = frame.x, frame.y
    nets = nice_ticks(y.low - x.high, y.high - x.low, 7)
    drawn: list[Content] = []
    last_top, last_right = float("inf"), float("-inf")
    named = False
    for net, text in reversed(list(zip(nets, tick_labels(nets), strict=True))):
        left, right = max(x.low, y.low - net), min(x.high, y.high - net)
        if right - left <= 0.01 * (x.high - x.low):
            continue
        drawn.append(line(x(left), y(left + net), x(right), y(right + net), "net"))
        # On a phone the first one says what they all are.
        words = f"net {text}" if wide or not named else text
        named = True
        end, height = x(right), y(right + net)
        if right < x.high:  # it leaves through the top; from the highest net on these go from left to right
            half = text_width(words, SMALL) / 2
            if last_top == float("inf") or end - half > last_top + 8:
                drawn.append(label(end, y.end - 6, words, "small faint", "middle"))
                last_top = end + half
        elif height > last_right + SMALL + 3:
            drawn.append(label(end + 5, height + 4, words, "small faint"))
            last_right = height
    return drawn


def _stairs(frontier: Frontier, shown: Sequence[Point], frame: _Frame) -> list[tuple[float, float]]:
    """Return the corners of the stepped line: up to a point's height only from where it is reached on."""
    places = [frame.at(point) for point in frontier.non_dominated if point in shown]
    corners = places[:1]
    for before, after in pairwise(places):
        corners += [(after[0], before[1]), after]
    return corners


def _stair_line(frontier: Frontier, shown: Sequence[Point], frame: _Frame) -> Markup | None:
    corners = _stairs(frontier, shown, frame)
    path = "".join(f"{'L' if k else 'M'}{x:.1f} {y:.1f}" for k, (x, y) in enumerate(corners))
    return tag("path", d=path, class_="line child slim") if len(corners) > 1 else None


def _whiskers(point: Point, frame: _Frame) -> Iterable[tuple[float, float]]:
    """Yield the far ends of the spread of seeds: left, right, below and above."""
    x, y = frame.at(point)
    if point.forgetting.std is not None:
        yield from ((frame.x(end), y) for end in point.forgetting.ends)
    if point.adaptation.std is not None:
        yield from ((x, frame.y(end)) for end in point.adaptation.ends)


def _box(x: float, y: float, other_x: float, other_y: float) -> Box:
    return Box(min(x, other_x) - 2, min(y, other_y) - 2, max(x, other_x) + 2, max(y, other_y) + 2)


def _mark(point: Point, frontier: Frontier, frame: _Frame) -> Content:
    x, y = frame.at(point)
    whiskers: list[Content] = []
    for end_x, end_y in _whiskers(point, frame):
        across, up = (0.0, 4.0) if end_y == y else (4.0, 0.0)
        whiskers += [
            line(x, y, end_x, end_y, "whisker"),
            line(end_x - across, end_y - up, end_x + across, end_y + up, "whisker"),
        ]
    ring = tag("circle", cx=x, cy=y, r=_RING, class_="ring child") if point is frontier.recommended else None
    return [whiskers, ring, _shape(x, y, _style(point, frontier))]


def _style(point: Point, frontier: Frontier) -> str:
    if point.baseline:
        return "control"
    return "child" if point in frontier.non_dominated else "child hollow"


def _shape(x: float, y: float, style: str) -> Markup:
    if style == "control":
        return tag("rect", x=x - 4.5, y=y - 4.5, width=9, height=9, class_="marker control")
    return tag("circle", cx=x, cy=y, r=_RADIUS, class_=f"marker {style}")


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 6:.1f}L{x + 6:.1f} {y:.1f}L{x:.1f} {y + 6:.1f}L{x - 6:.1f} {y:.1f}Z"


def _legend(frontier: Frontier, shown: Sequence[Point], width: int) -> tuple[Content, float]:
    """Return what the marks mean, in as many rows as it takes, and the height of them."""
    styles = {_style(point, frontier) for point in shown}
    words = {
        "child": "on the frontier",
        "child hollow": "another does no worse on either",
        "control": "baseline",
    }
    entries: list[tuple[Content, str]] = []
    if frontier.recommended in shown:
        ring = tag("circle", cx=9, cy=0, r=7.5, class_="ring child")
        entries.append(([ring, _shape(9, 0, "child")], "recommended"))
    entries += [(_shape(9, 0, style), said) for style, said in words.items() if style in styles]
    entries.append((tag("path", d=_diamond(9, 0), class_="marker source"), "where they began"))
    if any(point.net.std is not None for point in shown):
        entries.append((line(2, 0, 16, 0, "whisker"), "one standard deviation of the seeds"))
    drawn: list[Content] = []
    x, y = 0.0, 12.0
    for mark, said in entries:
        if x and x + 24 + text_width(said, SMALL) > width:
            x, y = 0.0, y + 20
        drawn += [tag("g", mark, transform=f"translate({x:.0f} {y:.0f})"), label(x + 23, y + 4, said, "small")]
        x += 23 + text_width(said, SMALL) + 20
    return drawn, y + 12
