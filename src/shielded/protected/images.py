"""From image files to a protected set."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from ..latent_space import LatentSpace, to_rgb
from .protected_set import ProtectedSet
from .store import file_sha256

_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

Paths = str | Path | Iterable[str | Path]


@dataclass
class AddedImages:
    """What became of the images.

    Args:
        added: how many were encoded and added.
        present: how many were in the set already, or were given twice.
        skipped: path and reason of each file that could not be decoded.
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
        image = _open(path, strict, skipped)
        if image is not None:
            loaded.append((_unique(name, taken), image, str(path), file_sha256(path)))
    return loaded, skipped


def add_images(
    protected: ProtectedSet,
    paths: Paths,
    radius: float | None = None,
    strict: bool = False,
    batch_size: int = 32,
    space: LatentSpace | None = None,
) -> AddedImages:
    """Encodes images into a protected set, with a progress bar.

    An image whose file (by SHA-256) is in the set already is not encoded again, so a run that was interrupted goes on
    where it stopped.

    Args:
        protected: the set to add to.
        paths: one or several files, folders or globs.
        radius: of the shields, L2 in the latent space; None leaves it open.
        strict: raise if a file cannot be decoded, instead of skipping it.
        batch_size: images per call of the encoder.
        space: the space with its autoencoder, `LatentSpace.of(pipe)`; needed for a set that was opened.

    Returns:
        How many images were added and how many were present, and which files were skipped.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image in it.
        ValueError: if the space is not that of the set or cannot encode, or `strict` and a file cannot be decoded.
    """
    space = space or protected.space
    protected.require_space(space)
    result = AddedImages()
    files = find_images(paths)
    with tqdm(total=len(files), desc="protect", unit="image") as progress:
        images = _new_images(protected, files, strict, result, progress)
        # Each batch is a version of its own: what has been encoded stays, whatever happens next.
        while batch := list(islice(images, batch_size)):
            ids, pictures, sources, sha256 = zip(*batch, strict=True)
            protected.add(space.encode(pictures, batch_size), ids, radius, sources, sha256)
            result.added += len(batch)
            progress.update(len(batch))
    return result


def find_images(paths: Paths) -> list[tuple[str, Path]]:
    """The image files of files, folders and globs: (path relative to the given one without suffix, path), each once.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image in it.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        root, files = _files(Path(path))
        if not files:
            raise FileNotFoundError(f"No images at {path}; expected an image, a folder of images or a glob.")
        for file in files:
            name = file.relative_to(root).with_suffix("").as_posix()
            found.setdefault(file.resolve(), (name, file))
    return list(found.values())


def _files(path: Path) -> tuple[Path, list[Path]]:
    """The images that a path stands for, in order, and the folder that their names are relative to."""
    if path.is_dir():
        return path, sorted(file for file in path.rglob("*") if _is_image(file))
    if path.is_file():
        return path.parent, [path]
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    return root, sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if _is_image(file))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def _new_images(
    protected: ProtectedSet, files: list[tuple[str, Path]], strict: bool, result: AddedImages, progress: tqdm
) -> Iterator[tuple[str, Image.Image, str, str]]:
    """(id, image, source, digest) of each file that is not in the set yet and can be decoded."""
    taken, digests = set(protected.ids), set(protected.sha256)
    for name, path in files:
        digest = file_sha256(path)
        if digest in digests:
            result.present += 1
            progress.update()
            continue
        image = _open(path, strict, result.skipped)
        if image is None:
            progress.update()
            continue
        digests.add(digest)
        yield _unique(name, taken), image, str(path), digest


def _open(path: Path, strict: bool, skipped: list[tuple[str, str]]) -> Image.Image | None:
    """An image, upright and in RGB; None, with the reason in `skipped`, if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise all kinds of errors on broken files
        if strict:
            raise ValueError(f"{path} cannot be decoded: {error}") from error
        skipped.append((str(path), str(error)))
        return None


def _unique(name: str, taken: set[str | int]) -> str:
    """The name, with a number if it is taken; takes it."""
    free = next(i for i in chain([name], (f"{name}-{n}" for n in count(2))) if i not in taken)
    taken.add(free)
    return free
