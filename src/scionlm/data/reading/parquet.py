"""Rows of a parquet file, one column of them, a few at a time."""

from collections.abc import Iterator
from typing import Any

from scionlm.core.errors import DataError
from scionlm.data.reading.files import BrokenFileError, DataFile

_ROWS = 1024  # read at once


def rows(file: DataFile, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) of each row of a column; a value that is not UTF-8 comes as its UnicodeDecodeError.

    Raises:
        KeyError: The file lacks the column; with the names of those that it has.
        BrokenFileError: The file is broken.
        DataError: The package that reads it is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file.name} needs the pyarrow package; pip install 'scionlm[data]'") from error
    try:
        with parquet.ParquetFile(file.path) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise KeyError(", ".join(names))
            number = 0
            for batch in opened.iter_batches(batch_size=_ROWS, columns=[column]):
                for scalar in batch.column(0):
                    number += 1
                    yield number, _value(scalar)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        if isinstance(error, (MemoryError, pyarrow.ArrowCancelled)):  # of this machine, or a signal: not of the file
            raise
        raise BrokenFileError(str(error)) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise BrokenFileError(str(error)) from error  # pages that cannot be unpacked come as this, without a number


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error
