"""The text that a model is analysed on: random windows, the same ones for the same seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.data import DataFolder


@dataclass(frozen=True)
class Sample:
    """Windows of text.

    Attributes:
        ids: `[sequences, seq_len]`; domains take turns, so that the first few sequences hold all of them.
        domains: The domain of each sequence.
    """

    ids: NDArray[np.int64]
    domains: list[str]


def draw_sample(
    data: DataFolder, split: str, domains: Sequence[str] | None, num_sequences: int, seq_len: int, seed: int
) -> Sample:
    """Return windows at random places of a data folder, as many of each domain, as near as can be.

    Args:
        data: The data folder.
        split: `train` or `held_out`.
        domains: Which of its domains; None takes all.
        num_sequences: Windows in all.
        seq_len: Tokens of each.
        seed: Of the places.

    Raises:
        UsageError: A domain is not there.
        DataError: A domain is too short for its share of windows, or holds what is no token.
    """
    names = list(dict.fromkeys(domains or data.domains))[:num_sequences]
    streams = {name: data.stream(name, split) for name in names}
    for index, (name, stream) in enumerate(streams.items()):  # before there is room for all of them
        share = len(range(index, num_sequences, len(names)))
        if stream.num_tokens < seq_len * share:
            raise DataError(
                f"domain {name!r} of {data.path} has {stream.num_tokens:,} {split} tokens, too few for {share} "
                f"sequences of {seq_len}; ask for fewer or shorter ones, or for other domains"
            )
    taken = [names[number % len(names)] for number in range(num_sequences)]
    ids = np.empty((num_sequences, seq_len), dtype=np.int64)
    for index, (name, stream) in enumerate(streams.items()):
        rows = range(index, num_sequences, len(names))
        rng = np.random.default_rng([seed, index])
        starts = rng.choice(stream.num_tokens - seq_len + 1, size=len(rows), replace=False)
        for row, start in zip(rows, starts.tolist(), strict=True):
            ids[row] = stream.read(start, seq_len)
            if ids[row].max() >= data.tokenizer.vocab_size:
                raise DataError(f"domain {name!r} of {data.path} is damaged; prepare the data again")
    return Sample(ids, taken)
