"""Decode pictures upright and in RGB, name them, and read many at once in threads."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from typing import TypeVar

from PIL import Image, ImageOps

from shielded.latent_space import to_rgb
from shielded.protected.columns import Id

Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """An image that has not been read yet.

    Args:
        name: its path below the given one, without suffix.
        source: its path; in an archive or table, the path of that file and the member or row.
        read: reads its bytes; raises an error that says what is wrong with it.
    """

    name: str
    source: str
    read: Callable[[], bytes]


def decode_picture(data: bytes) -> Image.Image:
    """Decode an image file, turned upright as its EXIF data says, in RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return to_rgb(ImageOps.exif_transpose(image))


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
    skipped.append((source, str(error)))


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
