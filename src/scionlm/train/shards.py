"""Tensors on disk: read whole or in parts, out of one file or out of those that many ranks have written side by side.

Shared tensors are written by torch.distributed.checkpoint in its safetensors layout: each rank writes what it holds,
and any number of ranks reads what it needs.
"""

import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from scionlm.core.errors import DataError, StorageError
from scionlm.core.files import storage_error

Tensors = Mapping[str, torch.Tensor]


class Saved(Protocol):
    """Tensors that can be had again."""

    shapes: Mapping[str, torch.Size]
    """Of each, by name."""

    def fill(self, tensors: Tensors) -> None:
        """Copy what was saved into tensors of the same names and shapes, whole ones or a rank's shares of them."""
        ...


class InMemory:
    """Tensors that are there.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.shapes: Mapping[str, torch.Size] = {name: tensor.shape for name, tensor in tensors.items()}

    @torch.no_grad()
    def fill(self, tensors: Tensors) -> None:
        """See `Saved.fill`."""
        for name, tensor in tensors.items():
            tensor.copy_(self._tensors[name])


class InFile:
    """The tensors of one safetensors file; none where it is not there.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shapes: Mapping[str, torch.Size] = {}
        if path.exists():
            with safe_open(path, "pt") as file:
                self.shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def fill(self, tensors: Tensors) -> None:
        """See `Saved.fill`."""
        if not tensors:
            return
        with safe_open(self._path, "pt") as file:
            for name, tensor in tensors.items():
                if isinstance(tensor, DTensor):
                    for chunk in tensor.__create_chunk_list__():
                        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                        if all(chunk.sizes):
                            tensor.to_local().copy_(file.get_slice(name)[place])
                else:
                    tensor.copy_(file.get_tensor(name))


class InShards:
    """Those tensors of a folder of shards whose names begin with `group/`.

    Args:
        folder: The folder.
        group: Which.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self._folder, self._group = folder, group
        with _quiet():
            known: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        mine = {name: entry for name, entry in known.items() if name.startswith(f"{group}/")}
        self.shapes: Mapping[str, torch.Size] = {n.removeprefix(f"{group}/"): e.size for n, e in mine.items()}

    def fill(self, tensors: Tensors) -> None:
        """See `Saved.fill`."""
        wanted: dict[str, Any] = {f"{self._group}/{name}": tensor for name, tensor in tensors.items()}
        if wanted:
            with _quiet():
                load(wanted, storage_reader=HuggingFaceStorageReader(str(self._folder)), no_dist=True)


class Renamed:
    """The optimizer's state of some weights, under the names that they have in another model.

    Args:
        saved: State by `WEIGHT/FIELD`.
        names: New name of a weight to its name in `saved`.
    """

    def __init__(self, saved: Saved, names: Mapping[str, str]) -> None:
        self._saved = saved
        mine: dict[str, list[str]] = {}
        for new, old in names.items():
            mine.setdefault(old, []).append(new)
        self._keys: dict[str, str] = {}
        for key in saved.shapes:
            weight, _, field = key.rpartition("/")
            self._keys |= {f"{new}/{field}": key for new in mine.get(weight, ())}
        self.shapes: Mapping[str, torch.Size] = {new: saved.shapes[key] for new, key in self._keys.items()}

    def fill(self, tensors: Tensors) -> None:
        """See `Saved.fill`."""
        for name, tensor in tensors.items():  # one after another: two may come from the same
            self._saved.fill({self._keys[name]: tensor})


def write_shards(folder: Path, groups: Mapping[str, Tensors], process_group: Any) -> None:
    """Write tensors into a folder, each rank what it holds; all have to call.

    Args:
        folder: The folder.
        groups: Names of groups to tensors by name.
        process_group: The ranks' lines for this.

    Raises:
        StorageError: A rank could not write.
    """
    state: dict[str, Any] = {f"{group}/{name}": t for group, some in groups.items() for name, t in some.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            save(state, storage_writer=writer, process_group=process_group)
    except (CheckpointException, OSError, SafetensorError) as error:
        raise _explained(error, folder) from error


def _explained(error: BaseException, folder: Path) -> StorageError:
    """Return in words what the first rank's failure was, without the traces of all of them: the same on all."""
    failures: Iterable[Any] = getattr(error, "failures", {}).values()
    first = next(iter(failures), (error,))[0]
    if isinstance(first, OSError):
        return storage_error(first, folder)
    return StorageError(f"cannot write {folder}: {' '.join(str(first).split())[:300]}")


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Leave out what the library warns of for other layouts than ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def matching(saved: Saved, tensors: Tensors, what: str) -> None:
    """Fill tensors with what was saved of exactly these.

    Raises:
        DataError: It is of others.
    """
    if dict(saved.shapes) != {name: tensor.shape for name, tensor in tensors.items()}:
        raise DataError(f"{what} is a checkpoint of another model")
    saved.fill(tensors)
