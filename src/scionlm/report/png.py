"""A picture of numbers as a PNG: white everywhere, each pixel as opaque as its number says.

A drawing lays it as a mask over a tone of the style sheet, so that a map of thousands of cells is a kilobyte or two and
still follows light, dark and print.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from urllib.parse import quote

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BITS, _GRAY_AND_ALPHA = 8, 4


def png(rows: Sequence[Sequence[float]]) -> bytes:
    """Return a PNG, white with an alpha channel; rows of one length, opacities in [0, 1] (what lies beyond is cut off).

    Raises:
        ValueError: There is no pixel, or the rows differ in length.
    """
    width = len(rows[0]) if rows else 0
    if not width or any(len(row) != width for row in rows):
        raise ValueError("a picture needs rows of one length, with a pixel in each")
    # The 0 in front of each row says that no filter was applied to it.
    raw = b"".join(b"\0" + bytes(byte for value in row for byte in (255, _byte(value))) for row in rows)
    header = struct.pack(">IIBBBBB", width, len(rows), _EIGHT_BITS, _GRAY_AND_ALPHA, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)


def _byte(opacity: float) -> int:
    return round(255 * min(max(opacity, 0.0), 1.0))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def data_address(picture: bytes) -> str:
    """Return a `data:` address of a PNG; without a slash, so that it is plain that no address is asked for."""
    return "data:image/png;base64," + quote(base64.b64encode(picture).decode("ascii"), safe="+=")
