"""What an analysis has measured so far, part by part, so that a stopped one goes on."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import storage_error, write_bytes_atomic
from scionlm.core.records import FORMAT_VERSION, Record, read_json, write_json
from scionlm.core.tensors import read_header

Arrays = dict[str, NDArray[Any]]

_FOLDER = "arrays"


def flatten(findings: Any, prefix: str = "") -> Arrays:
    """Return the arrays in a record, a mapping or an array, by dotted names."""
    if is_dataclass(findings):
        findings = {each.name: getattr(findings, each.name) for each in fields(findings)}
    if not isinstance(findings, dict):
        return {prefix or "values": np.asarray(findings)}
    return {
        name: values
        for key, inner in findings.items()
        for name, values in flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


class Store:
    """The folder of an analysis: `settings.json`, and in `arrays/` a safetensors file for each part that is done.

    Args:
        out: The folder; None keeps everything in memory.
        settings: What decides the numbers.

    Raises:
        UsageError: The folder holds something else, or an analysis with other settings.
        DataError: What it holds is broken.
    """

    def __init__(self, out: Path | None, settings: Record) -> None:
        self._out = out
        self.seconds: dict[str, float] = {}
        """What each part took."""
        if out is None:
            return
        self._identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        path = out / "settings.json"
        if path.exists():
            before = read_json(path)
            before.pop("format_version")
            other = [key for key in settings if before.get(key) != settings[key]]
            if other:
                raise UsageError(
                    f"{out} holds an analysis with another {other[0]} ({before.get(other[0])!r}, now "
                    f"{settings[other[0]]!r}); choose another folder (-o)"
                )
            return
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"output folder {out} is not empty; choose another one or remove it first")
        try:
            (out / _FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, out) from error
        write_json(path, settings)

    def get(self, name: str, measure: Callable[[], Arrays]) -> Arrays:
        """Return a part's arrays: those that are there, or else what `measure` returns, which is kept.

        Raises:
            DataError: The file of the part is broken.
            StorageError: It cannot be written.
        """
        if self._out is not None and (path := self._path(name)).exists():
            return self._read(path, name)
        began = time.perf_counter()
        arrays = measure()
        self.seconds[name] = round(time.perf_counter() - began, 2)
        if self._out is not None:
            from safetensors.numpy import save

            facts = {"format_version": str(FORMAT_VERSION), "identity": self._identity}
            facts["seconds"] = str(self.seconds[name])
            contiguous = {key: np.ascontiguousarray(values) for key, values in arrays.items()}
            write_bytes_atomic(self._path(name), save(contiguous, metadata=facts))
        return arrays

    def _path(self, name: str) -> Path:
        assert self._out is not None
        return self._out / _FOLDER / f"{name}.safetensors"

    def _read(self, path: Path, name: str) -> Arrays:
        from safetensors.numpy import load_file

        _, facts = read_header(path, "remove it, and it is measured again")
        if facts.get("format_version") != str(FORMAT_VERSION) or facts.get("identity") != self._identity:
            raise DataError(f"{path} belongs to another analysis, or to a newer Scion; remove it to measure again")
        self.seconds[name] = float(facts.get("seconds", 0.0))
        return load_file(path)
