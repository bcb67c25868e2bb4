"""A domain's training stream seen as windows of `seq_len` predicted tokens, each token in one window of an epoch.

`concat` tiles the stream: documents run on from one window into the next; the last window reaches back to be full, and
only its new tokens are predicted. `best_fit` packs whole documents; a piece is read after the token that stands before
it in the stream (the separator of the document before), so that its first token is predicted too, and what no piece
fills is padding without labels.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.data.folder import TokenStream
from scionlm.data.mixing.packing import best_fit

IGNORE = -100
"""Label of a position that is not predicted."""

PackingName = Literal["concat", "best_fit"]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Sequences to train on; every array is `[sequences, seq_len]`.

    Input ids and labels may be views of the same memory: copy what is to be changed.

    Attributes:
        input_ids: Token ids.
        labels: The token that follows each, or `IGNORE`.
        position_ids: Position of each token in its document, from 0: attention stays inside. None where sequences are
            not divided.
    """

    input_ids: Ids
    labels: Ids
    position_ids: Ids | None = None


class Windows(Protocol):
    """The windows of one epoch of a domain."""

    num_windows: int
    padding: float
    """Share of the places that hold padding."""
    shifted: bool
    """Whether labels are just the next tokens."""

    def read(self, windows: Ids, rows: list[int], page: "Page") -> None:
        """Fill one row of a page for each window.

        Args:
            windows: Numbers of the windows.
            rows: The row that each of them goes to.
            page: What is filled.
        """
        ...


class Page:
    """A batch that is being filled.

    Where labels are just the next tokens, which is nearly always, they are a view of the same memory as the input.

    Args:
        sequences: Rows.
        seq_len: Predicted tokens in a row.
        shifted: Whether all windows are such that their labels are just the next tokens.
        positions: Whether positions are wanted.
    """

    def __init__(self, sequences: int, seq_len: int, shifted: bool, positions: bool) -> None:
        self.tokens = np.empty((sequences, seq_len + 1), dtype=np.int64)
        self.shifted = shifted
        self.input_ids = self.tokens[:, :-1]
        self.labels = self.tokens[:, 1:] if shifted else np.empty((sequences, seq_len), dtype=np.int64)
        self.position_ids = np.empty((sequences, seq_len), dtype=np.int64) if positions else None
        self.ignored: list[tuple[int, int]] = []
        """Rows whose first so many labels are ignored."""

    def batch(self) -> Batch:
        """Return the batch once every row is filled."""
        labels = self.labels
        if self.ignored:
            labels = labels.copy()
            for row, count in self.ignored:
                labels[row, :count] = IGNORE
        return Batch(self.input_ids, labels, self.position_ids)


def open_windows(stream: TokenStream, seq_len: int, packing: PackingName, name: str) -> Windows:
    """Return the windows of a domain's stream.

    Raises:
        DataError: The stream is shorter than one window.
    """
    if packing == "best_fit" and stream.num_tokens:
        return PackedWindows(stream, seq_len)
    if stream.num_tokens < seq_len + 1:
        raise DataError(
            f"domain {name!r} has {stream.num_tokens} training tokens, fewer than one window of {seq_len + 1}; "
            "lower data.seq_len, use data.packing: best_fit, or add text"
        )
    return TiledWindows(stream, seq_len)


class TiledWindows:
    """Windows one after another; they overlap by the one token that is predicted in the one and read in the next."""

    padding = 0.0
    shifted = True

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self._stream, self._seq_len = stream, seq_len
        self.num_windows = -(-(stream.num_tokens - 1) // seq_len)

    def read(self, windows: Ids, rows: list[int], page: Page) -> None:
        """See `Windows.read`."""
        stream, length = self._stream, self._seq_len
        last = stream.num_tokens - 1 - length
        wanted = (windows * length).tolist()
        starts = [min(start, last) for start in wanted]
        stream.read_rows(starts, rows, page.tokens)
        if not page.shifted:
            page.labels[rows] = page.tokens[rows, 1:]
        for row, asked, start in zip(rows, wanted, starts, strict=True):
            if asked != start:
                page.ignored.append((row, asked - start))  # predicted in the window before
        if page.position_ids is not None:
            begins = stream.context_starts
            bounds = np.searchsorted(begins, [starts, [start + length for start in starts]]).T.tolist()
            for row, start, (low, high) in zip(rows, starts, bounds, strict=True):
                page.position_ids[row] = _restarting(begins[low:high] - start, length)


class PackedWindows:
    """Windows of whole documents and of the pieces of long ones."""

    shifted = False

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self._stream, self._seq_len = stream, seq_len
        self._packing = best_fit(stream.document_ends, seq_len)
        self.num_windows = self._packing.num_windows
        self.padding = self._packing.padding

    def read(self, windows: Ids, rows: list[int], page: Page) -> None:
        """See `Windows.read`."""
        stream, packing = self._stream, self._packing
        for row, window in zip(rows, windows.tolist(), strict=True):
            ids, labels = page.input_ids[row], page.labels[row]
            begin = 0
            restarts: list[int] = []
            for piece in range(packing.offsets[window], packing.offsets[window + 1]):
                start, end = int(packing.starts[piece]), begin + int(packing.lengths[piece])
                stream.read_into(start, labels[begin:end])
                ids[begin] = stream.before(start)
                ids[begin + 1 : end] = labels[begin : end - 1]
                restarts.append(begin)
                if labels[begin] == stream.bos_id:  # then it opens the context, not the separator before it
                    restarts.append(begin + 1)
                begin = end
            ids[begin:], labels[begin:] = stream.separator_id, IGNORE
            if page.position_ids is not None:
                page.position_ids[row] = _restarting(np.array([*restarts, begin]), self._seq_len)


def _restarting(restarts: Ids, length: int) -> Ids:
    """Return 0, 1, 2, ... of `length` that begins anew at some places (and at the first)."""
    places = np.arange(length)
    origin = np.zeros(length, dtype=np.int64)
    inside = restarts[restarts < length]
    origin[inside] = inside
    return places - np.maximum.accumulate(origin)
