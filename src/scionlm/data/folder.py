"""A prepared data folder, and the token stream of one split of one domain."""

import bisect
import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.config import nearest
from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import is_safe_name
from scionlm.core.records import Record, read_json
from scionlm.data.shards import Shard, TokenizerInfo

SPLITS = ("train", "held_out")
_MANY_SHARDS = 200


@dataclass(frozen=True)
class DocumentRange:
    """Where a document's text stands in its stream: tokens `[start, end)` without BOS and separator; UTF-8 bytes."""

    start: int
    end: int
    num_bytes: int


def _allow_open_files() -> None:
    """Let this process hold as many files open as the system allows it: of many shards each is one."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems call a limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class TokenStream:
    """The shards of one split as a single sequence of tokens."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        # Plain arrays over the memory maps: slicing a `memmap` costs more than copying a window.
        self._tokens = [np.asarray(shard.tokens) for shard in shards]
        self._begins: list[int] = np.cumsum([0] + [len(tokens) for tokens in self._tokens]).tolist()
        self.num_tokens = self._begins[-1]
        self.num_documents = sum(len(shard.document_ends) for shard in shards)
        special = shards[0].header["tokenizer"] if shards else {}
        self.separator_id: int = special.get("separator_id", -1)
        """The token after each document."""
        self.bos_id: int | None = special.get("bos_id")
        """The token before each document, if there is one."""

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Return `length` tokens from position `start`; the range must lie inside the stream."""
        out = np.empty(length, dtype=np.int64)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with tokens from position `start` on; the range must lie inside the stream."""
        length = len(out)
        assert start >= 0
        assert start + length <= self.num_tokens, (start, length, self.num_tokens)
        index = bisect.bisect_right(self._begins, start) - 1
        filled = 0
        while filled < length:
            offset = start + filled - self._begins[index]
            piece = self._tokens[index][offset : offset + length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            index += 1

    def read_rows(self, starts: list[int], rows: list[int], out: NDArray[np.int64]) -> None:
        """Fill rows of `out`, `[rows, length]`, with the tokens from each start on."""
        length, begins = out.shape[1], self._begins
        for row, start in zip(rows, starts, strict=True):
            shard = bisect.bisect_right(begins, start) - 1
            offset = start - begins[shard]
            piece = self._tokens[shard][offset : offset + length]
            if len(piece) == length:
                out[row] = piece
            else:  # it runs on into the next shard
                self.read_into(start, out[row])

    def before(self, position: int) -> int:
        """Return the token before a position; before the first stands a separator."""
        return int(self.read(position - 1, 1)[0]) if position else self.separator_id

    @functools.cached_property
    def document_ends(self) -> NDArray[np.int64]:
        """Where each document ends in the stream, its separator included; 8 bytes a document."""
        parts = zip(self._begins, self._shards, strict=False)
        return np.concatenate([base + shard.document_ends for base, shard in parts])

    @functools.cached_property
    def context_starts(self) -> NDArray[np.int64]:
        """Tokens that open the context of a document: its BOS, or else the separator before it."""
        begins = self.document_ends[:-1]
        return begins if self.bos_id is not None else begins - 1

    def shard_document_ends(self) -> Iterator[NDArray[np.int64]]:
        """Yield, for one shard after another, where its documents end in it."""
        yield from (shard.document_ends for shard in self._shards)

    def documents(self) -> Iterator[DocumentRange]:
        """Yield every document in order."""
        opening = 0 if self.bos_id is None else 1
        for base, shard in zip(self._begins, self._shards, strict=False):
            start = base
            for end, num_bytes in zip(shard.document_ends, shard.document_bytes, strict=True):
                yield DocumentRange(start + opening, base + int(end) - 1, int(num_bytes))
                start = base + int(end)


class DataFolder:
    """What `scion prepare` wrote: `index.json` and one folder a domain.

    Args:
        path: The folder.
        index: What its index.json holds; None reads it.

    Raises:
        UsageError: There is no such folder.
        DataError: The folder is unfinished or a shard is broken, missing, or from another tokenizer.
    """

    def __init__(self, path: Path, index: Record | None = None) -> None:
        self.path = path
        if not path.is_dir():
            raise UsageError(f"data folder {path} does not exist; make it with: scion prepare CORPORA.yaml -o {path}")
        if index is None and not (path / "index.json").exists():
            raise DataError(f"{path} has no index.json: not a data folder, or scion prepare has not finished")
        self.index = read_json(path / "index.json") if index is None else index
        try:
            self.tokenizer = TokenizerInfo.from_dict(self.index["tokenizer"])
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
        if sum(len(splits[split]["shards"]) for splits in self._domains.values() for split in SPLITS) > _MANY_SHARDS:
            _allow_open_files()

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

    def hub_datasets(self, domain: str) -> list[str]:
        """Return the data sets of the hub, as ORG/NAME, that the text of a domain comes from."""
        return list(self.index.get("hub_datasets", {}).get(domain, []))

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's own files."""
        return self.path / "tokenizer"

    def require(self, names: Iterable[str], asked: str, way_out: str = "") -> None:
        """Refuse domains that are not here.

        Args:
            names: What is asked for.
            asked: What asks, as it stands in the message: `replay.domains:`.
            way_out: What else could be asked for.

        Raises:
            UsageError: One is not here; the message has those that are.
        """
        for name in names:
            if name not in self._domains:
                known = ", ".join(self.domains)
                raise UsageError(
                    f"{asked} {name!r} is not in {self.path}{nearest(name, self.domains)} (has: {known}){way_out}"
                )

    def stream(self, domain: str, split: str, verify: bool = False) -> TokenStream:
        """Open one split of one domain.

        Raises:
            UsageError: There is no such domain.
            DataError: A shard is missing, broken, or not the one that the index lists.
        """
        self.require([domain], "domain")
        shards: list[Shard] = []
        for entry in self._domains[domain][split]["shards"]:
            shard = Shard(self.path / domain / entry["file"])
            if shard.header["tokenizer"]["sha256"] != self.tokenizer.sha256:
                raise DataError(f"{shard.path} was made with another tokenizer than {self.path / 'index.json'} names")
            theirs = [shard.header["tokenizer"].get(key) for key in ("separator_id", "bos_id")]
            if theirs != [self.tokenizer.separator_id, self.tokenizer.bos_id]:
                raise DataError(f"{shard.path} has another separator or BOS than {self.path / 'index.json'} names")
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
