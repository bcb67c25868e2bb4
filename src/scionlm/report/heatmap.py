"""Heat maps: rows and columns of cells, the larger the value the stronger the tone, with a legend of the scale.

A cell is a rectangle that says its value when the pointer rests on it. Where the cells would be too many for that, or
too small on a phone to point at, the map is one picture that masks the tone instead (see `png`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scionlm.report.axes import Scale, drawable, text_width
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.png import data_address, png
from scionlm.report.svg import SMALL, Caption, box, drawing, label, line

# Cells that are drawn one by one, where there is room to point at them and where there is not.
_MOST_CELLS, _MOST_CELLS_NARROW = 8_000, 700
# Below it a cell could not be told from the ground.
_FAINTEST = 0.04
# Numbers on cells stay readable, in the dark too, on a tone of no more than this.
_UNDER_NUMBERS = 0.5
_STEPS = 10
# The share of the width that names of rows take at most.
_NAMES, _FEW_ROWS = 0.4, 24


@dataclass(frozen=True)
class Tone:
    """How strong a value is drawn: from `low` (faint) to `high` (full), evenly or by its logarithm.

    Values below zero are drawn in another color, as strong as they are far from it.
    """

    low: float
    high: float
    logarithmic: bool = False

    def strength(self, value: float) -> float:
        """Return the strength of `value` in [0, 1]."""
        size = abs(value)
        if self.high <= self.low:
            return 1.0 if size >= self.high else 0.0
        if self.logarithmic and self.low > 0:
            share = math.log(max(size, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (size - self.low) / (self.high - self.low)
        return min(max(share, 0.0), 1.0)

    def between(self, share: float) -> float:
        """Return the value of the strength `share`."""
        if self.logarithmic and self.low > 0:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class HeatMap:
    """What is drawn.

    Attributes:
        values: A row of cells each; None (or what is not finite) is an empty cell.
        rows: Name of each row.
        columns: Name of each column.
        axes: What rows and columns are, for a cell's own words ("layer 3, head 1: 12.0"), and what is measured.
        tone: See `Tone`.
        show: A value in words.
        numbers: Write the values on the cells where they fit.
        left: Least room for the names of the rows, in pixels, so that maps below each other line up.
        widest: Width of a cell at most, the same in all drawings that line up.
        square: Cells are as high as they are wide.
        legend: Say what is measured and how strong the tone is.
    """

    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    axes: tuple[str, str, str]
    tone: Tone
    show: Callable[[float], str]
    numbers: bool = False
    left: float = 0.0
    widest: float = 104.0
    square: bool = False
    legend: bool = True


def heat_map(caption: Caption, width: int, data: HeatMap) -> Markup:
    """Return the map as an svg of that width, its height as the rows ask for."""
    count = max((len(row) for row in data.values), default=0)
    if not count:
        return drawing(caption, width, 60, label(width / 2, 35, "nothing was recorded", "label", "middle"))
    names = [_fitted(name, width * _NAMES) for name in data.rows]
    left = max(data.left, max((text_width(name, SMALL) for name in names), default=0) + 8)
    pitch = min((width - left - 8) / count, data.widest)
    # Few rows are high enough to be named one by one.
    height = pitch if data.square else min(max(pitch, 14.0 if len(data.values) <= _FEW_ROWS else 6.0), 22.0)
    top = 34.0 if data.legend else 4.0
    x = Scale(0, count, left, left + count * pitch)
    y = Scale(0, len(data.values), top, top + len(data.values) * height)
    many = count * len(data.values) > (_MOST_CELLS if width > 400 else _MOST_CELLS_NARROW)
    cells = _picture(caption, data, x, y) if many else _cells(data, x, y, pitch, height)
    ground = box(x.start, y.start, x.end - x.start, y.end - y.start, "ground", 0)
    bottom = y.end + 20
    named = label((x.start + x.end) / 2, bottom + 16, data.axes[1], "small", "middle")
    return drawing(
        caption,
        width,
        bottom + 22,
        _legend(data, width) if data.legend else None,
        ground,
        cells,
        _names(data, names, x, y),
        named,
    )


def _cells(data: HeatMap, x: Scale, y: Scale, pitch: float, height: float) -> Content:
    gap = 1.0 if min(pitch, height) > 5 else 0.0
    strongest = _UNDER_NUMBERS if data.numbers else 1.0
    drawn: list[Content] = []
    for i, row in enumerate(data.values):
        for k, value in enumerate(row):
            at = (x(k), y(i), pitch - gap, height - gap)
            said = f"{data.axes[1]} {_name(data.columns, k)}, {data.axes[0]} {_name(data.rows, i)}"
            if value is None or not drawable(value):
                drawn.append(_empty(at, f"{said}: none"))
            else:
                drawn.append(_cell(at, f"{said}: {data.show(value)}", value, data.tone.strength(value) * strongest))
                if data.numbers:
                    drawn.append(_number(at, value, data))
    return drawn


def _cell(at: tuple[float, float, float, float], said: str, value: float, strength: float) -> Markup:
    return tag(
        "rect",
        tag("title", said),
        x=at[0],
        y=at[1],
        width=at[2],
        height=at[3],
        class_="heat negative" if value < 0 else "heat",
        opacity=f"{max(strength, _FAINTEST):.2f}",
    )


def _empty(at: tuple[float, float, float, float], said: str) -> Markup:
    x, y, width, height = at
    stroke = line(x + 1, y + height - 1, x + width - 1, y + 1, "missing")
    return tag("g", tag("title", said), stroke)


def _number(at: tuple[float, float, float, float], value: float, data: HeatMap) -> Markup | None:
    """The value on its cell: in words, else in hundredths, else not at all."""
    x, y, width, height = at
    fitting = [text for text in (data.show(value), f"{100 * value:.0f}") if text_width(text, SMALL) <= width + 2]
    if not fitting or height < 14:
        return None
    return label(x + width / 2, y + height / 2 + 4, fitting[0], "small on-cell", "middle")


def _picture(caption: Caption, data: HeatMap, x: Scale, y: Scale) -> Markup:
    count = max(len(row) for row in data.values)
    values = [
        [0.0 if v is None or not drawable(v) else max(data.tone.strength(v), _FAINTEST) for v in row]
        + [0.0] * (count - len(row))
        for row in data.values
    ]
    return masked(f"{caption.ident}-mask", values, (x.start, y.start, x.end - x.start, y.end - y.start))


def masked(ident: str, values: Sequence[Sequence[float]], at: tuple[float, float, float, float]) -> Markup:
    """Return the tone of heat maps as strong as `values` say, in the rectangle `at` (x, y, width, height)."""
    place = {"x": at[0], "y": at[1], "width": at[2], "height": at[3]}
    image = tag("image", href=data_address(png(values)), preserveAspectRatio="none", class_="pixels", **place)
    mask = tag("mask", image, id=ident, maskUnits="userSpaceOnUse", **place)
    return tag("g", mask, tag("rect", class_="heat", mask=f"url(#{ident})", **place))


def _names(data: HeatMap, names: Sequence[str], x: Scale, y: Scale) -> Content:
    pitch, height = abs(x(1) - x(0)), abs(y(1) - y(0))
    widest = max((text_width(name, SMALL) for name in data.columns), default=0) + 6
    across, down = stride(widest, pitch), stride(14, height)
    columns = [
        label(x(k + 0.5), y.end + 15, name, "small", "middle")
        for k, name in enumerate(data.columns[: int(x.high)])
        if k % across == 0
    ]
    rows = [
        label(x.start - 6, y(i + 0.5) + 4, name, "small", "end")
        for i, name in enumerate(names[: len(data.values)])
        if i % down == 0
    ]
    return [columns, rows]


def _fitted(name: str, room: float) -> str:
    """Return a name cut to what has room."""
    if text_width(name, SMALL) <= room:
        return name
    longest = max(k for k in range(len(name)) if k == 0 or text_width(name[:k], SMALL) <= room - SMALL)
    return name[:longest] + "\u2026"


def stride(need: float, pitch: float) -> int:
    """Return every how many places a label fits that needs so many pixels: 1, 2, 5, 10, 20, ..."""
    wanted = max(1, math.ceil(need / pitch))
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= wanted:
                return step * power
        power *= 10


def _name(names: Sequence[str], k: int) -> str:
    return clip(names[k], 40) if k < len(names) else str(k)


def _legend(data: HeatMap, width: int) -> Content:
    """What is measured, and the tone from its weakest to its strongest with the values there."""
    tone, strongest = data.tone, _UNDER_NUMBERS if data.numbers else 1.0
    name = clip(data.axes[2], int(width / SMALL / 0.9))
    ends = [data.show(tone.between(share)) for share in (0.0, 0.5, 1.0)]
    left = text_width(name, SMALL) + 14 + text_width(ends[0], SMALL)
    ramp = min(150.0, width - left - text_width(ends[2], SMALL) - 16)
    parts: list[Content] = [label(0, 14, name, "small")]
    if ramp < 40:
        return parts
    step = ramp / _STEPS
    parts.append(label(left, 14, ends[0], "small", "end"))
    for k in range(_STEPS):
        opacity = max(strongest * (k + 0.5) / _STEPS, _FAINTEST)
        rect = tag("rect", x=left + 6 + k * step, y=4, width=step, height=12, class_="heat", opacity=f"{opacity:.2f}")
        parts.append(rect)
    parts.append(label(left + ramp + 12, 14, ends[2], "small"))
    middle = f"half strength: {ends[1]}" if tone.logarithmic else ""
    end = left + ramp + 12 + text_width(ends[2], SMALL) + 16
    if middle and end + text_width(middle, SMALL) < width:
        parts.append(label(end, 14, middle, "small"))
    return parts
