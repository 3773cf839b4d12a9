"""What a picture file holds besides the picture that is measured: nobody sees it, and no distance covers it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}  # and one text with the certificate: all that this package writes
_TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}
_RGB = 2  # colour type of PNG


def hidden_content(file: Path, keyword: str) -> tuple[list[str], list[str]]:
    """List what a file holds besides the one picture that is measured, a sentence each.

    Args:
        file: a picture that Pillow can read.
        keyword: of the PNG text that holds the certificate, which is no hidden content if it is there once.

    Returns:
        what was found, and what was not looked for.
    """
    data = file.read_bytes()
    with Image.open(file) as image:
        kind, frames = image.format, getattr(image, "n_frames", 1)
        found = [f"it has {frames} frames, and the first one alone was measured"] if frames > 1 else []
        found += _transparent(image)
    if kind == "PNG":
        return found + _in_png(data, keyword), []
    if kind == "WEBP":
        return found + _behind(data, 8 + struct.unpack("<I", data[4:8])[0]), []
    if kind in ("JPEG", "MPO"):
        return found + _behind(data, _end_of_jpeg(data)), []
    return found, [f"what its {kind} file holds besides the picture"]


def _behind(data: bytes, end: int) -> list[str]:
    return [f"{len(data) - end} bytes follow the end of the picture"] if end < len(data) else []


def _transparent(image: Image.Image) -> list[str]:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return []
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    if lowest == 255:
        return []
    what = "full transparency" if lowest == 0 else "transparency"
    return [f"it hides colours under {what}: it was measured over white"]


def _in_png(data: bytes, keyword: str) -> list[str]:
    """Walk over the chunks of a PNG file."""
    found: list[str] = []
    others: list[str] = []
    certificates = 0
    pixels = b""
    header = b""
    position = len(_PNG)
    while position < len(data):
        if position + 12 > len(data):
            return [*found, "its last chunk is cut"]
        length, name = struct.unpack(">I4s", data[position : position + 8])
        content = data[position + 8 : position + 8 + length]
        end = position + 12 + length
        if end > len(data):
            return [*found, "its last chunk is cut"]
        if struct.unpack(">I", data[end - 4 : end])[0] != zlib.crc32(name + content):
            found.append(f"the checksum of its chunk {_ascii(name)} is wrong")
        if name in _TEXT_CHUNKS and content.split(b"\0", 1)[0] == keyword.encode():
            certificates += 1
        elif name not in _PLAIN_CHUNKS:
            others.append(_ascii(name))
        if name == b"IHDR":
            header = content
        if name == b"IDAT":
            pixels += content
        position = end
        if name == b"IEND":
            break
    if others:
        found.append(f"it holds data besides the picture: {', '.join(dict.fromkeys(others))}")
    if certificates > 1:
        found.append(f"it holds {certificates} certificates")
    return found + _behind(data, position) + _in_pixels(header, pixels)


def _in_pixels(header: bytes, pixels: bytes) -> list[str]:
    """Look behind the picture in the compressed pixels, and below the 8 bits of a colour that are measured."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if depth > 8:
        return [f"its colours have {depth} bits, and 8 of them were measured"]
    if (depth, colour, interlaced) != (8, _RGB, 0):
        return []
    size = (3 * width + 1) * height
    reader = zlib.decompressobj()
    reader.decompress(pixels, size)
    if reader.decompress(reader.unconsumed_tail, 1):
        return ["pixels follow the end of the picture"]
    return ["bytes follow the end of its compressed pixels"] if reader.unused_data else []


def _end_of_jpeg(data: bytes) -> int:
    """Walk over the segments of a JPEG file up to the end of its first picture."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # entropy-coded data: up to the next marker that is no stuffing and no restart
            position = data.find(b"\xff", position)
            if position < 0:
                return len(data)
            following = data[position + 1 : position + 2]
            if following == b"\0" or b"\xd0" <= following <= b"\xd7" or following == b"\xff":
                position += 1 if following == b"\xff" else 2
                continue
        if data[position + 1] == 0xFF:
            position += 1
            continue
        if data[position + 1] == 0xD9:
            return position + 2
        if data[position + 1] == 0x01 or 0xD0 <= data[position + 1] <= 0xD7:
            position += 2
            continue
        position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    if data[position : position + 2] == b"\xff\xd9":
        return position + 2
    return len(data)


def _ascii(name: bytes) -> str:
    return name.decode("ascii", "replace")
