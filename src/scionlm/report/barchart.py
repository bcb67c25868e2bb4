"""Bar charts: shares of a whole in two parts, and a histogram over doublings with its percentiles.

Both say in their description what they draw, so that nothing on them is known by eye alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scionlm.report.axes import Scale, nice_ticks, text_width, tick_labels
from scionlm.report.html import Content, Markup, clip, tag
from scionlm.report.svg import LABEL, SMALL, Caption, box, drawing, label, line

# A histogram over fewer doublings would be a few slabs.
_MIN_DOUBLINGS = 4

# Room for the labels of the counts, the same in all histograms, so that one below the other compares.
_LEFT = 44

# The least height of a bar that is not empty, in pixels: one document among a million is still there.
_STUB = 1.0


@dataclass(frozen=True)
class Share:
    """A part of a whole that has two parts itself; `shown` is what stands beside its bar."""

    name: str
    main: int
    rest: int
    shown: str


@dataclass(frozen=True)
class Histogram:
    """How many things are of which size: `counts[i]` of those from `edges[i]` to below `edges[i + 1]`."""

    edges: Sequence[int]
    counts: Sequence[int]
    percentiles: Mapping[int, int]

    def bins(self) -> Iterable[tuple[int, int, int]]:
        """Yield (from, to below, count) of each bin that is not empty."""
        for low, high, number_of in zip(self.edges, self.edges[1:], self.counts, strict=False):
            if number_of:
                yield low, high, number_of


def bin_name(low: int, high: int) -> str:
    """Return the whole numbers from `low` to below `high` in words.

    Example:
        >>> bin_name(1, 2), bin_name(1024, 2048)
        ('1', '1,024–2,047')
    """
    return f"{low:,}" if high == low + 1 else f"{low:,}\u2013{high - 1:,}"


def shared_span(histograms: Iterable[Histogram]) -> tuple[float, float]:
    """Return the range in doublings (powers of two) that all the histograms fit into, so that they compare by eye."""
    bins = [(low, high) for histogram in histograms for low, high, _ in histogram.bins()] or [(1, 2)]
    first, last = math.floor(min(_doublings(low) for low, _ in bins)), math.ceil(max(_doublings(h) for _, h in bins))
    missing = max(0, _MIN_DOUBLINGS - (last - first))
    lower = max(first - missing // 2, min(first, 0))  # there is nothing shorter than one
    return lower, lower + max(_MIN_DOUBLINGS, last - lower)


def _doublings(value: float) -> float:
    """Return the place of a size on the axis; 0 stands one doubling before 1."""
    return math.log2(max(value, 0.5))


def share_bars(caption: Caption, width: int, shares: Sequence[Share], parts: tuple[str, str]) -> Markup:
    """Return horizontal bars, each with its name above it; the second part of each is the thin end of its bar.

    Args:
        caption: What they show.
        width: In pixels.
        shares: The bars, from top to bottom.
        parts: What the two parts are called in the legend.
    """
    room = max((text_width(share.shown, LABEL) for share in shares), default=0) + 12
    scale = Scale(0, max((share.main + share.rest for share in shares), default=0) or 1, 1, width - room)
    top, pitch = 34, 44
    rows: list[Content] = []
    for k, share in enumerate(shares):
        y, middle, end = top + k * pitch, scale(share.main), scale(share.main + share.rest)
        rows += [
            label(1, y + 12, clip(share.name, int(width / LABEL / 0.57)), "label"),
            box(1, y + 18, middle - 1, 14, "fill child"),
            box(middle + 1, y + 21.5, end - middle - 1, 7, "fill control", 2),
            label(end + 8, y + 30, share.shown, "label value"),
        ]
    second = 28 + text_width(parts[0], SMALL) + 20
    legend = [
        box(1, 3, 20, 12, "fill child"),
        label(28, 13, parts[0], "small"),
        box(second, 6, 20, 6, "fill control", 2),
        label(second + 27, 13, parts[1], "small"),
    ]
    return drawing(caption, width, top + len(shares) * pitch - 4, legend, rows)


def histogram(
    caption: Caption, width: int, data: Histogram, span: tuple[float, float], names: tuple[str, str]
) -> Markup:
    """Return a histogram whose bars are as wide as their bins are on an axis of doublings.

    Over the bars stands where most of it lies: a thin line from the 5th to the 95th percentile, a thick one from the
    25th to the 75th, a point on the median.

    Args:
        caption: What it shows.
        width: In pixels.
        data: What is drawn.
        span: Range of the axis in doublings, see `shared_span`.
        names: What is measured, and what is counted.
    """
    bins = list(data.bins())
    if not bins:
        return drawing(caption, width, 60, label(width / 2, 35, "no lengths were recorded", "label", "middle"))
    most = max(number_of for _, _, number_of in bins)
    # Half a document is no tick, and the highest bar is as high as the drawing.
    ticks = [tick for tick in nice_ticks(0, most, 4) if tick == int(tick) and tick <= most]
    last = f"{2 ** int(span[1]):,}"
    x = Scale(*span, _LEFT, width - text_width(last, SMALL) / 2)
    y = Scale(0, most, 178, 52)
    bars = [_bar(x, y, one, names) for one in bins]
    grid = [line(x.start, y(tick), x.end, y(tick), "grid") for tick in ticks[1:]]
    y_labels = [
        label(_LEFT - 8, y(tick) + 4, text, "small", "end")
        for tick, text in zip(ticks, tick_labels(ticks), strict=True)
    ]
    base = line(x.start, y.start, x.end, y.start, "axis")
    named = [
        label(0, 14, names[1], "small"),
        label((x.start + x.end) / 2, y.start + 40, names[0], "small", "middle"),
    ]
    return drawing(
        caption, width, y.start + 46, grid, bars, base, y_labels, _size_ticks(x, y.start), named, _spread(data, x, y)
    )


def _bar(x: Scale, y: Scale, one: tuple[int, int, int], names: tuple[str, str]) -> Markup:
    low, high, number_of = one
    start, end = x(_doublings(low)) + 0.75, x(_doublings(high)) - 0.75
    height = max(y.start - y(number_of), _STUB)
    said = f"{bin_name(low, high)} {names[0]}: {number_of:,} {names[1]}"
    # A title on the bar is what a browser shows when the pointer rests on it.
    return tag("g", tag("title", said), box(start, y.start - height, end - start, height, "fill child", 1.5))


def _size_ticks(x: Scale, base: float) -> list[Markup]:
    """Powers of two under the axis, as many as have room."""
    low, high = int(x.low), int(x.high)
    widest = text_width(f"{2**high:,}", SMALL) + 8
    stride = max(1, math.ceil(widest / (x(low + 1) - x(low))))
    marks: list[Markup] = []
    for k in range(low, high + 1, stride):
        text = "0" if k < 0 else f"{2**k:,}"
        marks += [line(x(k), base, x(k), base + 4, "axis"), label(x(k), base + 19, text, "small", "middle")]
    return marks


def _spread(data: Histogram, x: Scale, y: Scale) -> Content:
    """The line, the thick line and the point over the bars, each where its percentiles are known."""
    at = {percent: min(max(x(_doublings(size)), x.start), x.end) for percent, size in data.percentiles.items()}
    parts: list[Content] = []
    for (low, high), thickness in (((5, 95), 2), ((25, 75), 8)):
        if low in at and high in at:
            parts.append(box(at[low], 32 - thickness / 2, at[high] - at[low], thickness, "fill plain", thickness / 2))
    if 50 in at:
        words = f"median {data.percentiles[50]:,}"
        half = text_width(words, SMALL) / 2
        place = min(max(at[50], 80 + half), x.end + 10 - half)
        parts += [
            line(at[50], 38, at[50], y.start, "reference"),
            tag("circle", cx=at[50], cy=32, r=5.5, class_="marker control"),
            label(place, 14, words, "small", "middle"),
        ]
    return parts
