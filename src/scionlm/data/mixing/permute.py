"""A pseudo-random order of any length that needs no memory: a keyed permutation of `range(length)`.

Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (cycle walking).
"""

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_HIGH, _MIDDLE = np.uint64(32), np.uint64(29)


@functools.lru_cache(maxsize=2**12)
def _rounds(key: str) -> NDArray[np.uint64]:
    return np.frombuffer(hashlib.sha256(key.encode()).digest(), dtype="<u8")


def permuted(indices: NDArray[np.int64], lengths: NDArray[np.int64], keys: list[str]) -> NDArray[np.int64]:
    """Return the image of each index under the pseudo-random permutation of `range(length)` that its key names.

    A four-round Feistel network over the next even number of bits, walked until it lands inside: any position is
    reached at once, and nothing the size of the data is stored.

    Args:
        indices: From 0 to below the length, `[n]`.
        lengths: `[n]`.
        keys: `n` of them.
    """
    names = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    table = np.array([_rounds(key) for key in names], dtype=np.uint64).reshape(-1, 4)
    salts = table[[names[key] for key in keys]].T  # [rounds, n]
    sizes: dict[int, int] = {}
    for length in np.unique(lengths).tolist():
        sizes[length] = max(1, ((length - 1).bit_length() + 1) // 2)
    half = np.array([sizes[length] for length in lengths.tolist()], dtype=np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    ends = lengths.astype(np.uint64)
    out = indices.astype(np.uint64)
    outside = np.arange(len(out))
    result = np.empty_like(out)
    while len(outside):
        left, right = out >> half, out & mask
        for salt in salts:
            mixed = (right ^ salt) * _FIRST  # modulo 2**64, as integers of this size do
            mixed = (mixed ^ (mixed >> _MIDDLE)) * _SECOND
            left, right = right, left ^ ((mixed ^ (mixed >> _HIGH)) & mask)
        walked = left << half | right
        result[outside] = walked
        still = walked >= ends
        if not still.any():
            break
        outside = outside[still]
        out, half, mask, ends, salts = walked[still], half[still], mask[still], ends[still], salts[:, still]
    return result.astype(np.int64)
