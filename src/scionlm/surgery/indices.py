"""Lists of numbers as people write them: `0-7,12`, `0-29:2`."""

import re
from collections.abc import Sequence

from scionlm.core.errors import UsageError

_RANGE = re.compile(r"\s*(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?\s*", re.ASCII)
# A vocabulary is the longest list there is.
_MOST = 2**24


def parse_indices(text: str, what: str = "keep", most: int = _MOST) -> list[int]:
    """Return the numbers that `0-7,12` or `0-29:2` (every second) names, in the order written.

    Args:
        text: Numbers and ranges; both ends of a range are in it.
        what: Where it was written, for messages.
        most: How many numbers it may name.

    Raises:
        UsageError: It is not a list of numbers and ranges.
    """
    indices: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last, step = (match[1], match[2] or match[1], match[3] or "1") if match else ("1", "0", "1")
        if int(last) < int(first) or step == "0" or len(indices) + int(last) - int(first) > most:
            raise UsageError(f"{what} {text[:80]!r}: {part.strip()[:80]!r} is neither a number nor a range such as 0-7")
        indices += range(int(first), int(last) + 1, int(step))
    return indices


def format_indices(indices: Sequence[int]) -> str:
    """Return numbers in the form that `parse_indices` reads, runs of consecutive ones as ranges."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            parts.append(f"{indices[start]}-{indices[i - 1]}" if i - start > 1 else str(indices[start]))
            start = i
    return ",".join(parts)
