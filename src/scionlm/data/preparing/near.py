"""Documents that are nearly the same: MinHash signatures of their phrases, and groups of those that share most.

Source: Broder 1997, On the resemblance and containment of documents; banding as in Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, chapter 3. The signatures are rensa's.
"""

import importlib
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError

PERMUTATIONS = 128
BANDS = 32  # of four values: two documents of similarity 0.8 meet in one of them but for one pair in ten million
_PHRASE = 24  # bytes: four or five words, in any language, with or without spaces
_SEED = 1
_FLUSH_BYTES = 2**22
_MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


class Signatures:
    """Collects the signatures of documents, a few at a time.

    Raises:
        DataError: The package that makes them is not installed.
    """

    def __init__(self) -> None:
        try:
            rensa: Any = importlib.import_module("rensa")
        except ImportError as error:
            raise DataError("dedupe: near needs the rensa package; pip install 'scionlm[data]'") from error
        self._minhash = rensa.RMinHash
        self._hashes: list[NDArray[np.uint64]] = []
        self._rows: list[NDArray[np.uint32]] = []
        self._held = 0

    def add(self, text: str) -> None:
        """Add a document."""
        hashes = phrase_hashes(text)
        self._hashes.append(hashes)
        self._held += hashes.nbytes
        if self._held >= _FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._hashes:
            offsets = np.cumsum([0] + [len(hashes) for hashes in self._hashes])
            matrix = self._minhash.digest_matrix_from_flat_token_hashes(
                np.concatenate(self._hashes), offsets.tolist(), num_perm=PERMUTATIONS, seed=_SEED
            )
            self._rows.append(np.array(matrix.to_rows(), dtype=np.uint32))
        self._hashes, self._held = [], 0

    def matrix(self) -> NDArray[np.uint32]:
        """Return the signatures, `[documents, permutations]`."""
        self._flush()
        return np.concatenate(self._rows) if self._rows else np.empty((0, PERMUTATIONS), dtype=np.uint32)


def phrase_hashes(text: str) -> NDArray[np.uint64]:
    """Return a hash of every run of so many bytes of a text, its case and white space evened out."""
    data = " ".join(text.lower().split()).encode(errors="replace").ljust(_PHRASE)
    count = len(data) - _PHRASE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for i, factor in enumerate(_MIX):
        # Eight bytes from every place on, as one number: a view with a stride of one byte.
        words = np.ndarray((count,), dtype="<u8", buffer=data, offset=8 * i, strides=(1,))
        hashes = (hashes ^ words) * np.uint64(factor)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def near_duplicates(signatures: NDArray[np.uint32], threshold: float) -> NDArray[np.bool_]:
    """Return which documents share at least `threshold` of their phrases with an earlier one of their group.

    Documents that meet in a band are compared by their whole signatures with the first of the band; those that are
    near enough form groups, and of each group the first stays.

    Args:
        signatures: `[documents, permutations]`.
        threshold: Estimated Jaccard similarity.
    """
    count = len(signatures)
    parent = np.arange(count)

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        keys = keys.view([("", keys.dtype)] * width).ravel()
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the documents
        ranked = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
        for begin, end in itertools.pairwise(starts.tolist()):
            rest = order[begin:end]
            while len(rest) > 1:
                first, others = rest[0], rest[1:]
                near = (signatures[others] == signatures[first]).mean(axis=1) >= threshold
                for other in others[near]:
                    one, two = root(int(first)), root(int(other))
                    parent[max(one, two)] = min(one, two)
                rest = others[~near]
    return parent != np.arange(count)
