"""One shard: a safetensors file with the tokens of some documents.

    tokens            uint16 or uint32   the documents one after another, a separator after each (and a BOS before,
                                         where the header names one)
    document_ends     int64              where each document ends in `tokens`, its separator included
    document_bytes    int64              UTF-8 bytes of each document's text
    header            one JSON object under the metadata key `scion`: format version, tokenizer, separator, sha256

Any safetensors reader opens it; the tokens are raw and aligned, so a memory map reads them.
"""

import hashlib
import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from scionlm.core.errors import DataError
from scionlm.core.files import storage_error, write_bytes_atomic
from scionlm.core.records import FORMAT_VERSION, check_version
from scionlm.core.tensors import TensorEntry, read_header

_ADVICE = "prepare the data again"
_DTYPES: dict[str, Any] = {"U16": np.uint16, "U32": np.uint32, "I64": np.int64}


def token_dtype(vocab_size: int) -> "type[np.uint16] | type[np.uint32]":
    """Return the smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer behind a data folder, as each shard's header states it.

    Attributes:
        name: The MODEL it came from.
        sha256: Hash of `tokenizer.json`.
        vocab_size: Number of ids.
        separator: Text of the token after each document.
        separator_id: Its id.
        prefix_id: Token that stands before a document scored on its own (lm-eval's rule: BOS, else EOS).
        bos: Text of the token before each document; None where there is none.
        bos_id: Its id.
    """

    name: str
    sha256: str
    vocab_size: int
    separator: str
    separator_id: int
    prefix_id: int
    bos: str | None = None
    bos_id: int | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "TokenizerInfo":
        """Return what `to_dict` wrote.

        Raises:
            KeyError: A field is missing.
        """
        required = [field.name for field in fields(cls) if field.default is MISSING]
        return cls(**{name: record[name] for name in required}, bos=record.get("bos"), bos_id=record.get("bos_id"))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with the policy on special tokens in words."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "dtype": np.dtype(token_dtype(self.vocab_size)).name,
            "bos": self.bos,
            "bos_id": self.bos_id,
            "separator": self.separator,
            "separator_id": self.separator_id,
            "separator_position": "after each document",
            "prefix_id": self.prefix_id,
        }


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_shard(
    path: Path, documents: list[NDArray[Any]], sizes: list[int], tokenizer: TokenizerInfo
) -> dict[str, Any]:
    """Write one shard and return its entry for the index.

    Args:
        path: Where it goes.
        documents: Token ids of each document, without BOS and separator.
        sizes: UTF-8 bytes of each document's text.
        tokenizer: What made the ids.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    before = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=dtype)
    after = np.array([tokenizer.separator_id], dtype=dtype)
    tokens = np.concatenate([part for ids in documents for part in (before, ids.astype(dtype, copy=False), after)])
    ends = np.cumsum([len(before) + len(ids) + 1 for ids in documents], dtype=np.int64)
    byte_counts = np.array(sizes, dtype=np.int64)
    header = {
        "format_version": FORMAT_VERSION,
        "dtype": np.dtype(dtype).name,
        "num_tokens": len(tokens),
        "num_documents": len(documents),
        "num_bytes": int(sum(sizes)),
        "sha256": _digest(tokens, ends, byte_counts),
        "tokenizer": tokenizer.to_dict(),
    }
    tensors = {"tokens": tokens, "document_ends": ends, "document_bytes": byte_counts}
    # One metadata key, because safetensors writes several in no fixed order and shards must be equal to the byte.
    write_bytes_atomic(path, safetensors.numpy.save(tensors, {"scion": json.dumps(header, sort_keys=True)}))
    return {key: header[key] for key in ("num_tokens", "num_documents", "num_bytes", "sha256")} | {"file": path.name}


class Shard:
    """A shard, memory-mapped.

    Raises:
        DataError: The file is not a shard, is cut short, or is of a newer format; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors, metadata = read_header(path, _ADVICE)
        broken = DataError(f"{path} is not a token shard; {_ADVICE}")
        try:
            self.header: dict[str, Any] = check_version(json.loads(metadata["scion"]), path)
            self._whole = np.memmap(path, mode="r")  # once: each map holds the file open, and there are many shards
            self.tokens = self._part(tensors["tokens"])
            self.document_ends = self._part(tensors["document_ends"])
            self.document_bytes = self._part(tensors["document_bytes"])
            sound = (
                isinstance(self.header["sha256"], str)
                and isinstance(self.header["tokenizer"]["sha256"], str)
                and isinstance(self.header["tokenizer"]["vocab_size"], int)
                and self.tokens.ndim == self.document_ends.ndim == 1
                and self.document_ends.shape == self.document_bytes.shape
                and len(self.tokens) == self.header["num_tokens"] == self.document_ends[-1]
                and self.tokens.dtype.name == self.header["dtype"]
            )
        except OSError as error:
            raise storage_error(error, path) from error
        except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
            raise broken from error
        if not sound:
            raise broken

    def _part(self, entry: TensorEntry) -> NDArray[Any]:
        count = math.prod(entry.shape)
        return np.frombuffer(self._whole, _DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)

    def verify(self) -> None:
        """Check everything in the shard against the hash in its header, and that every id is one of the tokenizer's.

        Raises:
            DataError: They differ, or an id is beyond the vocabulary.
        """
        if _digest(self.tokens, self.document_ends, self.document_bytes) != self.header["sha256"]:
            raise DataError(f"{self.path} does not match its sha256: the file is damaged; {_ADVICE}")
        largest, size = int(self.tokens.max()), int(self.header["tokenizer"]["vocab_size"])
        if largest >= size:
            raise DataError(f"{self.path} holds the token id {largest}, its tokenizer has {size}; {_ADVICE}")
