"""Drawings as inline SVG: a frame that speaks to screen readers, a layer strip, a gap bar, horizontal bars.

Colors and strokes come from the style sheet of the page by class, so that a drawing follows light, dark and print.
A drawing is made for a width in pixels; `responsive` makes one for a desk and one for a phone, and the style sheet
shows the one that fits: scaling a single one would leave the text on a phone unreadable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scionlm.report.axes import Scale, spread, text_width
from scionlm.report.html import Content, Markup, clip, join, tag

WIDE, NARROW = 880, 340

# Font sizes of the style sheet: .label and .small inside svg.
LABEL, SMALL = 14, 12

# A strip of more layers is no longer looked at.
MAX_LAYERS = 400


@dataclass(frozen=True)
class Caption:
    """What a drawing is called and shows, for those who do not see it; `ident` is unique on the page."""

    ident: str
    title: str
    description: str


@dataclass(frozen=True)
class Mark:
    """A labeled value; `tone` is a color class of the style sheet: child, control, source, plain."""

    label: str
    value: float
    tone: str
    shown: str


def drawing(caption: Caption, width: float, height: float, *children: Content) -> Markup:
    """Return an svg element with its title and description."""
    title, description = f"{caption.ident}-title", f"{caption.ident}-desc"
    return tag(
        "svg",
        tag("title", caption.title, id=title),
        tag("desc", caption.description, id=description),
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_labelledby=f"{title} {description}",
    )


def responsive(caption: Caption, draw: Callable[[Caption, int], Markup]) -> Markup:
    """Return the drawing twice, for wide and narrow windows, of which the style sheet shows one."""
    variants = (("wide", WIDE), ("narrow", NARROW))
    return join(
        [
            tag(
                "div",
                draw(Caption(f"{caption.ident}-{name}", caption.title, caption.description), width),
                class_=name,
            )
            for name, width in variants
        ]
    )


def label(x: float, y: float, text: Content, class_: str = "label", anchor: str | None = None) -> Markup:
    """Return a piece of text at a point; `anchor` is start (by default), middle or end."""
    return tag("text", text, x=x, y=y, class_=class_, text_anchor=anchor)


def halo(x: float, y: float, text: Content, class_: str = "label", anchor: str | None = None) -> Markup:
    """Return a piece of text with the ground around its letters, so that lines behind it leave it readable."""
    return label(x, y, text, f"{class_} halo", anchor)


def box(x: float, y: float, width: float, height: float, class_: str, radius: float = 3) -> Markup:
    """Return a rectangle with round corners."""
    return tag("rect", x=x, y=y, width=max(width, 0), height=height, rx=radius, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def layer_strip(caption: Caption, width: int, num_layers: int, keep: Sequence[int]) -> Markup:
    """Return the layers of a source as cells, kept ones filled and numbered; below them the child's, where they fit.

    Cells that do not fit into one row go on in the next; then the child is not drawn, as lines would cross the rows.
    """
    gap, height = 4, 34
    per_row = min(num_layers, int(width // 27))
    cell = min((width - gap * (per_row - 1)) / per_row, 64)
    pitch = cell + gap
    kept = set(keep)
    cells = [
        _cell((k % per_row) * pitch, 24 + (k // per_row) * (height + gap), cell, k, k in kept)
        for k in range(num_layers)
    ]
    rows = -(-num_layers // per_row)
    bottom = 24 + rows * (height + gap)
    if rows > 1 or not keep or len(keep) > num_layers:
        return drawing(caption, width, bottom, label(0, 14, f"source: {num_layers} layers", "small source"), cells)
    top = bottom + 46
    shift = (per_row - len(keep)) / 2 * pitch  # the child stands under the middle of the source
    center = cell / 2
    links = [
        tag(
            "path",
            d=_link(k * pitch + center, bottom - gap + 3, shift + j * pitch + center, top - 3),
            class_="link",
        )
        for j, k in enumerate(keep)
    ]
    child = [_cell(shift + j * pitch, top, cell, j, kept=True) for j in range(len(keep))]
    names = (
        label(0, 14, f"source: {num_layers} layers", "small source"),
        label(
            shift + (len(keep) * pitch - gap) / 2,
            top + height + 18,
            f"child: {len(keep)} layers",
            "small child",
            "middle",
        ),
    )
    return drawing(caption, width, top + height + 26, links, cells, child, names)


def _cell(x: float, y: float, size: float, index: int, kept: bool) -> Markup:
    number = label(x + size / 2, y + 22, index, "cell-number", "middle") if kept else None
    return join(box(x, y, size, 34, "cell kept" if kept else "cell", 4), number)


def _link(x1: float, y1: float, x2: float, y2: float) -> str:
    middle = (y1 + y2) / 2
    return f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"


def gap_bar(caption: Caption, width: int, marks: tuple[Mark, Mark, Mark], closed: str) -> Markup:
    """Return a bar from the first mark (where one starts) to the third (the goal), filled as far as the second.

    Args:
        caption: What it shows.
        width: In pixels.
        marks: Start, reached, goal; the axis runs from start on the left to goal on the right.
        closed: What to write into the filled part.
    """
    start, reached, goal = marks
    values = [mark.value for mark in marks]
    # Losses fall from left to right, as a progress bar fills.
    ends = (max(values), min(values)) if start.value > goal.value else (min(values), max(values))
    scale = Scale(*ends, 2, width - 2)
    x = [scale(value) for value in values]
    top, height = 34, 30
    filled = box(min(x[0], x[1]), top, abs(x[1] - x[0]), height, f"fill {reached.tone}", 4)
    track = box(min(x), top, max(x) - min(x), height, "track", 4)
    fits = abs(x[1] - x[0]) > text_width(closed, LABEL) + 16
    inside = label((x[0] + x[1]) / 2, top + 20, closed, "label on-fill", "middle") if fits else None
    pins = [line(at, top - 5, at, top + height + 5, f"pin {mark.tone}") for at, mark in zip(x, marks, strict=True)]
    above = _mark_label(reached, x[1], 20, width)
    below_y = top + height + 24
    widths = [text_width(f"{mark.label} {mark.shown}", LABEL) for mark in (start, goal)]
    centers = spread([x[0], x[2]], [sum(widths) / 2 + 12], widths[0] / 2, width - widths[1] / 2)
    below = [_mark_label(mark, center, below_y, width) for mark, center in zip((start, goal), centers, strict=True)]
    return drawing(caption, width, below_y + 10, track, filled, inside, pins, above, below)


def _mark_label(mark: Mark, x: float, y: float, width: float) -> Markup:
    half = text_width(f"{mark.label} {mark.shown}", LABEL) / 2
    anchor, at = ("start", 0.0) if x < half else ("end", float(width)) if x > width - half else ("middle", x)
    return label(at, y, [f"{mark.label} ", tag("tspan", mark.shown, class_="value")], f"label {mark.tone}", anchor)


def bars(caption: Caption, width: int, marks: Sequence[Mark], reference: Mark | None = None) -> Markup:
    """Return horizontal bars from zero, each with its label above it and its value beside it.

    Args:
        caption: What they show.
        width: In pixels.
        marks: The bars, from top to bottom.
        reference: A value to compare with, drawn as a dashed line through all of them.
    """
    values = [0.0, *(mark.value for mark in marks), *([reference.value] if reference else [])]
    room = max((text_width(mark.shown, LABEL) for mark in marks), default=0) + 10
    # A bar to the left of zero has its value on that side.
    scale = Scale(min(values), max(values), room if min(values) < 0 else 1, width - room)
    top, pitch = (26 if reference else 4), 44
    rows = []
    for k, mark in enumerate(marks):
        y, x, zero = top + k * pitch, scale(mark.value), scale(0.0)
        sign = -1 if mark.value < 0 else 1
        anchor = "end" if sign < 0 else "start"
        rows += [
            label(1, y + 12, clip(mark.label, int(width / LABEL / 0.7)), "label"),
            box(min(x, zero), y + 18, abs(x - zero), 14, f"fill {mark.tone}"),
            label(x + sign * 7, y + 30, mark.shown, "label value", anchor),
        ]
    bottom = top + len(marks) * pitch - 6
    guide = None
    if reference:
        x = scale(reference.value)
        half = text_width(reference.label, SMALL) / 2
        name = label(min(x, width - half), 12, reference.label, f"small {reference.tone}", "middle")
        guide = join(line(x, 18, x, bottom, f"reference {reference.tone}"), name)
    zero_line = line(scale(0.0), top, scale(0.0), bottom, "axis") if min(values) < 0 else None
    return drawing(caption, width, bottom + 4, rows, zero_line, guide)
