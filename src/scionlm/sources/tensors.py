"""Read tensors of a model folder piece by piece: plain reads, no memory map; memory holds only what is asked for."""

from collections import Counter
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from scionlm.core.errors import DataError
from scionlm.core.files import storage_error
from scionlm.core.tensors import TensorEntry
from scionlm.sources.folder import tensor_index

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors' name of a type to torch's, for the types that weights come in."""


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the type that most tensors of a model folder are stored in."""
    found = Counter(entry.dtype for _, entry in tensor_index(folder).values()).most_common(1)[0][0]
    if found not in DTYPES:
        raise DataError(f"{folder} stores its weights as {found}; Scion needs a floating-point model")
    return DTYPES[found]


class FolderTensors:
    """The tensors of a folder, by name, read in blocks of rows."""

    def __init__(self, folder: Path, index: dict[str, tuple[Path, TensorEntry]] | None = None) -> None:
        self._folder = folder
        self._index = tensor_index(folder) if index is None else index
        self._files: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "FolderTensors":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the files."""
        return list(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._index[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type.

        Raises:
            DataError: It is no floating-point type.
        """
        file, entry = self._index[name]
        if entry.dtype not in DTYPES:
            raise DataError(f"{file}: tensor {name!r} is stored as {entry.dtype}; Scion needs a floating-point model")
        return DTYPES[entry.dtype]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor, in its stored type, in memory of their own.

        Raises:
            DataError: The file ends early.
            StorageError: It cannot be read.
        """
        path, entry = self._index[name]
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start} to {stop} of tensor {name!r}, which has {entry.shape[0]}")
        dtype = self.dtype(name)
        width = prod(entry.shape[1:]) * dtype.itemsize
        block = torch.empty((stop - start) * width, dtype=torch.uint8)
        try:
            if path not in self._files:
                self._files[path] = self._stack.enter_context(path.open("rb", buffering=0))
            file = self._files[path]
            file.seek(entry.start + start * width)
            view = memoryview(block.numpy())  # pyright: ignore[reportArgumentType]
            while view:
                number = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
                if not number:
                    raise DataError(f"{path} ended inside tensor {name!r}; fetch it again")
                view = view[number:]
        except OSError as error:
            raise storage_error(error, path) from error
        return block.view(dtype).view(stop - start, *entry.shape[1:])
