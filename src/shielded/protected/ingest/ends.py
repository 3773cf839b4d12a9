"""Where the picture of an image file ends: another one may be joined behind it, which decoders pass over."""

from __future__ import annotations

import re

_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM|II\*\0|MM\0\*", re.DOTALL)
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)  # neither stuffing nor a restart
_AUXILIARY = re.compile(
    rb"http://ns\.adobe\.com/hdr-gain-map/|urn:com:apple:photo:\d+:aux:|http://ns\.apple\.com/depthData/"
)  # in a picture that a phone puts behind its photo: brightness for HDR screens, or depth
_JPEG_END, _JPEG_BARE = 0xD9, (0x01, 0xD8)  # markers without a length


def joined_picture(data: bytes, kind: str | None) -> bool:
    """Tell whether another picture begins where an image file ends.

    Args:
        data: the file.
        kind: its format, as Pillow names it; others than JPEG, PNG, GIF, WEBP and BMP: False.
    """
    find = {"JPEG": lambda data: _auxiliary(data)[1], "PNG": _end_of_png, "GIF": _end_of_gif}.get(kind or "")
    if find is None and kind not in ("WEBP", "BMP"):
        return False
    if find is not None:
        end = find(data)
    elif kind == "WEBP":
        end = 8 + int.from_bytes(data[4:8], "little")
    else:
        end = max(int.from_bytes(data[2:6], "little"), 14)
    return _begins_picture(data[end:])


def count_auxiliary(data: bytes) -> int:
    """Count the last pictures of a JPEG that help to show its photo and are none themselves, as phones add them."""
    count, end = _auxiliary(data)
    return 0 if _begins_picture(data[end:]) else count


def _begins_picture(data: bytes) -> bool:
    return _PICTURE.match(data.lstrip(b"\0")) is not None


def _auxiliary(data: bytes) -> tuple[int, int]:
    """Count the auxiliary pictures behind the photo of a JPEG; say where they end."""
    count, end = 0, _end_of_jpeg(data)
    while data.startswith(b"\xff\xd8\xff", end):
        following = end + _end_of_jpeg(data[end:])
        if not _AUXILIARY.search(data, end, following):
            break
        count, end = count + 1, following
    return count, end


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
