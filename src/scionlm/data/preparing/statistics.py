"""What is in a prepared data folder, in figures and samples: DATA/statistics.json, from which its page is drawn."""

import gzip
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scionlm.data.folder import DataFolder, DocumentRange, TokenStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PERCENTILES = (5, 25, 50, 75, 95, 100)
_LONGEST = 2**20  # longer documents count as this long
_SAMPLE_TOKENS = 160
_GZIP_TOKENS = 2**18


def statistics(
    data: DataFolder, tokenizer: "Tokenizer", facts: dict[str, Any], limits: dict[str, str]
) -> dict[str, Any]:
    """Return the figures of each domain.

    Args:
        data: The folder.
        tokenizer: Its tokenizer.
        facts: What preparing counted in each domain: files, documents read, skipped and left out.
        limits: In words, the limit that cut a domain short, where one did.
    """
    return {name: _domain(data, tokenizer, name, facts[name], limits.get(name)) for name in data.domains}


def _domain(
    data: DataFolder, tokenizer: "Tokenizer", name: str, facts: dict[str, Any], limit: str | None
) -> dict[str, Any]:
    streams = {split: data.stream(name, split) for split in ("train", "held_out")}
    splits = {
        split: {
            "num_tokens": stream.num_tokens,
            "num_documents": stream.num_documents,
            "num_bytes": data.num_bytes(name, split),
        }
        for split, stream in streams.items()
    }
    lengths = sum(_length_counts(stream) for stream in streams.values())
    assert not isinstance(lengths, int)
    train = streams["train"]
    text = _decoded(tokenizer, train, 0, min(train.num_tokens, _GZIP_TOKENS))
    packed = len(gzip.compress(text, mtime=0))
    edges = [2**power for power in range(int(np.flatnonzero(lengths)[-1]).bit_length() + 1)]
    return {
        "num_files": facts["num_files"],
        "documents_read": facts["documents_read"],
        "skipped": facts["skipped"],
        "duplicates": facts["duplicates"],
        "limit": limit,
        **splits,
        "bytes_per_token": sum(s["num_bytes"] for s in splits.values()) / sum(s["num_tokens"] for s in splits.values()),
        "gzip_ratio": len(text) / packed if text else None,
        "token_lengths": {
            "edges": edges,
            "counts": [int(lengths[low:high].sum()) for low, high in itertools.pairwise(edges)],
        },
        "length_percentiles": _percentiles(lengths),
        "samples": [_sample(tokenizer, streams[split], split, share) for split, share in _SAMPLES],
    }


_SAMPLES = (("train", 0.0), ("train", 0.5), ("held_out", 0.0))


def _length_counts(stream: TokenStream) -> NDArray[np.int64]:
    """Return how many documents have each number of tokens, separator included, shard by shard."""
    counts = np.zeros(_LONGEST + 1, dtype=np.int64)
    for ends in stream.shard_document_ends():
        lengths = np.diff(ends, prepend=0)
        counts += np.bincount(np.minimum(lengths, _LONGEST), minlength=_LONGEST + 1)
    return counts


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    reached = np.cumsum(lengths)
    ranks = [max(1, -(-percent * int(reached[-1]) // 100)) for percent in _PERCENTILES]
    return {
        str(percent): int(np.searchsorted(reached, rank)) for percent, rank in zip(_PERCENTILES, ranks, strict=True)
    }


def _decoded(tokenizer: "Tokenizer", stream: TokenStream, start: int, length: int) -> bytes:
    return tokenizer.decode(stream.read(start, length).tolist()).encode(errors="replace")


def _sample(tokenizer: "Tokenizer", stream: TokenStream, split: str, share: float) -> dict[str, Any]:
    """Return the beginning of the document at a share of the way through a split."""
    document = _nth(stream, int(share * (stream.num_documents - 1)))
    length = document.end - document.start
    shown = _decoded(tokenizer, stream, document.start, min(length, _SAMPLE_TOKENS)).decode()
    return {
        "split": split,
        "num_tokens": length,
        "num_bytes": document.num_bytes,
        "text": shown + ("…" if length > _SAMPLE_TOKENS else ""),
    }


def _nth(stream: TokenStream, number: int) -> DocumentRange:
    return next(document for i, document in enumerate(stream.documents()) if i == number)
