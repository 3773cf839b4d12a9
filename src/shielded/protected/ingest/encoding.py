"""Encode images into a protected set: read in threads, encode in batches, save now and then."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from shielded._extras import Bar, show_progress
from shielded.latent_space import LatentSpace, to_pixels
from shielded.protected.columns import MIRRORED, Id, is_mirrored
from shielded.protected.ingest import sources
from shielded.protected.ingest.pictures import (
    NoPictureError,
    Picture,
    count_frames,
    decode_picture,
    in_threads,
    skip,
    unique_name,
)
from shielded.protected.ingest.sources import Paths
from shielded.protected.protected_set import ProtectedSet

_SAVE_SECONDS = 30.0  # of unsaved work that a kill may cost
_SAVE_BYTES = 1 << 26  # of unsaved latents


@dataclass
class AddedImages:
    """Outcome of adding images to a set; `found` is the sum of `new`, `present` and the number of `skipped`.

    Args:
        added: how many were encoded and added, each mirrored image counted too.
        present: how many were in the set already, or were given twice.
        skipped: path and reason of each image that could not be read, and of each damaged archive.
        found: how many pictures were found: image files, each frame of an animation and page of a document, members of
            archives, rows of tables, and each of `skipped`.
        new: of how many pictures something was added.
        not_looked_at: how many files hold no picture that is recognised, by what they are.
    """

    added: int = 0
    present: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    found: int = 0
    new: int = 0
    not_looked_at: dict[str, int] = field(default_factory=dict)

    def skip(self, source: str, error: Exception, strict: bool) -> None:
        """Count a picture that cannot be read, or a file that holds none.

        Raises:
            ValueError: `strict`, unless the file certainly holds no picture.
        """
        if isinstance(error, NoPictureError):
            if strict and not error.passed.harmless:
                raise ValueError(f"{source} is not looked at: {error.passed.reason}.")
            self.not_looked_at[error.passed.reason] = self.not_looked_at.get(error.passed.reason, 0) + 1
        else:
            skip(source, error, strict, self.skipped)
            self.found += 1


def add_images(
    protected: ProtectedSet,
    paths: Paths,
    radius: float | None = None,
    strict: bool = False,
    batch_size: int = 32,
    space: LatentSpace | None = None,
    mirror: bool = False,
    progress: bool = True,
    columns: Sequence[str] = (),
) -> AddedImages:
    """Encode images into a protected set.

    All frames of an animation and all pages of a document are images. Embedded colour profiles are applied.

    An image whose bytes (by SHA-256) are in the set already is not encoded again, so an interrupted run goes on where
    it stopped. Encoded images are saved every half minute and when the run ends, in any way but a kill.

    Args:
        protected: the set to add to.
        paths: one or several files, folders, globs, tar archives, parquet or Arrow files, or @FILE with a path on each
            line (`sources.pictures`).
        radius: shield radius of these images, L2 in the latent space; None leaves it open.
        strict: raise if an image cannot be read, or a file may hold pictures that are not recognised, instead of
            skipping it.
        batch_size: images per call of the encoder.
        space: the space with its autoencoder, `LatentSpace.of(pipe)`; needed for a set that was opened.
        mirror: also protect each image mirrored left to right, as `mirrored:ID`.
        progress: show a progress bar.
        columns: names of the columns of tables that hold images; none: the only one.

    Returns:
        How many images were found, added and present, which were skipped, and what was not looked at.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in it.
        ValueError: the space is not that of the set or cannot encode, a table has several columns of images of which
            none was named, or `strict` and an image cannot be read.
        RuntimeError: another process is writing to the set.
        OSError: the disk is full or the folder read-only.
    """
    space = space or protected.space
    protected.require_space(space)
    space.encode([])  # refuses a space without an autoencoder before anything is read
    sources.require_images(paths, columns)
    result = AddedImages()
    total = sources.count_pictures(paths) if progress else None
    bar = show_progress(total=total, desc="protect", unit="image", shown=progress)
    missing = _missing_images(protected, paths, space, mirror, strict, batch_size, result, bar, columns)
    with bar, closing(missing), Saver(protected, radius, result) as saver:
        # Whole batches are saved, so that a resumed run forms the same batches as one that was not interrupted.
        while batch := list(islice(missing, batch_size)):
            pixels = [picture for _, picture in batch]
            described = None if protected.descriptor is None else protected.describe(torch.stack(pixels))
            saver.append([image for image, _ in batch], encode_pixels(space, pixels), described)
    return result


def pixels_of(data: bytes, space: LatentSpace, frame: int = 0) -> Tensor:
    """Decode an image file, or one of its frames, to pixels (3, H, W) of the image size of a space."""
    if space.image_size is None:
        raise ValueError("the latent space has no image size.")
    return to_pixels(decode_picture(data, frame), space.image_size)


def frame_digest(digest: bytes, frame: int) -> bytes:
    """Compute the digest by which a set knows a frame: that of the file for the first, and of file and number else."""
    return hashlib.sha256(digest + b" frame %d" % frame).digest() if frame else digest


def frame_name(name: str, frame: int) -> str:
    """Name a frame of an image file: like the file for the first, `name#2` for the second."""
    return f"{name}#{frame + 1}" if frame else name


def encode_pixels(space: LatentSpace, pixels: list[Tensor]) -> Tensor:
    """Encode pixels (3, H, W) each as one batch of latents (n, *shape)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a batch of bright images is no mistake
        return space.encode(torch.stack(pixels), len(pixels))


class EncodedImage(NamedTuple):
    """Columns of an image that is about to be added: its id, source and digest."""

    id: str
    source: str
    sha256: str
    is_first: bool = True
    """Whether it is the first image that is added of its picture, and not its mirror image."""


class Saver:
    """Collect encoded images, and add them to a set now and then and at the end of the `with` block.

    Args:
        protected: the set.
        radius: shield radius of the images; None leaves it open.
        result: counts the images that were added.
    """

    def __init__(self, protected: ProtectedSet, radius: float | None, result: AddedImages) -> None:
        self._protected, self._radius, self._result = protected, radius, result
        self._images: list[EncodedImage] = []
        self._latents: list[Tensor] = []
        self._descriptors: list[Tensor] = []
        self._unsaved_bytes = 0
        self._saved = time.monotonic()

    def append(self, images: Sequence[EncodedImage], latents: Tensor, descriptors: Tensor | None = None) -> None:
        """Collect images with their latents (n, *shape); save if a kill would cost too much by now.

        In a set with a descriptor the images come with their `descriptors` (n, d).
        """
        self._images += images
        self._latents.append(latents)
        if descriptors is not None:
            self._descriptors.append(descriptors)
        self._unsaved_bytes += latents.nbytes
        if time.monotonic() - self._saved >= _SAVE_SECONDS or self._unsaved_bytes >= _SAVE_BYTES:
            self.save()
            self._saved = time.monotonic()

    def save(self) -> None:
        """Add all collected images to the set."""
        if not self._images:
            return
        latents, images = torch.cat(self._latents), list(self._images)
        given = (latents, torch.cat(self._descriptors)) if self._descriptors else latents
        self._latents.clear()
        self._descriptors.clear()
        self._images.clear()
        self._unsaved_bytes = 0
        ids, origins, digests, _ = zip(*images, strict=True)
        present: list[int] = []
        self._protected.add(given, ids, self._radius, origins, digests, present)
        self._result.added += len(images) - len(present)
        first, first_present = sum(image.is_first for image in images), sum(images[row].is_first for row in present)
        self._result.new += first - first_present
        self._result.present += first_present

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()


class KnownImages:
    """Digests and ids of the images in a set, to find what is missing and to name it.

    Args:
        protected: the set.
        mirror: whether each image is to be there mirrored as well.
    """

    def __init__(self, protected: ProtectedSet, mirror: bool) -> None:
        self._versions = (False, True) if mirror else (False,)
        self._names: set[Id] = set()
        self._digests: dict[bool, set[bytes]] = {False: set(), True: set()}  # by whether it is mirrored
        for name, digest in zip(protected.ids, protected.sha256, strict=True):
            self._names.add(name)
            if digest is not None:
                self._digests[is_mirrored(name)].add(bytes.fromhex(digest))

    def missing(self, digest: bytes) -> list[bool]:
        """List the missing versions of an image: False for the image itself, True for its mirror image."""
        return [mirrored for mirrored in self._versions if digest not in self._digests[mirrored]]

    def add(self, digest: bytes, name: str, mirrored: bool) -> str:
        """Count a version of an image among the known ones; return its id."""
        self._digests[mirrored].add(digest)
        return unique_name(MIRRORED + name if mirrored else name, self._names)

    def complete(self) -> set[bytes]:
        """List the digests of the images of which no version is missing."""
        return set.intersection(*(self._digests[mirrored] for mirrored in self._versions))


class _Read(NamedTuple):
    """An image file that has been read: content and digest, number of frames, problem, pixels of the first frame."""

    data: bytes
    digest: bytes
    frames: int
    problem: str | None
    pixels: Tensor | None


def _missing_images(
    protected: ProtectedSet,
    paths: Paths,
    space: LatentSpace,
    mirror: bool,
    strict: bool,
    ahead: int,
    result: AddedImages,
    bar: Bar,
    columns: Sequence[str],
) -> Generator[tuple[EncodedImage, Tensor]]:
    """Yield columns and pixels of each image that is not in the set yet and can be decoded, in order."""
    known = KnownImages(protected, mirror)
    pictures = sources.pictures(paths, columns) if columns else sources.pictures(paths)

    def prepare(picture: Picture) -> _Read | Exception:
        if picture.passed is not None:
            return NoPictureError(picture.passed)
        try:
            data = picture.read()
            digest = hashlib.sha256(data).digest()
            pixels = pixels_of(data, space) if known.missing(digest) else None
            return _Read(data, digest, *count_frames(data), pixels)
        except Exception as error:  # decoders raise all kinds of errors on broken files
            return error

    for picture, read in in_threads(prepare, pictures, ahead):
        if picture.passed is None:
            bar.update()
        if isinstance(read, Exception):
            result.skip(picture.source, read, strict)
            continue
        for frame in range(read.frames):
            digest = frame_digest(read.digest, frame)
            missing = known.missing(digest)
            source = frame_name(picture.source, frame)
            try:
                pixels = read.pixels if frame == 0 or not missing else pixels_of(read.data, space, frame)
            except Exception as error:
                result.skip(source, error, strict)
                continue
            result.found += 1
            result.present += not missing
            for number, mirrored in enumerate(missing):
                assert pixels is not None  # digests are only ever added, so it was missing when it was read
                name = known.add(digest, frame_name(picture.name, frame), mirrored)
                image = EncodedImage(name, source, digest.hex(), number == 0)
                yield image, pixels.flip(-1) if mirrored else pixels
        if read.problem is not None:
            result.skip(picture.source, ValueError(read.problem), strict)
