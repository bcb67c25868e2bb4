"""Best-fit packing: whole documents side by side in windows, none cut that fits into one.

Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830 (best-fit decreasing); the counting
over lengths instead of documents follows Krell et al., arXiv:2107.02027, so that time depends on the window's length
and not on the number of documents.
Differs: a document longer than a window fills whole windows first and only its rest is packed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """Windows made of pieces of documents.

    Attributes:
        starts: Position in the stream of each piece's first token, ordered by window.
        lengths: Tokens of each piece.
        offsets: First piece of each window, one entry more than windows.
        seq_len: Room in a window.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    seq_len: int

    @property
    def num_windows(self) -> int:
        """How many windows there are."""
        return len(self.offsets) - 1

    @property
    def padding(self) -> float:
        """Share of all places that no token fills."""
        return 1 - int(self.lengths.sum(dtype=np.int64)) / (self.num_windows * self.seq_len)


def best_fit(document_ends: NDArray[np.int64], seq_len: int) -> Packing:
    """Pack the documents of a stream, separators included, into windows of `seq_len` tokens.

    Args:
        document_ends: Where each document ends in the stream, ascending.
        seq_len: Room in a window.
    """
    ends = np.asarray(document_ends, dtype=np.int64)
    begins = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    whole, rest = np.divmod(ends - begins, seq_len)
    owner = np.repeat(np.arange(len(ends)), whole)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(whole) - whole, whole)
    windows = len(owner)  # first those that one long document fills, then those that are shared
    starts, rows = [begins[owner] + within * seq_len], [np.arange(windows)]
    lengths = [np.full(windows, seq_len, dtype=np.int64)]

    short = np.flatnonzero(rest)
    queue = short[np.argsort(rest[short], kind="stable")]  # by length, and in the stream's order within one
    sizes = rest[queue]
    position = {int(size): int(at) for size, at in zip(*np.unique(sizes, return_index=True), strict=True)}
    for pattern, count in _patterns(np.bincount(sizes, minlength=seq_len + 1), seq_len):
        for size in pattern:
            chosen = queue[position[size] : position[size] + count]
            position[size] += count
            starts.append(ends[chosen] - size)  # what is left of a long document is its end
            rows.append(windows + np.arange(count))
            lengths.append(np.full(count, size, dtype=np.int64))
        windows += count
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return Packing(
        starts=np.concatenate(starts)[order],
        lengths=np.concatenate(lengths)[order].astype(np.int32),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(row, minlength=windows))]),
        seq_len=seq_len,
    )


def _patterns(counts: NDArray[np.int64], room: int) -> list[tuple[tuple[int, ...], int]]:
    """Return windows as (lengths of the pieces in one, how many such windows), from how many pieces have each length.

    Lengths are placed from the longest down, each where it leaves the least room. Windows with the same pieces are
    handled together.
    """
    by_room: dict[int, dict[tuple[int, ...], int]] = {}  # room left -> pattern -> windows

    def add(left: int, pattern: tuple[int, ...], number: int) -> None:
        group = by_room.setdefault(left, {})
        group[pattern] = group.get(pattern, 0) + number

    for size in range(room, 0, -1):
        waiting = int(counts[size])
        while waiting:
            left = next((left for left in range(size, room) if by_room.get(left)), None)
            if left is None:
                each = min(room // size, waiting)
                number = waiting // each
                add(room - each * size, (size,) * each, number)
                waiting -= each * number
                continue
            # Once in the tightest window, the next piece of the length goes there too while there is room.
            pattern, number = by_room[left].popitem()
            each = min(left // size, waiting)
            used = min(number, waiting // each)
            if used < number:
                by_room[left][pattern] = number - used
            add(left - each * size, pattern + (size,) * each, used)
            waiting -= each * used
    return [(pattern, number) for group in by_room.values() for pattern, number in group.items()]
