"""A curve in a terminal, in block characters."""

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"


def draw(points: Sequence[tuple[float, float]], width: int = 64, height: int = 6) -> list[str]:
    """Return a curve as lines of text, highest first, without labels.

    Args:
        points: Pairs of place and value of at least 0, in order.
        width: Columns.
        height: Lines.
    """
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    top = max(value for _, value in points) or 1.0
    columns: list[float] = []
    place = 0
    for column in range(width):
        at = first + (last - first) * column / max(width - 1, 1)
        while place + 1 < len(points) and points[place + 1][0] <= at:
            place += 1
        columns.append(points[place][1] / top)
    lines: list[str] = []
    for line in range(height, 0, -1):
        fills = [min(max(round((value * height - (line - 1)) * 8), 0), 8) for value in columns]
        lines.append("".join(_BLOCKS[fill] for fill in fills).rstrip())
    return lines
