"""The header of a safetensors file, read without its data and believed in nothing.

Layout: eight bytes with the header's length, the header as JSON, then the tensors one after another without gaps.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from scionlm.core.errors import DataError
from scionlm.core.files import storage_error

_MAX_HEADER = 100 * 2**20
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor stands: type by its safetensors name, shape, and first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path, advice: str) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """Return the tensors of a safetensors file and its metadata, after checking them against the file's size.

    Args:
        path: The file.
        advice: What the user should do when it is broken.

    Raises:
        DataError: It is missing, cut short, longer than it says, or no safetensors file.
        StorageError: It cannot be read.
    """
    broken = DataError(f"{path} is not a sound safetensors file, or is cut short; {advice}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise broken
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {advice}") from error
    except (ValueError, RecursionError) as error:
        raise broken from error
    except OSError as error:
        raise storage_error(error, path) from error
    if not isinstance(header, dict):
        raise broken
    entries = cast("dict[str, Any]", header)
    metadata: Any = entries.pop("__metadata__", None)
    tensors: dict[str, TensorEntry] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sound = all(type(number) is int and number >= 0 for number in (first, last, *shape))
            if not sound or last - first != prod(shape) * _BYTES[dtype]:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: tensor {name!r} has a broken or unsupported entry; {advice}") from error
        tensors[name] = TensorEntry(dtype, tuple(shape), 8 + length + first)
        ranges.append((first, last))
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise broken
        end = last
    if 8 + length + end != size:
        raise DataError(
            f"{path} is cut short or has trailing bytes ({size}, its header promises {8 + length + end}); {advice}"
        )
    return tensors, cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}
