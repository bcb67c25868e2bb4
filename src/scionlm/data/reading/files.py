"""Which files make up a domain: files, folders and patterns here, and files of data sets on the hub."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import storage_error
from scionlm.data.reading.corpora import DomainConfig
from scionlm.data.reading.hub import PREFIX, HubFile, hub_files

PART_BYTES = 2**25  # consecutive files up to this size on disk are one part of the work


class BrokenFileError(Exception):
    """A file that ends too early, or holds something else than its name says."""


@dataclass(frozen=True)
class DataFile:
    """A file of a domain.

    Attributes:
        name: As messages show it: a path, or its address on the hub.
        size: Bytes on disk.
        hub: Where to fetch it, if it is not here.
    """

    name: str
    size: int
    hub: HubFile | None = None

    @cached_property
    def path(self) -> Path:
        """Where it is on this machine; a file of the hub is fetched first.

        Raises:
            StorageError: The hub cannot be reached.
        """
        return Path(self.name) if self.hub is None else self.hub.fetch()

    @property
    def changed_ns(self) -> int:
        """When the file was changed last; a file of the hub has a fixed revision and never is."""
        return 0 if self.hub is not None else self.path.stat().st_mtime_ns


def find_files(domain: DomainConfig, root: Path, name: str) -> list[DataFile]:
    """Return the files of a domain in sorted order, each once.

    Raises:
        DataError: A path or pattern matches no file.
        UsageError: A pattern is not one.
        StorageError: A folder cannot be read, or the hub cannot be reached.
    """
    found: dict[str, DataFile] = {}
    for pattern in domain.paths:
        if pattern.startswith(PREFIX):
            files = [DataFile(file.address, file.size, file) for file in hub_files(pattern, name)]
        else:
            paths = _matching(pattern, root, name)
            files = [DataFile(os.path.normpath(path), path.stat().st_size) for path in paths]
        found |= {file.name: file for file in files}
    return [found[key] for key in sorted(found, key=Path)]


def _matching(pattern: str, root: Path, name: str) -> list[Path]:
    path = Path(pattern).expanduser()
    literal = root / path
    if literal.is_file():  # also a name that would mean something as a pattern
        return [literal]
    if not path.name:
        raise UsageError(f"domains.{name}.paths: {pattern!r} is not a usable pattern; name files or a folder of text")
    base, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (root, path)
    try:
        found = _files_in(literal) if literal.is_dir() else [p for p in base.glob(str(rest)) if p.is_file()]
    except (ValueError, IndexError) as error:
        raise UsageError(f"domains.{name}.paths: {pattern!r} is not a usable pattern ({error})") from error
    except OSError as error:
        raise storage_error(error, base / rest) from error
    if not found:
        raise DataError(f"domains.{name}.paths: {pattern!r} matches no file (looked from {base})")
    return found


def _files_in(folder: Path) -> list[Path]:
    """Return every file in a folder and the folders in it, but for what is hidden."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def parts_of(files: list[DataFile]) -> list[list[DataFile]]:
    """Return the files in parts that can be worked on apart: many small ones together, a large one alone."""
    parts: list[list[DataFile]] = []
    room = 0
    for file in files:
        if not parts or file.size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(file)
        room -= file.size
    return parts
