"""The drawings of a comparison: held-out loss over tokens, a line a run, and the final losses with their spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scionlm.report.axes import Scale, nice_ticks, text_width, tick_labels
from scionlm.report.compare_join import Comparison, Group, Judged
from scionlm.report.findings import mean_of
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.linechart import Chart, Reference, Series, responsive_chart
from scionlm.report.svg import LABEL, SMALL, Caption, drawing, label, line, responsive
from scionlm.report.wording import nats

# As many as there are colors, plain and dashed.
MAX_LINES = 16
MAX_DOTS = 40
_COLORS = 8
_NAME = 22
_MARKED = 6  # with more lines their markers hide each other
# The first losses of a cut model are so high that the rest would be one flat line: those of the first tenth may leave.
_EARLY, _WORTH = 0.1, 1.5
_DEARER = 1.1  # times as many operations a token: a curve over them shows something else
# A source or a control so many times as far away as the runs are from each other would press these together.
_FAR = 4.0


@dataclass(frozen=True)
class Track:
    """What has one color: a group, or a run without a final loss."""

    name: str
    members: Sequence[Judged]
    tone: str

    @property
    def lines(self) -> Sequence[Judged]:
        """Those of its members that have points to draw."""
        return [one for one in self.members if _points(one)]


def tracks(comparison: Comparison) -> list[Track]:
    """Return what is drawn as lines, from the lowest loss on, controls last; unfinished runs behind finished ones."""
    found = [(group.name, group.members) for group in comparison.groups]
    found += [(one.row.name, [one]) for one in comparison.rows if not one.ranked and one.reason is None]
    drawn = [(name, members) for name, members in found if any(_points(one) for one in members)]
    runs = [(name, members) for name, members in drawn if not members[0].row.is_control]
    controls = [(name, members) for name, members in drawn if members[0].row.is_control]
    plain = [Track(name, members, _tone(k)) for k, (name, members) in enumerate(runs[:MAX_LINES])]
    return plain + [Track(name, members, "control") for name, members in controls[:4]]


def num_lines(comparison: Comparison) -> int:
    """Return how many lines there could be."""
    return sum(1 for one in comparison.rows if one.reason is None and _points(one))


def _tone(number: int) -> str:
    return f"k{number % _COLORS}{' dashed' if number >= _COLORS else ''}"


def _points(one: Judged) -> list[tuple[float, float]]:
    return [(tokens, nll) for tokens, nll in one.row.curve if math.isfinite(nll)]


def operations_matter(comparison: Comparison) -> bool:
    """Return whether a token costs more in one run that is drawn than in another."""
    each = [_flops_each(one) for track in tracks(comparison) for one in track.members]
    known = [flops for flops in each if flops is not None]
    return len(known) == len(each) > 1 and max(known) > _DEARER * min(known)


def _flops_each(one: Judged) -> float | None:
    """Return the operations of a token, those of pruning spread over all."""
    return one.row.flops / one.row.tokens if one.row.flops and one.row.tokens else None


def loss_chart(comparison: Comparison, by_operations: bool = False) -> tuple[Markup, str]:
    """Return the chart of losses over tokens, or operations, and what its note says beside how it is read."""
    chosen = tracks(comparison)
    marked = sum(len(track.members) for track in chosen) <= _MARKED
    series = [
        _series(track, one, k == 0, marked, (_flops_each(one) or 0.0) if by_operations else 1.0)
        for track in chosen
        for k, one in enumerate(track.members)
        if one.row.curve
    ]
    references = [
        Reference(f"source {clip(base.name, _NAME)}", mean, "source", f"source {nats(mean)}")
        for base in comparison.sources[:3]
        if (mean := mean_of(base.losses, comparison.domains)) is not None
    ]
    top = _top(series, [reference.value for reference in references])
    highest = max((y for one in series for _, y in one.points), default=0.0)
    if top < highest:
        series = [replace(one, points=[(x, y if y <= top else math.nan) for x, y in one.points]) for one in series]
    over = "operations (FLOPs) spent" if by_operations else "tokens trained on"
    chart = Chart(series, references, over, "nats per token, lower is better")
    described = [f"{one.name} ends at {nats(_last(one))}" for one in series if one.listed]
    described += [f"{one.name} is at {nats(one.value)}" for one in references]
    ident = "losses-by-operations" if by_operations else "losses"
    caption = Caption(ident, f"Held-out loss over the {over}", f"Lines: {'; '.join(described)} nats.")
    picture = responsive_chart(caption, chart, (470, 420 + 10 * len(chosen)), _short(chart))
    cut = f" The first losses, up to {nats(highest)}, lie above the frame." if top < highest else ""
    return picture, cut


def _series(track: Track, one: Judged, first: bool, marked: bool, each: float) -> Series:
    many = len(track.members) > 1
    name = clip(track.name, _NAME)
    ends = [points[-1][1] for each in track.members if (points := _points(each))]
    end = f"{name} {nats(sum(ends) / len(ends))}" if first else None
    tone = f"{track.tone} slim" if many else track.tone
    points = [(tokens * each, nll) for tokens, nll in one.row.curve]
    return Series(name, points, tone, end=end, listed=first, marked=marked or track.tone == "control")


def _last(series: Series) -> float:
    return next((y for _, y in reversed(series.points) if math.isfinite(y)), math.nan)


def _short(chart: Chart) -> Chart:
    """The same chart without labels at the ends of its lines: on a phone the legend must do."""
    series = [replace(one, end=None) for one in chart.series]
    return replace(chart, series=series, references=[replace(one, end=None) for one in chart.references])


def _top(series: Sequence[Series], references: Sequence[float]) -> float:
    """Return the highest loss that is drawn: of all, or of those behind the first tenth where that saves much room."""
    finite = [[(x, y) for x, y in one.points if math.isfinite(y)] for one in series]
    every = [y for points in finite for _, y in points]
    late = [y for points in finite for x, y in points if x > _EARLY * points[-1][0]]
    if not late:
        return max(every, default=0.0)
    low, high = min([*late, *references]), max([*late, *references])
    return high if max(every) - low > _WORTH * (high - low) else max(every)


def dot_chart(comparison: Comparison) -> tuple[Markup | None, str]:
    """Return the final mean losses as dots with the spread of their seeds, and what lies outside of the frame."""
    colors = {track.name: track.tone for track in tracks(comparison)}
    runs = [group for group in comparison.groups if not group.first.is_control] or list(comparison.groups)
    if not runs:
        return None, ""
    marks = [(f"source {nats(mean)}", mean, "source") for base in comparison.sources[:3]
             if (mean := mean_of(base.losses, comparison.domains)) is not None]  # fmt: skip
    controls = [group for group in comparison.groups if group not in runs]
    low, high = (f(value for group in runs for value in _extent(group)) for f in (min, max))
    reach = _FAR * max(high - low, 0.02 * abs(high))
    near = [mark for mark in marks if low - reach <= mark[1] <= high + reach]
    shown = runs + [group for group in controls if low - reach <= group.mean <= high + reach]
    shown = sorted(shown, key=lambda group: group.mean)[:MAX_DOTS]
    away = [text for text, _, _ in [mark for mark in marks if mark not in near]]
    away += [f"{group.name} {nats(group.mean)}" for group in controls if group not in shown]
    described = "; ".join(f"{clip(group.name, 40)} {_value(group)}" for group in shown)
    caption = Caption("final", "Final held-out loss", f"Dots: {described} nats.")
    picture = responsive(caption, lambda named, width: _dots(named, width, shown, near, colors))
    note = f" Outside of the frame: {', '.join(away)}." if away else ""
    return picture, note


def _extent(group: Group) -> list[float]:
    spread = group.std or 0.0
    means = [one.mean for one in group.members if one.mean is not None]
    return [*means, group.mean - spread, group.mean + spread]


def _value(group: Group) -> str:
    return nats(group.mean, 3) + (f" \u00b1 {nats(group.std, 3)}" if group.std is not None else "")


def _dots(
    caption: Caption,
    width: int,
    groups: Sequence[Group],
    marks: Sequence[tuple[str, float, str]],
    colors: dict[str, str],
) -> Markup:
    wide = width > 600
    names = [clip(group.name, 32 if wide else 36) for group in groups]
    left = min(max(text_width(name, LABEL) for name in names), 280.0) + 14 if wide else 4.0
    room = max(text_width(_value(group), LABEL) for group in groups) + 16
    values = [value for group in groups for value in _extent(group)] + [value for _, value, _ in marks]
    ticks = nice_ticks(min(values), max(values), 6 if wide else 3)
    x = Scale(ticks[0], ticks[-1], left, width - room)
    top, pitch = (24.0, 30.0) if wide else (24.0, 46.0)
    bottom = top + pitch * len(groups)
    rows: list[Content] = []
    for k, (group, name) in enumerate(zip(groups, names, strict=True)):
        y = top + pitch * k + (pitch / 2 if wide else 30)
        rows += _dot_row(group, name, x, y, wide, colors.get(group.name, "plain").split()[0])
    grid = [line(x(tick), top, x(tick), bottom, "grid") for tick in ticks]
    below = [
        label(x(tick), bottom + 18, text, "small", "middle")
        for tick, text in zip(ticks, tick_labels(ticks), strict=True)
    ]
    guides: list[Content] = []
    for text, value, tone in marks:
        half = text_width(text, SMALL) / 2
        at = min(max(x(value), half), width - half)
        guides += [line(x(value), 16, x(value), bottom, f"reference {tone}"), label(at, 11, text, "small", "middle")]
    axis = label((x.start + x.end) / 2, bottom + 38, "mean held-out nll in nats, lower is better", "small", "middle")
    return drawing(caption, width, bottom + 46, grid, guides, rows, below, axis)


def _dot_row(group: Group, name: str, x: Scale, y: float, wide: bool, tone: str) -> list[Content]:
    tone = "control" if group.first.is_control else tone
    right = max(x(value) for value in _extent(group)) + 12
    row: list[Content] = [
        label(0, y + 5, name) if wide else label(0, y - 14, name),
        label(right, y + 5, _value(group), "label value" if group.best else "label"),
    ]
    if group.std is not None:
        low, high = x(group.mean - group.std), x(group.mean + group.std)
        row += [line(low, y, high, y, "whisker"), line(low, y - 5, low, y + 5, "whisker")]
        row += [line(high, y - 5, high, y + 5, "whisker")]
        seeds = [one.mean for one in group.members if one.mean is not None]
        row += [tag("circle", cx=x(value), cy=y, r=2.5, class_=f"marker seed {tone}") for value in seeds]
    return [*row, tag("circle", cx=x(group.mean), cy=y, r=5, class_=f"marker {tone}")]
