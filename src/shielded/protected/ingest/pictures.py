"""Decode pictures upright and in RGB, name them, and read many at once in threads."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from typing import NamedTuple, TypeVar

from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from shielded.latent_space import to_rgb
from shielded.protected.columns import Id
from shielded.protected.ingest.contents import HEAD_BYTES, is_heic, not_read, reads_heic, without_pictures
from shielded.protected.ingest.ends import count_auxiliary, joined_picture

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
_ONE_PICTURE = ("PSD",)  # formats whose further frames are parts of the picture
_SUBFILE_TYPE, _REDUCED = 254, 1  # of the first picture of a TIFF file, where that is the preview of a raw photo

Result = TypeVar("Result")


class Passed(NamedTuple):
    """Why a file is not looked at.

    Args:
        reason: what it is, in the plural where that fits.
        harmless: it certainly holds no picture, so that not even `strict` refuses it.
    """

    reason: str
    harmless: bool


class NoPictureError(ValueError):
    """A file whose content is not that of a picture; `passed` says what it is."""

    def __init__(self, passed: Passed) -> None:
        super().__init__(f"not a picture that can be read ({passed.reason})")
        self.passed = passed


@dataclass(frozen=True)
class Picture:
    """An image that has not been read yet.

    Args:
        name: its path below the given one, without suffix.
        source: its path; in an archive or table, the path of that file and the member or row.
        read: reads its bytes; raises an error that says what is wrong with it.
        passed: why it is not read; None: it is.
    """

    name: str
    source: str
    read: Callable[[], bytes]
    passed: Passed | None = None


def decode_picture(data: bytes, frame: int = 0) -> Image.Image:
    """Decode an image file, turned upright as its EXIF data says, in sRGB.

    Args:
        data: the file.
        frame: number of the frame of an animation, or of the page; 0 is the one that viewers show first.

    Raises:
        NoPictureError: its content is that of something else.
        ValueError: it cannot be decoded; decoders raise other errors, too.
    """
    with open_image(data) as image:
        if frame:
            first = image.tell()  # HEIC may begin with another one
            image.seek(frame if frame > first else frame - 1)
        return to_rgb(ImageOps.exif_transpose(image))


def open_image(data: bytes) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        NoPictureError: its content is that of something else.
        ValueError: it is of a kind that is not read; the message says what to do.
    """
    head = data[:HEAD_BYTES]
    if is_heic(head):
        reads_heic()
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        reason, text = not_read(head), without_pictures(head)
        if reason is not None:
            raise ValueError(reason) from None
        if text == "files of the system":
            raise NoPictureError(Passed(text, True)) from None
        raise
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_SUBFILE_TYPE) == _REDUCED:
        raise ValueError("a raw photo, of which only the small preview could be read; develop it first")
    return image


def count_frames(data: bytes) -> tuple[int, str | None]:
    """Count the pictures of an image file, frames of an animation or pages of a document; say if some may be missing.

    Raises:
        NoPictureError: its content is that of something else.
        ValueError: it cannot be read; decoders raise other errors, too.
    """
    with open_image(data) as image:
        frames = 1 if image.format in _ONE_PICTURE else getattr(image, "n_frames", 1)
        kind = image.format
    if kind == "MPO":
        frames = max(1, frames - count_auxiliary(data))
    if joined_picture(data, kind):
        return frames, "another picture is joined behind the end of this one, and is not looked at"
    if kind == "GIF" and not data.rstrip(b"\0").endswith(b";"):
        return frames, f"the file does not end as a GIF does, so frames behind the first {frames} may be lost"
    return frames, None


def unique_name(name: str, taken: set[Id]) -> str:
    """Number a name if it is taken, such as `name-2`; add it to `taken`."""
    free = next(i for i in chain([name], (f"{name}-{n}" for n in count(2))) if i not in taken)
    taken.add(free)
    return free


def skip(source: str, error: Exception, strict: bool, skipped: list[tuple[str, str]]) -> None:
    """Add a picture that cannot be read to `skipped`, with the reason.

    Raises:
        ValueError: `strict`.
    """
    if strict:
        raise ValueError(f"{source} cannot be decoded: {error}") from error
    skipped.append((source, " ".join(str(error).split())))  # on one line


def in_threads(
    function: Callable[[Picture], Result], pictures: Iterable[Picture], ahead: int
) -> Iterator[tuple[Picture, Result]]:
    """Yield (picture, function(picture)) in order, computing up to `ahead` of them in advance.

    Pillow decodes without Python's lock.
    """
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    pending: deque[tuple[Picture, Future[Result]]] = deque()
    try:
        for picture in pictures:
            pending.append((picture, pool.submit(function, picture)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
