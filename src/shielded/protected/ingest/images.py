"""From images to a protected set: read and decode in threads, encode in batches, save now and then."""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, count, islice

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from shielded.latent_space import LatentSpace, to_pixels, to_rgb
from shielded.protected.ingest import sources
from shielded.protected.ingest.sources import Paths, Picture, find_images
from shielded.protected.protected_set import ProtectedSet

MIRRORED = "mirrored:"  # what the id of a mirrored image begins with
_SAVE_SECONDS = 30.0  # of work that a kill may cost
_SAVE_BYTES = 1 << 26  # of latents that wait to be saved


@dataclass
class AddedImages:
    """What became of the images.

    Args:
        added: how many were encoded and added, mirrored ones counted on their own.
        present: how many were in the set already, or were given twice.
        skipped: path and reason of each image that could not be read.
    """

    added: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def load_images(
    paths: Paths, strict: bool = False
) -> tuple[list[tuple[str, Image.Image, str, str]], list[tuple[str, str]]]:
    """Loads all images of files, folders (with their subfolders) and globs into memory.

    Args:
        paths: one or several files, folders or globs.
        strict: raise if a file cannot be decoded, instead of skipping it.

    Returns:
        A list of (id, RGB image, path, SHA-256 of the file), with unique ids from the paths relative to the given
        folder, without suffix; and a list of (path, reason) of what was skipped.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image in it.
        ValueError: if `strict` and a file cannot be decoded.
    """
    loaded, skipped = [], []
    taken: set[str | int] = set()
    for name, path in find_images(paths):
        try:
            data = path.read_bytes()
            image = _decode(data)
        except Exception as error:  # decoders raise all kinds of errors on broken files
            _skip(str(path), error, strict, skipped)
        else:
            loaded.append((_unique(name, taken), image, str(path), hashlib.sha256(data).hexdigest()))
    return loaded, skipped


def add_images(
    protected: ProtectedSet,
    paths: Paths,
    radius: float | None = None,
    strict: bool = False,
    batch_size: int = 32,
    space: LatentSpace | None = None,
    mirror: bool = False,
    progress: bool = True,
) -> AddedImages:
    """Encodes images into a protected set.

    An image whose bytes (by SHA-256) are in the set already is not encoded again, so a run that was interrupted goes
    on where it stopped. What has been encoded is saved every half minute and when the run ends, however it ends short
    of a kill.

    Args:
        protected: the set to add to.
        paths: one or several files, folders, globs, tar archives, parquet or Arrow files, or @FILE with a path on each
            line (`sources.pictures`).
        radius: of the shields, L2 in the latent space; None leaves it open.
        strict: raise if an image cannot be read, instead of skipping it.
        batch_size: images per call of the encoder.
        space: the space with its autoencoder, `LatentSpace.of(pipe)`; needed for a set that was opened.
        mirror: also protect each image mirrored left to right, as `mirrored:ID`.
        progress: whether a progress bar is shown.

    Returns:
        How many images were added and how many were present, and which were skipped.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image in it.
        ValueError: if the space is not that of the set or cannot encode, or `strict` and an image cannot be read.
        RuntimeError: if another process is writing to the set.
        OSError: if the disk is full or the folder read-only.
    """
    space = space or protected.space
    protected.require_space(space)
    space.encode([])  # refuses a space without an autoencoder before anything is read
    sources.require_images(paths)
    result = AddedImages()
    latents: list[Tensor] = []
    names: list[tuple[str, str, str]] = []  # id, source and digest of each encoded image
    saved = time.monotonic()

    def save() -> None:
        if names:
            encoded, rows = torch.cat(latents), list(names)
            latents.clear()
            names.clear()
            ids, origins, digests = zip(*rows, strict=True)
            protected.add(encoded, ids, radius, origins, digests)
            result.added += len(rows)

    total = sources.count(paths) if progress else None
    bar = tqdm(total=total, desc="protect", unit="image", disable=not progress)
    with bar, closing(_new_rows(protected, paths, space, mirror, strict, batch_size, result, bar)) as rows:
        try:
            # Whole batches are saved, so that a run that goes on forms the same batches as one that was not disturbed.
            while batch := list(islice(rows, batch_size)):
                latents.append(_encode(space, [pixels for _, pixels in batch]))
                names += [name for name, _ in batch]
                if time.monotonic() - saved >= _SAVE_SECONDS or sum(part.nbytes for part in latents) >= _SAVE_BYTES:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return result


def _new_rows(
    protected: ProtectedSet,
    paths: Paths,
    space: LatentSpace,
    mirror: bool,
    strict: bool,
    ahead: int,
    result: AddedImages,
    bar: tqdm,
) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """(id, source, digest) and pixels of each image that is not in the set yet and can be decoded, in order."""
    taken: set[str | int] = set()
    seen: set[bytes] = set()
    for name, digest in zip(protected.ids, protected.sha256, strict=True):
        taken.add(name)
        if digest is not None:
            seen.add(_key(bytes.fromhex(digest), str(name).startswith(MIRRORED)))
    versions = (False, True) if mirror else (False,)

    def prepare(picture: Picture) -> tuple[bytes, Tensor | None] | Exception:
        try:
            data = picture.read()
            digest = hashlib.sha256(data).digest()
            known = all(_key(digest, mirrored) in seen for mirrored in versions)
            return digest, None if known else to_pixels(_decode(data), space.image_size)
        except Exception as error:  # decoders raise all kinds of errors on broken files
            return error

    for picture, prepared in _in_threads(prepare, sources.pictures(paths), ahead):
        bar.update()
        if isinstance(prepared, Exception):
            _skip(picture.source, prepared, strict, result.skipped)
            continue
        digest, pixels = prepared
        missing = [mirrored for mirrored in versions if _key(digest, mirrored) not in seen]
        result.present += not missing
        for mirrored in missing:
            seen.add(_key(digest, mirrored))
            name = _unique(MIRRORED + picture.name if mirrored else picture.name, taken)
            yield (name, picture.source, digest.hex()), pixels.flip(-1) if mirrored else pixels


def _key(digest: bytes, mirrored: bool) -> bytes:
    return digest + b"m" if mirrored else digest


def _in_threads(
    function: Callable[[Picture], object], items: Iterable[Picture], ahead: int
) -> Iterator[tuple[Picture, object]]:
    """(item, function(item)) in order, `ahead` of them computed in advance. Pillow decodes without Python's lock."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    pending: deque[tuple[Picture, Future]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(space: LatentSpace, pixels: list[Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a batch of bright images is no mistake
        return space.encode(torch.stack(pixels), len(pixels))


def _decode(data: bytes) -> Image.Image:
    """An image, upright and in RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def _skip(path: str, error: Exception, strict: bool, skipped: list[tuple[str, str]]) -> None:
    if strict:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    skipped.append((path, str(error)))


def _unique(name: str, taken: set[str | int]) -> str:
    """The name, with a number if it is taken; takes it."""
    free = next(i for i in chain([name], (f"{name}-{n}" for n in count(2))) if i not in taken)
    taken.add(free)
    return free
