"""What an analysis has measured so far, part by part, so that a stopped one goes on."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import folder_lock, require_free_folder, storage_error, write_bytes_atomic
from scionlm.core.records import FORMAT_VERSION, Record, read_json, write_json
from scionlm.core.tensors import read_header

Arrays = dict[str, NDArray[Any]]

_REMEDY = "remove it, and it is measured again"


def flatten(findings: Any, prefix: str = "") -> Arrays:
    """Return the arrays in a record, a mapping or an array, by dotted names."""
    if is_dataclass(findings):
        findings = {each.name: getattr(findings, each.name) for each in fields(findings)}
    if not isinstance(findings, dict):
        return {prefix or "values": np.ascontiguousarray(findings)}
    return {
        name: values
        for key, inner in findings.items()
        for name, values in flatten(inner, f"{prefix}.{key}" if prefix else key).items()
    }


class Store:
    """The folder of an analysis: `settings.json`, and in `arrays/` a safetensors file for each part that is done.

    Nothing is written before the first part is done.

    Args:
        out: The folder; None keeps everything in memory.
        settings: What decides the numbers.

    Raises:
        UsageError: The folder holds something else, or an analysis with other settings.
        DataError: What it holds is broken.
    """

    def __init__(self, out: Path | None, settings: Record) -> None:
        self._out, self._settings = out, settings
        self.seconds: dict[str, float] = {}
        """What each part took."""
        if out is None:
            return
        self._identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        if not (out / "settings.json").exists():
            require_free_folder(out)
            return
        before = read_json(out / "settings.json")
        for key, value in settings.items():
            if before.get(key) != value:
                raise UsageError(
                    f"{out} holds an analysis with another {key} ({before.get(key)!r}, now {value!r}); choose another "
                    "folder (-o)"
                )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process alone; one that nothing was written into is taken away again.

        Raises:
            UsageError: Another process holds it.
        """
        if self._out is None:
            yield
            return
        try:
            made = [path for path in (self._out, *self._out.parents) if not path.exists()]
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self._out) from error
        try:
            with folder_lock(self._out):
                yield
        finally:
            if made and not (self._out / "settings.json").exists():
                with contextlib.suppress(OSError):
                    (self._out / ".lock").unlink(missing_ok=True)
                    for path in made:
                        path.rmdir()

    def get(self, name: str, measure: Callable[[], Arrays]) -> Arrays:
        """Return a part's arrays: those that are there, or else what `measure` returns, which is kept.

        Raises:
            DataError: The file of the part is broken.
            StorageError: It cannot be written.
        """
        if self._out is None:
            return self._timed(name, measure)
        path = self._out / "arrays" / f"{name}.safetensors"
        if path.exists():
            return self._read(path, name)
        arrays = self._timed(name, measure)
        from safetensors.numpy import save

        facts = {"format_version": str(FORMAT_VERSION), "identity": self._identity}
        facts |= {"seconds": str(self.seconds[name]), "sha256": _digest(arrays)}
        if not (self._out / "settings.json").exists():
            write_json(self._out / "settings.json", self._settings)
        write_bytes_atomic(path, save(arrays, metadata=facts))
        return arrays

    def _timed(self, name: str, measure: Callable[[], Arrays]) -> Arrays:
        began = time.perf_counter()
        arrays = measure()
        self.seconds[name] = round(time.perf_counter() - began, 2)
        return arrays

    def _read(self, path: Path, name: str) -> Arrays:
        from safetensors.numpy import load

        _, facts = read_header(path, _REMEDY)
        if facts.get("format_version") != str(FORMAT_VERSION) or facts.get("identity") != self._identity:
            raise DataError(f"{path} belongs to another analysis, or to a newer Scion; {_REMEDY}")
        try:
            arrays = load(path.read_bytes())
            self.seconds[name] = float(facts["seconds"])
        except OSError as error:
            raise storage_error(error, path) from error
        except Exception as error:  # safetensors has errors of its own; whatever it is, the file is not what we wrote
            raise DataError(f"{path} is damaged; {_REMEDY}") from error
        if facts.get("sha256") != _digest(arrays):
            raise DataError(f"{path} is damaged; {_REMEDY}")
        return arrays


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name}\0{values.dtype}\0{values.shape}\0".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
