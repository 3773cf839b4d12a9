"""Tell by its first bytes what a file holds: pictures, an archive, a table, text, or what is not read here."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import tarfile
import zlib
from functools import cache
from typing import Any, BinaryIO, Literal

from shielded._extras import missing

HEAD_BYTES = 1024

Kind = Literal["tar", "table", "other"]

_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_TEXT_PICTURES = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"PF", b"Pf", b"/* XPM", b"#define ", b"#?RADIANCE")
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"8BPS\0\1", b"\0\0\0\x0cjP  ")
_SYSTEM_FILES = (
    b"\0\5\x16\7",
    b"\0\0\0\1Bud1",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
)  # AppleDouble, .DS_Store, Thumbs.db
_NOT_READ = {  # what may hold pictures
    b"PK\3\4": "a zip archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a rar archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it first",
    b"%PDF": "a PDF; save its pages as pictures",
    b"%!PS": "PostScript; save it as a picture of pixels",
    b"\xc5\xd0\xd3\xc6": "PostScript; save it as a picture of pixels",
    b"\xff\x0a": "JPEG XL, which Pillow does not read; convert it",
    b"\0\0\0\x0cJXL ": "JPEG XL, which Pillow does not read; convert it",
    b"\x76\x2f\x31\x01": "OpenEXR, which has no defined range of values; convert it",
    b"\x1a\x45\xdf\xa3": "a video; save its frames as pictures",
    b"8BPS\0\2": "a Photoshop file of the large format; save it as a picture",
    b"FUJIFILMCCD-RAW": "a raw photo; develop it first",
    b"FOVb": "a raw photo; develop it first",
}
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1")


@cache
def reads_heic() -> bool:
    """Tell whether HEIC pictures can be read; if pillow-heif is installed, register its decoder with Pillow."""
    try:
        package = importlib.import_module("pillow_heif")
    except ImportError:
        return False
    package.register_heif_opener()
    return True


def is_heic(head: bytes) -> bool:
    """Tell whether a file begins as HEIC pictures do, which phones take."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC and b"avif" not in head[: int.from_bytes(head[:4], "big")]


def is_picture(head: bytes) -> bool:
    """Tell whether a file begins as the usual kinds of pictures do, damaged or not."""
    return (
        head.startswith(_PICTURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] == b"ftypavif"
        or is_heic(head)
    )


def kind_of(head: bytes) -> Kind:
    """Tell archives and tables from other files by their first HEAD_BYTES."""
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) and len(head) >= 12:
        return "table"
    return "tar" if is_tar(head) else "other"


def is_tar(head: bytes) -> bool:
    """Tell whether bytes begin with the header of a tar archive's member."""
    try:
        return bool(tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape").name)
    except tarfile.HeaderError:
        return False


def decompressed(path: str, head: bytes) -> BinaryIO | None:
    """Open a file that is compressed with gzip, bzip2 or xz; None if it is not."""
    for magic, opener in _COMPRESSED.items():
        if head.startswith(magic):
            reader: Any = opener(path, "rb")
            return reader
    return None


def is_compressed_tar(path: str, head: bytes) -> bool:
    """Tell whether a file is a tar archive that is compressed with gzip, bzip2 or xz."""
    try:
        file = decompressed(path, head)
        if file is None:
            return False
        with file:
            return is_tar(file.read(tarfile.BLOCKSIZE))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return False


def without_pictures(head: bytes) -> str | None:
    """Say what a file is that certainly holds no picture: empty, text, or a file of the system; None for others."""
    if not head:
        return "empty"
    if head.startswith(_SYSTEM_FILES):
        return "files of the system"
    return "text" if _is_text(head) else None


def not_read(head: bytes) -> str | None:
    """Say what a file is that may hold pictures but is not read here; None for others."""
    if is_heic(head):
        return None if reads_heic() else missing("HEIC pictures", "heic").rstrip(".")
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand and brand not in (b"avif", b"avis", *_HEIC):
        return "a video; save its frames as pictures"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "a video; save its frames as pictures"
    if b"<svg" in head[:HEAD_BYTES].lower():
        return "SVG; save it as a picture of pixels"
    if head.startswith(tuple(_COMPRESSED)):
        return "a compressed file that is no tar archive; unpack it first"
    if is_tar(head):
        return "a tar archive in another file; unpack it first"
    return next((what for magic, what in _NOT_READ.items() if head.startswith(magic)), None)


def _is_text(head: bytes) -> bool:
    if (
        head.startswith(_TEXT_PICTURES)
        or b"\0" in head
        or b"<svg" in head.lower()
        or head.startswith((b"%PDF", b"%!PS"))
    ):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) >= HEAD_BYTES  # a letter that the end cuts in two
    return True
