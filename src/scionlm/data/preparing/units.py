"""The second pass: the documents of a part are tokenized and written as shards, one unit of text after another.

A finished unit is a shard for each split and an entry in the part's list; a run that was stopped goes on after the last
entry. Where units are cut depends on the text alone.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, StoppedError
from scionlm.core.log import Progress
from scionlm.core.machine import usable_cores
from scionlm.core.records import read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data.preparing.fates import HELD_OUT, TRAIN, read_fates
from scionlm.data.preparing.job import UNIT_BYTES, Job, Part
from scionlm.data.preparing.survey import place_of, read_survey
from scionlm.data.shards import Shard, TokenizerInfo, write_shard

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK_BYTES = 2**19  # text handed to a thread at once
_KIND = "units.json"


@dataclass
class _Chunk:
    """Documents that are tokenized together.

    Attributes:
        texts: Their texts.
        sizes: UTF-8 bytes of each.
        fates: Which are held out.
        num_read: Documents read for it, those left out included.
        num_bytes: Text read for it.
        ends_unit: Whether it is the last of its unit.
    """

    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    fates: list[int] = field(default_factory=list)
    num_read: int = 0
    num_bytes: int = 0
    ends_unit: bool = False


@dataclass(frozen=True)
class Tokenizing:
    """What tokenizes: the tokenizer, what is known of it, and how many threads use it."""

    tokenizer: "Tokenizer"
    info: TokenizerInfo
    workers: int | None


def units_of(part: Part) -> list[dict[str, Any]]:
    """Return the entries of the units of a part that are finished."""
    path = part.path(_KIND)
    return read_json(path)["units"] if path.exists() else []


def is_tokenized(part: Part) -> bool:
    """Return whether every unit of a part is finished."""
    path = part.path(_KIND)
    return path.exists() and read_json(path)["complete"]


def tokenize_part(job: Job, part: Part, tokenizing: Tokenizing, stop: StopRequest, room: int) -> None:
    """Tokenize and write the units of a part that are not finished yet.

    Args:
        job: The job.
        part: The part.
        tokenizing: What tokenizes.
        stop: Asked between units.
        room: Training tokens that a limit has room for: what comes after them is not tokenized, or not all of it.

    Raises:
        DataError: The text has changed since the survey, or a finished shard is damaged.
        StoppedError: A signal came; what is finished is kept.
    """
    units = units_of(part)
    for unit in units:
        for entry in unit["shards"].values():
            Shard(part.folder / part.domain / entry["file"]).verify()
    fates = read_fates(part)
    sizes = read_survey(part).sizes[: len(fates)]
    total = int(sizes.sum())
    done = sum(unit["num_read"] for unit in units)
    unit = _Unit(part, len(units), tokenizing.info)
    size = int(sizes[:done].sum())
    left = _Room(room - sum(u["shards"]["train"]["num_tokens"] for u in units if "train" in u["shards"]))
    with Progress(f"tokenizing {part.name}", total, size) as progress, _threads_of_our_own():
        for chunk, ids in _tokenized(_chunks(job, part, fates, done, left), tokenizing):
            left.tokens -= unit.add(chunk, ids)
            size += chunk.num_bytes
            progress.update(size, f"{size / 1e6:.0f} of {total / 1e6:.0f} MB")
            if chunk.ends_unit:
                units.append(unit.write())
                write_json(part.path(_KIND), {"units": units, "complete": False})
                unit = _Unit(part, len(units), tokenizing.info)
                if stop.requested:
                    where = f"{size / 1e6:.0f} of {total / 1e6:.0f} MB of {part.name}"
                    raise StoppedError(f"stopped after {where}; what is finished is kept, run it again to go on")
    if unit.num_read:
        units.append(unit.write())
    write_json(part.path(_KIND), {"units": units, "complete": True})


@contextmanager
def _threads_of_our_own() -> Generator[None, None, None]:
    """Keep the library's own threads out of the way, and leave the environment as it was.

    One thread a core, each on its own chunk, keeps the cores fuller than the library's threads inside a batch.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@dataclass
class _Room:
    """How many training tokens there is room for."""

    tokens: int


def _chunks(job: Job, part: Part, fates: NDArray[np.uint8], skip: int, room: _Room) -> Iterator[_Chunk]:
    """Yield the documents after the first `skip` in chunks; a chunk never crosses the end of a unit."""
    changed = DataError(f"{part.files[0].name}: the text has changed while it was prepared; prepare it again")
    survey = read_survey(part)
    chunk, in_unit, in_chunk, number = _Chunk(), 0, 0, 0
    is_whole = survey.is_whole and len(fates) == len(survey.places)  # else a limit, beyond which nothing is read
    documents = islice(job.reader(part, quiet=True).read(part.files), None if is_whole else len(fates))
    for number, document in enumerate(documents, start=1):
        if number > len(fates):
            break  # text that was added
        data = document.text.encode()
        if place_of(data) != survey.places[number - 1]:
            raise changed
        if number <= skip:
            continue
        chunk.num_read += 1
        if fates[number - 1] not in (TRAIN, HELD_OUT):
            continue
        # Where units end must not depend on when it is noticed that there is no more room.
        in_unit, in_chunk = in_unit + len(data), in_chunk + len(data)
        chunk.num_bytes += len(data)
        if fates[number - 1] == HELD_OUT or room.tokens >= 0:
            chunk.texts.append(document.text)
            chunk.sizes.append(len(data))
            chunk.fates.append(int(fates[number - 1]))
        if in_chunk >= CHUNK_BYTES or in_unit >= UNIT_BYTES:
            chunk.ends_unit = in_unit >= UNIT_BYTES
            yield chunk
            in_unit = 0 if chunk.ends_unit else in_unit
            chunk, in_chunk = _Chunk(), 0
    if number != len(fates):
        raise changed
    if chunk.num_read:
        yield chunk


def _tokenized(chunks: Iterator[_Chunk], tokenizing: Tokenizing) -> Iterator[tuple[_Chunk, list[NDArray[Any]]]]:
    """Yield each chunk with the token ids of its documents, in order, a few chunks ahead in threads.

    The tokenizer lets go of the interpreter while it works, so that threads use all cores, and one chunk's conversion
    to an array runs beside the next one's tokenization.
    """
    workers = tokenizing.workers or usable_cores()

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        encodings = tokenizing.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[_Chunk, Future[list[NDArray[Any]]]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(encode, chunk.texts)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _Unit:
    """The documents of a unit, as they come in."""

    def __init__(self, part: Part, number: int, info: TokenizerInfo) -> None:
        self._part, self._number, self._info = part, number, info
        self._splits: dict[str, tuple[list[NDArray[Any]], list[int]]] = {"train": ([], []), "held_out": ([], [])}
        self.num_read = 0

    def add(self, chunk: _Chunk, ids: list[NDArray[Any]]) -> int:
        """Add a chunk's documents; return the training tokens among them, separators not counted."""
        self.num_read += chunk.num_read
        for tokens, size, fate in zip(ids, chunk.sizes, chunk.fates, strict=True):
            documents, sizes = self._splits["held_out" if fate == HELD_OUT else "train"]
            documents.append(tokens)
            sizes.append(size)
        return sum(len(tokens) for tokens, fate in zip(ids, chunk.fates, strict=True) if fate == TRAIN)

    def write(self) -> dict[str, Any]:
        """Write a shard for each split that has documents, and return the unit's entry."""
        folder, name = self._part.folder / self._part.domain, f"{self._part.number:05d}-{self._number:05d}"
        shards = {
            split: write_shard(folder / f"{split}-{name}.safetensors", documents, sizes, self._info)
            for split, (documents, sizes) in self._splits.items()
            if documents
        }
        return {"num_read": self.num_read, "shards": shards}
