"""The sample plan: which window of which domain stands in which slot.

A slot is the place of one sequence in training: step k has slots k*B to (k+1)*B - 1. What stands there is a pure
function of (seed, stage, slot, weights); the number of devices, of micro-batches and of stops has no part in it.

A window is `seq_len` predicted tokens of a domain's training stream. Windows tile the stream, so that an epoch predicts
each token (but the first) exactly once; the last window reaches back to be full, and only its new tokens are predicted.
Each epoch visits the windows in a new order.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, UsageError
from scionlm.data.folder import TokenStream

IGNORE = -100
"""Label of a position that is not predicted."""

_UNIT = 2**32  # weights are whole numbers of this unit, so that the accounting is exact


@dataclass(frozen=True)
class Sample:
    """One sequence: the `draw`-th one taken from `domain`."""

    domain: str
    draw: int


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, both `[sequences, seq_len]`; a label is the id of the next token, or `IGNORE`."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]


def permuted(index: int, length: int, key: str) -> int:
    """Return the image of `index` under a pseudo-random permutation of `range(length)` that `key` names.

    A four-round Feistel network over the next even number of bits, walked until it lands inside: any position is
    reached at once, and nothing the size of the data is stored.

    Source: Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains (cycle walking).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.sha256(key.encode()).digest()
    rounds = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8)]
    while True:
        left, right = index >> half, index & mask
        for salt in rounds:
            mixed = ((right ^ salt) * 0x9E3779B97F4A7C15) & (2**64 - 1)
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
            left, right = right, left ^ ((mixed ^ (mixed >> 32)) & mask)
        index = left << half | right
        if index < length:
            return index


def whole_weights(weights: dict[str, float]) -> dict[str, int]:
    """Return weights as whole numbers that sum to the unit exactly (largest remainders get what is left)."""
    total = sum(weights.values())
    exact = {name: weight / total * _UNIT for name, weight in weights.items()}
    whole = {name: int(value) for name, value in exact.items()}
    rest = _UNIT - sum(whole.values())
    for name in sorted(exact, key=lambda n: whole[n] - exact[n])[:rest]:
        whole[name] += 1
    return whole


class SamplePlan:
    """An endless sequence of samples from weighted domains, and the batches made of them.

    In every prefix of slots the count of a domain differs from the sum of its weights by less than one.

    Source: Tijdeman 1980, The chairman assignment problem: among the domains that are owed enough to be chosen, take
    the one whose share would overflow first.

    Args:
        streams: Name of each domain to its training stream.
        weights: Share of each domain, none negative; they need not sum to one.
        seq_len: Predicted tokens in a sequence.
        seed: Seed of the order.
        stage: Name of the stage of training, part of the order's key.

    Raises:
        UsageError: The weights are not one number for each domain, none negative, not all zero.
        DataError: A domain has fewer tokens than one window.
    """

    def __init__(
        self, streams: dict[str, TokenStream], weights: dict[str, float], seq_len: int, seed: int, stage: str = "main"
    ) -> None:
        for name, stream in streams.items():
            if stream.num_tokens < seq_len + 1:
                raise DataError(
                    f"domain {name!r} has {stream.num_tokens} training tokens, fewer than one window of "
                    f"{seq_len + 1}; lower data.seq_len or add text"
                )
        negative = any(weight < 0 for weight in weights.values())
        if set(weights) != set(streams) or negative or not 0 < sum(weights.values()) < float("inf"):
            raise UsageError(f"mixture {weights} needs a weight for each of {', '.join(streams)}, and no other")
        self._streams = streams
        self._weights = whole_weights(weights)
        self._seq_len = seq_len
        self._key = f"{seed}/{stage}"
        self._slot = 0
        self._counts = dict.fromkeys(streams, 0)

    def num_windows(self, domain: str) -> int:
        """Return the windows in one epoch of a domain."""
        return -(-(self._streams[domain].num_tokens - 1) // self._seq_len)

    def take(self, count: int) -> list[Sample]:
        """Return the samples of the next `count` slots and move on."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Sample:
        self._slot += 1
        # All in units of 1 / (_UNIT * slack): exact integers.
        slack = max(2 * len(self._counts) - 2, 1)
        best: tuple[float, str] | None = None
        for name, weight in self._weights.items():
            owed = (weight * self._slot - self._counts[name] * _UNIT) * slack
            if owed >= _UNIT or len(self._counts) == 1:
                deadline = (_UNIT * (slack - 1) - owed) / weight if weight else float("inf")
                if best is None or deadline < best[0]:
                    best = (deadline, name)
        assert best is not None  # the owed shares sum to one, so one of n is at least 1/n
        name = best[1]
        self._counts[name] += 1
        return Sample(name, self._counts[name] - 1)

    def batch(self, samples: list[Sample]) -> Batch:
        """Return the token ids and labels of some samples."""
        length = self._seq_len
        ids = np.empty((len(samples), length + 1), dtype=np.int64)
        labels = np.empty((len(samples), length), dtype=np.int64)
        for row, sample in enumerate(samples):
            stream = self._streams[sample.domain]
            epoch, position = divmod(sample.draw, self.num_windows(sample.domain))
            window = permuted(position, self.num_windows(sample.domain), f"{self._key}/{sample.domain}/{epoch}")
            start = min(window * length, stream.num_tokens - 1 - length)
            ids[row] = stream.read(start, length + 1)
            labels[row] = ids[row, 1:]
            labels[row, : window * length - start] = IGNORE  # predicted in the window before
        return Batch(ids[:, :-1], labels)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on: the slot and one cursor a domain."""
        return {"slot": self._slot, "counts": dict(self._counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            DataError: The state is of other domains.
        """
        if set(state["counts"]) != set(self._counts):
            raise DataError(f"the checkpoint's domains {sorted(state['counts'])} are not {sorted(self._counts)}")
        self._slot = int(state["slot"])
        self._counts = {name: int(state["counts"][name]) for name in self._counts}

    def epochs(self) -> dict[str, float]:
        """Return how often each domain has been gone through so far."""
        return {name: count / self.num_windows(name) for name, count in self._counts.items()}
