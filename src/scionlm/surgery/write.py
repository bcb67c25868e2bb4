"""Write weights as they are made: safetensors files with an index, tensor by tensor, hashed on the way.

The library's own writer wants a whole file in memory. Sizes are known from the plan, so the header is written first and
blocks follow. While one is written, the next is read and the last is hashed and looked through for numbers that are not
finite.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from scionlm.core.errors import ScionError
from scionlm.core.files import settle, storage_error, write_text_atomic
from scionlm.sources.tensors import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_IN_FLIGHT = 2


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its name, type and shape, and what makes its blocks of rows."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Written:
    """What was written: SHA-256 of each file, and tensors with numbers that are not finite."""

    files: dict[str, str] = field(default_factory=lambda: {})
    not_finite: list[str] = field(default_factory=lambda: [])


def write_weights(
    tensors: list[Tensor], stage: Path, shard_bytes: int, on_progress: Callable[[int], None] | None = None
) -> Written:
    """Write all tensors into `stage` in Hugging Face's layout.

    Args:
        tensors: In the order in which they are to stand.
        stage: The folder.
        shard_bytes: Largest size of a file; a larger tensor has one of its own.
        on_progress: Called with the bytes of each block, once it is written.

    Raises:
        ScionError: A tensor did not come in the size promised.
        StorageError: The folder cannot be written.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    written = Written()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as looker, ThreadPoolExecutor(1) as settler:
        settled: list[Future[None]] = []
        for name, shard in zip(names, shards, strict=True):
            digest = _write_file(stage / name, shard, reader, looker, written.not_finite, on_progress)
            written.files[name] = digest
            settled.append(settler.submit(settle, stage / name))  # the disk works on while the next file is made
        for future in settled:
            future.result()
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": weight_map}
        write_text_atomic(stage / INDEX, json.dumps(index, indent=2) + "\n")
    return written


def _write_file(
    path: Path,
    tensors: list[Tensor],
    reader: ThreadPoolExecutor,
    looker: ThreadPoolExecutor,
    not_finite: list[str],
    on_progress: Callable[[int], None] | None,
) -> str:
    # Largest type first, so that each tensor starts at a multiple of its size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = _header(tensors)
    digest = hashlib.sha256(header)
    waiting: list[Future[None]] = []
    try:
        with path.open("wb", buffering=0) as file:
            file.write(header)
            for tensor, data in _ahead(_all_blocks(tensors), reader):
                if len(waiting) >= _IN_FLIGHT:
                    waiting.pop(0).result()
                waiting.append(looker.submit(_look, data, digest, tensor.name, not_finite))
                view = _bytes_of(data)
                while view:
                    view = view[file.write(view) :]
                if on_progress is not None:
                    on_progress(data.nbytes)
            for future in waiting:
                future.result()
    except OSError as error:
        raise storage_error(error, path) from error
    return digest.hexdigest()


def _all_blocks(tensors: list[Tensor]) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """Yield the blocks of all tensors in the type that they are stored in.

    Raises:
        ScionError: A tensor did not come in the size promised.
    """
    for tensor in tensors:
        number = 0
        for block in tensor.blocks():
            data = block.to(tensor.dtype).contiguous()
            number += data.numel()
            yield tensor, data
        if number != prod(tensor.shape):
            raise ScionError(f"tensor {tensor.name!r} came with {number} elements, not {prod(tensor.shape)}")


def _ahead(
    items: Iterator[tuple[Tensor, torch.Tensor]], reader: ThreadPoolExecutor
) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """Yield what an iterator yields, the next item being made in another thread meanwhile."""
    coming = reader.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = reader.submit(next, items, None)
        yield item


def _header(tensors: list[Tensor]) -> bytes:
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.num_bytes
        entries[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: let it start at a round address
    return len(text).to_bytes(8, "little") + text


def _bytes_of(block: torch.Tensor) -> memoryview:
    array: Any = block.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _look(block: torch.Tensor, digest: "hashlib._Hash", name: str, not_finite: list[str]) -> None:
    digest.update(_bytes_of(block))
    if not is_finite(block) and name not in not_finite:
        not_finite.append(name)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN, which both ends of its range would be, nor infinity."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # ten times as fast as a look at absolute values
    return bool(torch.isfinite(low) & torch.isfinite(high))
