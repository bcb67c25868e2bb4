"""`scion prepare`: files of text become token shards, split by document, resumable at any kill.

Two passes. The survey reads every document once, so that a fault in the last file is found before hours are spent, and
settles which documents are held out: those whose text hashes lowest, so that equal texts always fall on one side. Then
the text is tokenized in units of a fixed size; a finished unit is a shard for each split and an entry in the ledger,
and a run that was stopped goes on after the last entry. Bytes do not depend on the number of workers or of stops.
"""

import hashlib
import heapq
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, StoppedError, UsageError
from scionlm.core.files import folder_lock, require_free_folder, storage_error
from scionlm.core.log import Progress, say
from scionlm.core.machine import usable_cores
from scionlm.core.records import read_json, write_json
from scionlm.core.signals import StopRequest
from scionlm.data.reading.corpora import Corpora, DomainConfig
from scionlm.data.reading.documents import find_files, read_documents
from scionlm.data.shards import Shard, TokenizerInfo, write_shard
from scionlm.data.tokenizer import copy_tokenizer, tokenizer_info
from scionlm.sources import load_tokenizer, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNIT_BYTES = 32 * 2**20  # text a shard is made of; also what a kill can cost
CHUNK_BYTES = 2**19  # text handed to a worker at once
_LEDGER = "prepare.json"
_EXACT_DOCUMENTS = 10_000  # up to so many the split is settled by counting, beyond by the law of large numbers


@dataclass(frozen=True)
class Survey:
    """What the first pass found in one domain."""

    files: list[Path]
    num_documents: int
    num_bytes: int
    threshold: int
    digest: str


def prepare(corpora: Corpora, root: Path, out: Path, workers: int | None = None) -> dict[str, Any]:
    """Make the data folder `out` and return its index.

    Args:
        corpora: What to read.
        root: Folder that relative paths start from.
        out: The data folder: absent, empty, or an unfinished one of the same corpora.
        workers: Threads that tokenize; None takes all cores. The result does not depend on it.

    Raises:
        UsageError: `out` holds something else.
        DataError: A file is broken or a domain is empty.
        StorageError: The disk is full or not writable.
        StoppedError: A signal came; what is finished is kept.
    """
    if not (out / _LEDGER).exists():
        require_free_folder(out)
    beside = root / corpora.tokenizer
    source = resolve(str(beside) if beside.exists() else corpora.tokenizer)
    tokenizer = load_tokenizer(source.path)
    info = tokenizer_info(tokenizer, source, corpora.separator)
    surveys = {name: _survey(name, domain, root, corpora) for name, domain in corpora.domains.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, out) from error
    with folder_lock(out):
        units = _open_ledger(out, _identity(info, surveys))
        if (out / "index.json").exists():
            say(f"{out} is prepared already; nothing to do")
            return read_json(out / "index.json")
        total = sum(survey.num_bytes for survey in surveys.values())
        done = sum(unit["num_bytes"] for finished in units["units"].values() for unit in finished)
        with Progress("tokenizing", total, done) as progress, StopRequest() as stop:
            for name, survey in surveys.items():
                finished = units["units"].setdefault(name, [])
                for unit in _units(survey, corpora.domains[name], out / name, finished, (tokenizer, info), workers):
                    finished.append(unit)
                    write_json(out / _LEDGER, units)
                    done += unit["num_bytes"]
                    progress.update(done, f"{name}  {done / 1e6:.0f} of {total / 1e6:.0f} MB")
                    if stop.requested:
                        raise StoppedError(
                            f"stopped, {done / 1e6:.0f} of {total / 1e6:.0f} MB are done; run it again to go on"
                        )
        copy_tokenizer(source, out / "tokenizer")
        domains = {name: _totals(units["units"][name]) for name in surveys}
        write_json(out / "index.json", {"tokenizer": info.to_dict(), "domains": domains})
        return read_json(out / "index.json")


def _open_ledger(out: Path, identity: str) -> dict[str, Any]:
    """Return the ledger of finished units, a new one where there is none.

    Raises:
        UsageError: It is of other corpora.
        DataError: It is broken.
    """
    if not (out / _LEDGER).exists():
        write_json(out / _LEDGER, {"identity": identity, "units": {}})
    ledger = read_json(out / _LEDGER)
    if not isinstance(ledger.get("units"), dict) or not isinstance(ledger.get("identity"), str):
        raise DataError(f"{out / _LEDGER} is broken; remove {out} and prepare the data again")
    if ledger["identity"] != identity:
        raise UsageError(
            f"{out} holds data of other corpora, settings or tokenizer; choose another folder or remove it"
        )
    return ledger


def _identity(info: TokenizerInfo, surveys: dict[str, Survey]) -> str:
    """Return a hash of all that decides the bytes of the result."""
    facts = info.to_dict() | {"name": None}  # the same tokenizer by another path is the same
    digest = hashlib.sha256(f"{facts} {UNIT_BYTES}".encode())
    for name, survey in surveys.items():
        digest.update(f"{name} {survey.digest} {survey.threshold}\n".encode())
    return digest.hexdigest()


def _place(text_bytes: bytes) -> int:
    """Return where a document falls between 0 and 2**64, by its text alone."""
    return int.from_bytes(hashlib.blake2b(text_bytes, digest_size=8).digest(), "big")


def _survey(name: str, domain: DomainConfig, root: Path, corpora: Corpora) -> Survey:
    files = find_files(domain, root, name)
    held_out = corpora.held_out
    share = int(min(held_out.fraction, 0.5) * 2**64)
    lowest: list[int] = []  # a heap of the negated lowest places; all of them in a small domain
    limit = max(held_out.min_documents, _EXACT_DOCUMENTS)
    digest = hashlib.sha256()
    count = size = below = 0
    with Progress(f"reading {name}", sum(file.stat().st_size for file in files)) as progress:
        shown = 0
        for document in read_documents(files, domain.text_key):
            data = document.text.encode()
            place = _place(data)
            digest.update(place.to_bytes(8, "big"))
            count, size, below = count + 1, size + len(data), below + (place < share)
            if len(lowest) < limit:
                heapq.heappush(lowest, -place)
            elif -place > lowest[0]:
                heapq.heapreplace(lowest, -place)
            if size - shown > 2**24:
                shown = size
                progress.update(0, f"{size / 1e6:.0f} MB of text")
    if count == 0:
        raise DataError(f"domains.{name}: the {len(files)} file(s) hold no text")
    ranked = sorted(-place for place in lowest)
    if ranked[0] == ranked[-1]:
        what = "one document only" if count == 1 else "all documents have the same text"
        raise DataError(f"domains.{name}: {what}; a split by document into training and held out needs two")
    threshold = max(share, ranked[min(held_out.min_documents, count // 2) - 1] + 1)
    if count <= limit:
        # At most half of the documents; where equal texts leave no such cut, the lowest text alone.
        threshold = min(threshold, ranked[count // 2])
        threshold = max(
            threshold, next(place for place in ranked if place > ranked[0]) if threshold == ranked[0] else 0
        )
    elif below > count // 2:
        raise DataError(f"domains.{name}: most documents have the same few texts; remove the repeated ones first")
    return Survey(files, count, size, threshold, digest.hexdigest())


@dataclass
class _Chunk:
    """Documents that are tokenized together; `split` says which of them are held out."""

    texts: list[str]
    sizes: list[int]
    held_out: list[bool]


def _chunks(survey: Survey, domain: DomainConfig, skip: int) -> Iterator[_Chunk]:
    """Yield the documents after the first `skip` in chunks; a chunk never crosses the end of a unit."""
    chunk = _Chunk([], [], [])
    in_unit = in_chunk = 0
    digest = hashlib.sha256()
    for number, document in enumerate(read_documents(survey.files, domain.text_key)):
        data = document.text.encode()
        place = _place(data)
        digest.update(place.to_bytes(8, "big"))
        if number < skip:
            continue
        chunk.texts.append(document.text)
        chunk.sizes.append(len(data))
        chunk.held_out.append(place < survey.threshold)
        in_unit, in_chunk = in_unit + len(data), in_chunk + len(data)
        if in_chunk >= CHUNK_BYTES or in_unit >= UNIT_BYTES:
            yield chunk
            chunk, in_chunk = _Chunk([], [], []), 0
            in_unit = 0 if in_unit >= UNIT_BYTES else in_unit
    if digest.hexdigest() != survey.digest:
        raise DataError(f"{survey.files[0].parent}: the text has changed while it was prepared; prepare it again")
    if chunk.texts:
        yield chunk


def _tokenized(
    chunks: Iterator[_Chunk], tokenizer: "Tokenizer", workers: int
) -> Iterator[tuple[_Chunk, list[NDArray[Any]]]]:
    """Yield each chunk with the token ids of its documents, in order, a few chunks ahead in threads.

    The tokenizer lets go of the interpreter while it works, so that threads use all cores, and one chunk's conversion
    to an array runs beside the next one's tokenization.
    """

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
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


def _units(
    survey: Survey,
    domain: DomainConfig,
    folder: Path,
    finished: list[dict[str, Any]],
    tokenizer_and_info: tuple["Tokenizer", TokenizerInfo],
    workers: int | None,
) -> Iterator[dict[str, Any]]:
    """Tokenize and write the units that are not finished yet; yield each one's ledger entry."""
    tokenizer, info = tokenizer_and_info
    for unit in finished:
        for entry in unit["shards"].values():
            Shard(folder / entry["file"]).verify()
    number = len(finished)
    skip = sum(unit["num_documents"] for unit in finished)
    if skip == survey.num_documents:
        return
    # One thread a core, each on its own chunk, keeps the cores fuller than the library's own threads inside a batch.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = workers or usable_cores()
    parts: dict[str, tuple[list[NDArray[Any]], list[int]]] = {"train": ([], []), "held_out": ([], [])}
    size = 0
    for chunk, ids in _tokenized(_chunks(survey, domain, skip), tokenizer, workers):
        for tokens, num_bytes, held_out in zip(ids, chunk.sizes, chunk.held_out, strict=True):
            documents, sizes = parts["held_out" if held_out else "train"]
            documents.append(tokens)
            sizes.append(num_bytes)
        size += sum(chunk.sizes)
        if size >= UNIT_BYTES:
            yield _write_unit(folder, number, parts, info)
            number, size = number + 1, 0
            parts = {"train": ([], []), "held_out": ([], [])}
    if size:
        yield _write_unit(folder, number, parts, info)


def _write_unit(
    folder: Path, number: int, parts: dict[str, tuple[list[NDArray[Any]], list[int]]], info: TokenizerInfo
) -> dict[str, Any]:
    shards = {
        split: write_shard(folder / f"{split}-{number:05d}.safetensors", documents, sizes, info)
        for split, (documents, sizes) in parts.items()
        if documents
    }
    return {
        "num_documents": sum(entry["num_documents"] for entry in shards.values()),
        "num_bytes": sum(entry["num_bytes"] for entry in shards.values()),
        "shards": shards,
    }


def _totals(units: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for split in ("train", "held_out"):
        shards = [unit["shards"][split] for unit in units if split in unit["shards"]]
        sums = {key: sum(shard[key] for shard in shards) for key in ("num_tokens", "num_documents", "num_bytes")}
        result[split] = sums | {"shards": shards}
    return result
