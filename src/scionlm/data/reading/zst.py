"""Reading .zst files, which the library does not know to be cut short."""

import io
from pathlib import Path
from typing import Any

from scionlm.core.errors import DataError
from scionlm.data.reading.files import BrokenFileError


def open_zst(path: Path) -> io.BufferedIOBase:
    """Return the bytes inside a .zst file; reading raises `BrokenFileError` where it is cut short.

    Raises:
        DataError: The package that reads such files is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise DataError(f"{path} needs the zstandard package; pip install 'scionlm[data]'") from error
    return io.BufferedReader(_ZstdRaw(path, zstandard), 1 << 20)


_WINDOW = 1 << 31
"""Bytes of the longest window that a frame may ask for: what `zstd --long=31` writes."""
_PIECE = 1 << 10
"""Bytes that are unpacked at once. The library gives back all that is in them, which can be tens of thousands of times
as much."""


class _ZstdRaw(io.RawIOBase):
    """The bytes inside a .zst file; one that ends inside a frame was cut short, which the library does not say."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._zstandard = zstandard
        self._file = path.open("rb", buffering=1 << 17)
        self._decoder: Any = None  # of the frame that is being read
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def _decompressor(self) -> Any:
        return self._zstandard.ZstdDecompressor(max_window_size=_WINDOW)

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(_PIECE)
            if not self._packed:
                if self._decoder is not None:
                    raise BrokenFileError("it is cut short")
                return 0
            self._decoder = self._decoder or self._decompressor().decompressobj()
            try:
                self._plain = memoryview(self._decoder.decompress(self._packed))
            except self._zstandard.ZstdError as error:
                raise BrokenFileError(str(error)) from error
            self._packed = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
