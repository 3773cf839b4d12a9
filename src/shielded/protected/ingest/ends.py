"""Where the picture of an image file ends: another one may be joined behind it, which decoders pass over."""

from __future__ import annotations

import re

_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM|II\*\0|MM\0\*", re.DOTALL)
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)  # neither stuffing nor a restart
_JPEG_END, _JPEG_BARE = 0xD9, (0x01, 0xD8)  # markers without a length


def joined_picture(data: bytes, kind: str | None) -> bool:
    """Tell whether another picture begins where an image file ends.

    Args:
        data: the file.
        kind: its format, as Pillow names it; others than JPEG, PNG, GIF, WEBP and BMP: False.
    """
    find = {"JPEG": _end_of_jpeg, "PNG": _end_of_png, "GIF": _end_of_gif}.get(kind or "")
    if find is None and kind not in ("WEBP", "BMP"):
        return False
    if find is not None:
        end = find(data)
    elif kind == "WEBP":
        end = 8 + int.from_bytes(data[4:8], "little")
    else:
        end = max(int.from_bytes(data[2:6], "little"), 14)
    return end < len(data) and _PICTURE.match(data[end:].lstrip(b"\0")) is not None


def _end_of_jpeg(data: bytes) -> int:
    position = 2
    while found := _JPEG_MARKER.search(data, position):
        marker, position = found[1][0], found.end()
        if marker == _JPEG_END:
            return position
        if marker not in _JPEG_BARE:
            position += int.from_bytes(data[position : position + 2], "big")
    return len(data)


def _end_of_png(data: bytes) -> int:
    position = 8
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")
        if kind == b"IEND":
            return position
    return len(data)


def _end_of_gif(data: bytes) -> int:
    def table(packed: int) -> int:
        return 3 << (packed & 7) + 1 if packed & 0x80 else 0

    if len(data) < 13:
        return len(data)
    position = 13 + table(data[10])
    while position + 10 < len(data):
        if data[position] == 0x2C:  # an image: its descriptor, colours and code size
            position += 11 + table(data[position + 9])
        elif data[position] == 0x21:  # an extension with its label
            position += 2
        else:
            break
        while position < len(data) and data[position]:  # blocks that begin with their size
            position += 1 + data[position]
        position += 1
    return position + 1 if position < len(data) and data[position] == 0x3B else len(data)
