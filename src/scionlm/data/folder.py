"""A prepared data folder, and the token stream of one split of one domain."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import is_safe_name
from scionlm.core.records import read_json
from scionlm.data.shards import Shard, TokenizerInfo

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class DocumentRange:
    """Where a document stands in its stream: tokens `[start, end)` without the separator, and its UTF-8 bytes."""

    start: int
    end: int
    num_bytes: int


class TokenStream:
    """The shards of one split as a single sequence of tokens."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0] + [len(shard.tokens) for shard in shards])
        self.num_tokens = int(self._starts[-1])
        self.num_documents = sum(len(shard.document_ends) for shard in shards)

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return `length` tokens from position `start`; the range must lie inside the stream."""
        assert start >= 0
        assert start + length <= self.num_tokens, (start, length, self.num_tokens)
        out = np.empty(length, dtype=np.int64)
        filled = 0
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < length:
            offset = start + filled - int(self._starts[index])
            piece = self._shards[index].tokens[offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1
        return out

    def documents(self) -> Iterator[DocumentRange]:
        """Yield every document in order."""
        for base, shard in zip(self._starts, self._shards, strict=False):
            start = int(base)
            for end, num_bytes in zip(shard.document_ends, shard.document_bytes, strict=True):
                yield DocumentRange(start, int(base) + int(end) - 1, int(num_bytes))
                start = int(base) + int(end)


class DataFolder:
    """What `scion prepare` wrote: `index.json` and one folder a domain.

    Raises:
        UsageError: There is no such folder.
        DataError: The folder is unfinished or a shard is broken, missing, or from another tokenizer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UsageError(f"data folder {path} does not exist; make it with: scion prepare CORPORA.yaml -o {path}")
        if not (path / "index.json").exists():
            raise DataError(f"{path} has no index.json: not a data folder, or scion prepare has not finished")
        self.index = read_json(path / "index.json")
        fields = TokenizerInfo.__dataclass_fields__
        try:
            self.tokenizer = TokenizerInfo(**{key: self.index["tokenizer"][key] for key in fields})
            self._domains: dict[str, Any] = self.index["domains"]
            for name, splits in self._domains.items():
                for split in SPLITS:
                    if not isinstance(splits[split]["num_tokens"] + splits[split]["num_bytes"], int):
                        raise TypeError("a whole number")
                    for shard in splits[split]["shards"]:
                        if not (
                            is_safe_name(name) and is_safe_name(shard["file"]) and isinstance(shard["sha256"], str)
                        ):
                            raise ValueError(f"a name that stays inside ({shard['file']!r})")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path / 'index.json'} is broken: it lacks {error}; prepare the data again") from error

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return list(self._domains)

    @property
    def fingerprint(self) -> str:
        """A hash of every token in the folder and of the tokenizer that made them."""
        digest = hashlib.sha256(self.tokenizer.sha256.encode())
        for name, splits in sorted(self._domains.items()):
            for split in SPLITS:
                for shard in splits[split]["shards"]:
                    digest.update(f"{name}/{split}/{shard['sha256']}\n".encode())
        return digest.hexdigest()

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's own files."""
        return self.path / "tokenizer"

    def stream(self, domain: str, split: str, verify: bool = False) -> TokenStream:
        """Open one split of one domain.

        Raises:
            UsageError: There is no such domain.
            DataError: A shard is missing, broken, or not the one that the index lists.
        """
        if domain not in self._domains:
            known = ", ".join(self.domains)
            raise UsageError(f"domain {domain!r} is not in {self.path}{nearest(domain, self.domains)} (has: {known})")
        shards: list[Shard] = []
        for entry in self._domains[domain][split]["shards"]:
            shard = Shard(self.path / domain / entry["file"])
            if shard.header["tokenizer"]["sha256"] != self.tokenizer.sha256:
                raise DataError(f"{shard.path} was made with another tokenizer than {self.path / 'index.json'} names")
            if shard.header["sha256"] != entry["sha256"]:
                raise DataError(f"{shard.path} is not the shard that index.json lists; prepare the data again")
            if verify:
                shard.verify()
            shards.append(shard)
        return TokenStream(shards)

    def num_bytes(self, domain: str, split: str) -> int:
        """Return the UTF-8 bytes of the documents in one split."""
        return int(self._domains[domain][split]["num_bytes"])

    def num_tokens(self, domain: str, split: str) -> int:
        """Return the tokens in one split, separators included."""
        return int(self._domains[domain][split]["num_tokens"])
