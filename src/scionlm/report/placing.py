"""Labels beside points that stay clear of each other, of the points, and of whatever else must be seen.

Each label has eight places around its point. They are tried in order of preference, for one label after another, and
the first that touches nothing is taken; so the labels that matter most come first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scionlm.report.axes import text_width

# Which way the text lies from its point: right, left, above, below, and between.
_WAYS = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
_NEAR_LINE = 0.25  # what it costs to lie over a line, in places further down the list; an overlap is never taken


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: "Box") -> bool:
        """Return whether the two have an area in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def is_inside(self, other: "Box") -> bool:
        """Return whether all of it lies in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Spot:
    """What wants a label: a point, its radius, and the text."""

    x: float
    y: float
    radius: float
    text: str


@dataclass(frozen=True)
class Placed:
    """Where a text goes: its left end and its baseline, and the box that it fills."""

    x: float
    y: float
    box: Box


def place_labels(
    spots: Sequence[Spot], size: float, bounds: Box, walls: Iterable[Box] = (), lines: Iterable[Box] = ()
) -> list[Placed | None]:
    """Return where each text goes, None for those that have no room.

    Args:
        spots: Points and texts, the most important first; no label lies on any of the points.
        size: Of the font.
        bounds: What the labels must stay in.
        walls: What they must not touch.
        lines: What they had better not touch.
    """
    taken = [*walls, *(_around(spot) for spot in spots)]
    soft = list(lines)
    placed: list[Placed | None] = []
    for spot in spots:
        found: tuple[float, Placed] | None = None
        for rank, way in enumerate(_WAYS):
            option = _option(spot, way, size)
            if not option.box.is_inside(bounds) or any(option.box.touches(other) for other in taken):
                continue
            cost = rank * _NEAR_LINE + sum(option.box.touches(one) for one in soft)
            if found is None or cost < found[0]:
                found = cost, option
        placed.append(found[1] if found else None)
        if found:
            taken.append(found[1].box)
    return placed


def _around(spot: Spot) -> Box:
    return Box(spot.x - spot.radius, spot.y - spot.radius, spot.x + spot.radius, spot.y + spot.radius)


def _option(spot: Spot, way: tuple[int, int], size: float) -> Placed:
    width, height = text_width(spot.text, size), size
    across, down = way
    gap = spot.radius + 4
    reach = gap if 0 in way else spot.radius + 1  # from a corner the text is further away by itself
    left = spot.x + (reach if across > 0 else -reach - width if across < 0 else -width / 2)
    top = spot.y + (reach if down > 0 else -reach - height if down < 0 else -height / 2)
    return Placed(left, top + 0.85 * height, Box(left, top, left + width, top + height))
