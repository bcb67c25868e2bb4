"""Documents out of files, in a fixed order: jsonl (plain, .gz, .zst), and any other text file as one document."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError, UsageError
from scionlm.core.files import storage_error
from scionlm.data.reading.corpora import DomainConfig

_MAX_LINE_BYTES = 512 * 2**20
_PACKED = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text and where it stands (`file` or `file:line`)."""

    text: str
    origin: str


def find_files(domain: DomainConfig, root: Path, name: str) -> list[Path]:
    """Return the files of a domain in sorted order, each once.

    Raises:
        DataError: A path or pattern matches no file.
        UsageError: A pattern is not one.
    """
    files: set[Path] = set()
    for pattern in domain.paths:
        path = Path(pattern).expanduser()
        literal = root / path
        if literal.is_file():  # also a name that would mean something as a pattern
            files.add(literal)
            continue
        if not path.name:
            raise UsageError(
                f"domains.{name}.paths: {pattern!r} is not a usable pattern; name files or a folder of text"
            )
        base, rest = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (root, path)
        try:
            found = _files_in(literal) if literal.is_dir() else [p for p in base.glob(str(rest)) if p.is_file()]
        except (ValueError, IndexError) as error:
            raise UsageError(f"domains.{name}.paths: {pattern!r} is not a usable pattern ({error})") from error
        except OSError as error:
            raise storage_error(error, base / rest) from error
        if not found:
            raise DataError(f"domains.{name}.paths: {pattern!r} matches no file (looked from {base})")
        files.update(found)
    return sorted({Path(os.path.normpath(file)) for file in files})


def _files_in(folder: Path) -> list[Path]:
    """Return every file in a folder and the folders in it, but for what is hidden."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_documents(files: list[Path], text_key: str) -> Iterator[Document]:
    """Yield the documents of `files` in order; blank lines and empty texts are passed over.

    Raises:
        DataError: A line is not JSON, lacks the text, is not UTF-8 or too long, or a packed file is broken; the message
            names file and line.
        StorageError: A file cannot be read.
    """
    for path in files:
        packed = path.suffix if path.suffix in _PACKED else ""
        inner = Path(path.name.removesuffix(packed)).suffix
        if inner == ".parquet":
            raise DataError(f"{path}: parquet is not read in this version; write it as .jsonl first")
        try:
            with _open(path, packed) as stream:
                yield from _read_jsonl(stream, path, text_key) if inner == ".jsonl" else _read_whole(stream, path)
        except DataError:
            raise
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is a broken packed file: {error}") from error
        except OSError as error:
            raise storage_error(error, path) from error


def _open(path: Path, packed: str) -> io.BufferedIOBase:
    if packed == ".gz":
        return gzip.GzipFile(path, "rb")
    if packed == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path} needs the zstandard package; pip install 'scionlm[data]'") from error
        return io.BufferedReader(_ZstdRaw(path, zstandard), 1 << 20)
    return path.open("rb")


class _ZstdRaw(io.RawIOBase):
    """The bytes inside a .zst file; one that ends inside a frame was cut short, which the library does not say."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._path, self._zstandard = path, zstandard
        self._file = path.open("rb")
        self._decoder: Any = None  # of the frame that is being read
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(1 << 17)
            if not self._packed:
                if self._decoder is not None:
                    raise DataError(f"{self._path} is a broken packed file: it is cut short")
                return 0
            self._decoder = self._decoder or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._plain = memoryview(self._decoder.decompress(self._packed))
            except self._zstandard.ZstdError as error:
                raise DataError(f"{self._path} is a broken packed file: {error}") from error
            self._packed = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _checked(text: str, origin: str) -> str:
    """Return the text, refusing half a surrogate pair, which JSON can escape but no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: not Unicode text (a lone surrogate at character {error.start})") from error
    return text


def _read_jsonl(stream: io.BufferedIOBase, path: Path, text_key: str) -> Iterator[Document]:
    number = 0
    while line := stream.readline(_MAX_LINE_BYTES + 1):
        number += 1
        origin = f"{path}:{number}"
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"{origin}: the line has more than {_MAX_LINE_BYTES} bytes")
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: not JSON ({error})") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{origin}: no text under the key {text_key!r} (found: {keys}); set text_key")
        if text:
            yield Document(_checked(text, origin), origin)


def _read_whole(stream: io.BufferedIOBase, path: Path) -> Iterator[Document]:
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if text:
        yield Document(text, str(path))
