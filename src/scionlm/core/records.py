"""Versioned JSON and JSONL records: manifests, status, results, metrics.

Every document bears `format_version`; a reader refuses a newer one by name instead of guessing at it.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from scionlm.core.errors import DataError, NewerFormatError, StorageError
from scionlm.core.files import storage_error, write_text_atomic
from scionlm.core.log import warn

FORMAT_VERSION = 1

Record = dict[str, Any]


def to_json(record: Record) -> str:
    """Return `record` as one indented JSON document with its format version first."""
    return json.dumps({"format_version": FORMAT_VERSION} | record, indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, record: Record) -> None:
    """Write `record` atomically as a versioned JSON document."""
    write_text_atomic(path, to_json(record) + "\n")


def check_version(record: Any, path: Path) -> Record:
    """Return `record` if it is a mapping of a format version that this Scion reads.

    Raises:
        DataError: It is not.
        NewerFormatError: A newer Scion wrote it.
    """
    version = cast("Record", record).get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{path} is not a Scion record: it has no format_version")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has format_version {version}, this Scion reads up to {FORMAT_VERSION}; "
            "install a newer Scion to read it"
        )
    return cast("Record", record)


def read_json(path: Path) -> Record:
    """Read a versioned JSON document.

    Raises:
        DataError: The file is absent, not JSON, or of a newer version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise storage_error(error, path) from error
    return check_version(record, path)


def read_jsonl(path: Path) -> list[Record]:
    """Return the lines of a versioned JSONL file after its header; a torn last line (a kill) is left out.

    Raises:
        DataError: The file is absent, its header is not a known one, or a line inside it is broken.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from error
    if not records:
        raise DataError(f"{path} has no header line")
    check_version(records[0], path)
    return records[1:]


def write_jsonl(path: Path, kind: str, records: list[Record]) -> None:
    """Write a whole JSONL file atomically; see `JsonlWriter`."""
    lines = [{"format_version": FORMAT_VERSION, "kind": kind}, *records]
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))


class JsonlWriter:
    """Append records to a JSONL file, one line each, readable while it grows.

    Where the disk is full the lines wait in memory, and are written with the next one for which there is room: a line
    less must not end a run.

    Args:
        path: The file; made with a header line when it is not there. None writes nothing: another process does.
        kind: What the lines are, written into the header.
    """

    def __init__(self, path: Path | None, kind: str) -> None:
        self._path, self._file = path, None
        self._waiting, self._warned = b"", False
        if path is None:
            return
        self._kind = kind
        if not path.exists():
            write_jsonl(path, kind, [])
        elif path.is_file() and not path.read_bytes().endswith(b"\n"):
            write_jsonl(path, kind, read_jsonl(path))  # a kill tore the last line
        self._file = path.open("ab", buffering=0)

    def rewind(self, step: int, keep: Callable[[Record], bool] = lambda record: True) -> None:
        """Drop the lines of later steps: work that was lost after the checkpoint from which a run goes on.

        Args:
            step: The checkpoint's.
            keep: Which of the lines of this very step stay.
        """
        if self._path is None or self._file is None:
            return
        steps = [(record.get("step", 0), record) for record in read_jsonl(self._path)]
        kept = [record for at, record in steps if at < step or (at == step and keep(record))]
        self._file.close()
        write_jsonl(self._path, self._kind, kept)
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, record: Record) -> None:
        """Append one record; NaN and infinity are written as null, which JSON has."""
        if self._path is None:
            return
        self._waiting += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            self.flush()
            self._warned = False
        except StorageError as error:
            if not self._warned:
                warn(f"{error}; its lines wait in memory")
            self._warned = True

    def flush(self, sync: bool = False) -> None:
        """Write what waits; with `sync` it is on the disk afterwards, and not only on its way there.

        Raises:
            StorageError: There is still no room.
        """
        if self._path is None or self._file is None:
            return
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # what a full disk took of it is there
            if sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise storage_error(error, self._path) from error

    def close(self) -> None:
        """Write what waits and close the file.

        Raises:
            StorageError: There is no room for what waits.
        """
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()


def _finite(value: Any) -> Any:
    """Return a value with null in the place of every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast("Record", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in cast("list[Any]", value)]
    return value


def stderr_key(metric: str) -> str:
    """Return the name of a metric's standard error: of `acc` `acc_stderr`, of `acc,FILTER` `acc_stderr,FILTER`."""
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"
