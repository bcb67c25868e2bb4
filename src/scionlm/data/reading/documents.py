"""Documents out of files, in a fixed order: jsonl and parquet (many in a file), and any other text file as one."""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError
from scionlm.core.files import storage_error
from scionlm.core.log import warn
from scionlm.data.reading.corpora import Action, Problem
from scionlm.data.reading.files import BrokenFileError, DataFile
from scionlm.data.reading.zst import open_zst

_PACKED = (".gz", ".zst")
_LINES = (".jsonl", ".ndjson")
_KINDS = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number", "list": "a list"}
_SHOWN = 3  # problems of a kind that are shown one by one


@dataclass(frozen=True)
class Document:
    """One text and where it stands (`file` or `file:line`)."""

    text: str
    origin: str


class Problems:
    """What to do about documents that cannot be used, and how many there were.

    Args:
        actions: Stop or skip, by kind.
        quiet: Do not say what is skipped: it was said before.
    """

    def __init__(self, actions: dict[Problem, Action], quiet: bool = False) -> None:
        self._actions, self._quiet = actions, quiet
        self.skipped: Counter[str] = Counter()

    def meet(self, kind: Problem, message: str) -> None:
        """Stop at a problem, or count it.

        Raises:
            DataError: Where the actions say to stop.
        """
        if self._actions[kind] == "stop":
            raise DataError(f"{message}; mend it, or skip such documents with on_error: {{{kind}: skip}}")
        self.skipped[kind] += 1
        if kind != "empty" and not self._quiet and self.skipped[kind] <= _SHOWN:  # an empty text is no surprise
            more = "; more of the kind are counted only" if self.skipped[kind] == _SHOWN else ""
            warn(f"skipped: {message}{more}")


@dataclass(frozen=True)
class Reader:
    """How documents are taken out of files.

    Attributes:
        text_key: Field or column with the text.
        max_bytes: Longest document.
        problems: What to do about those that cannot be used.
    """

    text_key: str
    max_bytes: int
    problems: Problems

    def read(self, files: list[DataFile]) -> Iterator[Document]:
        """Yield the documents of `files` in order; blank lines are passed over.

        Raises:
            DataError: A document cannot be used, and such are not to be skipped; the message names file and line.
            StorageError: A file cannot be read.
        """
        for file in files:
            lower = file.name.lower()
            packed = Path(lower).suffix if Path(lower).suffix in _PACKED else ""
            inner = Path(lower.removesuffix(packed)).suffix
            try:
                if inner == ".parquet":
                    try:
                        yield from self._read_parquet(file)
                    except KeyError as error:
                        self.problems.meet("field", f"{file.name} has no column {self.text_key!r} (has: {error})")
                elif inner == ".json":  # a list, or lines under a wrong name: hardly ever one text
                    self.problems.meet(
                        "json",
                        f"{file.name} is .json, which is not read; rename it to .jsonl if each line is an object",
                    )
                else:
                    with _open(file.path, packed) as stream:
                        lines = inner in _LINES
                        yield from self._read_jsonl(stream, file) if lines else self._read_whole(stream, file)
            except (EOFError, gzip.BadGzipFile, zlib.error, BrokenFileError) as error:
                self.problems.meet("broken", f"{file.name} is a broken file: {error}")
            except OSError as error:
                raise storage_error(error, Path(file.name)) from error

    def _checked(self, text: Any, size: int, origin: str) -> Iterator[Document]:
        """Yield the document, if it is one: not empty, and without half a surrogate pair, which no encoding holds."""
        if not text:
            self.problems.meet("empty", f"{origin} is empty")
        elif size > self.max_bytes:
            self.problems.meet("length", f"{origin} has {size} bytes, more than max_document_bytes {self.max_bytes}")
        else:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                self.problems.meet(
                    "encoding", f"{origin} is not Unicode text (a lone surrogate at character {error.start})"
                )
                return
            yield Document(text, origin)

    def _read_jsonl(self, stream: io.BufferedIOBase, file: DataFile) -> Iterator[Document]:
        number = 0
        while line := stream.readline(self.max_bytes + 1):
            number += 1
            origin = f"{file.name}:{number}"
            if len(line) > self.max_bytes:
                while line and not line.endswith(b"\n"):  # its rest, without ever holding it whole
                    line = stream.readline(2**20)
                self.problems.meet("length", f"{origin}: more than max_document_bytes {self.max_bytes} in one line")
                continue
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                self.problems.meet(
                    "encoding", f"{origin} is not UTF-8 ({error.reason} at byte {error.start} of the line)"
                )
                continue
            except (ValueError, RecursionError) as error:
                self.problems.meet("json", f"{origin} is not JSON ({error})")
                continue
            text = record.get(self.text_key) if isinstance(record, dict) else None
            if isinstance(text, str):
                yield from self._checked(text, len(line), origin)
            elif isinstance(record, dict) and self.text_key in record:
                kind = _KINDS.get(type(text).__name__, "an object")
                self.problems.meet("field", f"{origin}: text_key {self.text_key!r} is {kind}, not text")
            else:
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                self.problems.meet("field", f"{origin} has no text under text_key {self.text_key!r} (found: {keys})")
        if number == 0:
            self.problems.meet("empty", f"{file.name} is empty")

    def _read_whole(self, stream: io.BufferedIOBase, file: DataFile) -> Iterator[Document]:
        data = stream.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            self.problems.meet("length", f"{file.name} has more than max_document_bytes {self.max_bytes}")
            return
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.problems.meet("encoding", f"{file.name}:{line} is not UTF-8 ({error.reason} at byte {error.start})")
            return
        yield from self._checked(text, len(data), file.name)

    def _read_parquet(self, file: DataFile) -> Iterator[Document]:
        from scionlm.data.reading.parquet import rows

        number = 0
        for number, value in rows(file, self.text_key):
            origin = f"{file.name}: row {number}"
            if isinstance(value, UnicodeDecodeError):
                self.problems.meet("encoding", f"{origin} is not UTF-8 ({value.reason} at byte {value.start})")
            elif not isinstance(value, str):
                what = "nothing" if value is None else type(value).__name__
                self.problems.meet("field", f"{origin} has {what} in the column {self.text_key!r}")
            else:
                yield from self._checked(value, len(value.encode(errors="surrogatepass")), origin)
        if number == 0:
            self.problems.meet("empty", f"{file.name} has no rows")


def _open(path: Path, packed: str) -> io.BufferedIOBase:
    if packed == ".gz":
        return gzip.GzipFile(path, "rb")
    return open_zst(path) if packed == ".zst" else path.open("rb")
