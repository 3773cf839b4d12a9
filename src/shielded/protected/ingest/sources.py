"""Find the images that paths stand for: files, folders, globs, tar archives, tables, lists of paths."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from shielded.files import sha256
from shielded.protected.columns import Id
from shielded.protected.ingest.archives import (
    IMAGE_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    count_table_pictures,
    count_tar_pictures,
    table_pictures,
    tar_pictures,
)
from shielded.protected.ingest.pictures import Picture, decode_picture, skip, unique_name

Paths = str | Path | Iterable[str | Path]


def find_images(paths: Paths) -> list[tuple[str, Path]]:
    """List the image files of files, folders and globs: (path below the given one without suffix, path), each once.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in it.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for given in _each(paths):
        matching = list(_matching_files(given, IMAGE_SUFFIXES))
        if not matching:
            raise FileNotFoundError(f"No images at {given}; expected an image, a folder of images or a glob.")
        for name, path in matching:
            found.setdefault(Path(path).resolve(), (name, Path(path)))
    return list(found.values())


def require_images(paths: Paths) -> None:
    """Refuse paths without images, before anything is read.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image, archive or table in it.
    """
    for given in _each(paths):
        if next(_files_of(given), None) is None:
            raise FileNotFoundError(
                f"No images at {given}; expected an image, a folder, a glob, a .tar, .parquet or .arrow file, or "
                "@FILE with a path on each line."
            )


def pictures(paths: Paths) -> Iterator[Picture]:
    """Yield all images of the given paths, in an order that depends on names alone.

    Args:
        paths: one or several image files, folders (with their subfolders), globs, tar archives (webdataset), parquet
            files, Arrow files as Hugging Face `datasets` saves them, and @FILE for a text file with such a path on each
            line.
    """
    for name, path in files(paths):
        yield from pictures_in(name, path)


def files(paths: Paths) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the images, archives and tables of the given paths, in the order of `pictures`.

    The name is the path below the given one, without suffix.
    """
    for given in _each(paths):
        yield from _files_of(given)


def holds_many(path: str) -> bool:
    """Tell whether a file is an archive or a table, by its name."""
    return path.lower().endswith(TAR_SUFFIXES + TABLE_SUFFIXES)


def pictures_in(name: str, path: str) -> Iterator[Picture]:
    """Yield the pictures of one image file, archive or table, as `files` names it."""
    if path.lower().endswith(TAR_SUFFIXES):
        yield from tar_pictures(name, path)
    elif path.lower().endswith(TABLE_SUFFIXES):
        yield from table_pictures(name, path)
    else:
        yield Picture(name, path, Path(path).read_bytes)


def count_pictures(paths: Paths) -> int | None:
    """Count the images without reading them; None if an archive would have to be decompressed."""
    total = 0
    for _, path in files(paths):
        number = _count_in(path)
        if number is None:
            return None
        total += number
    return total


def load_images(
    paths: Paths, strict: bool = False
) -> tuple[list[tuple[str, Image.Image, str, str]], list[tuple[str, str]]]:
    """Load all images of files, folders (with their subfolders) and globs into memory.

    Args:
        paths: one or several files, folders or globs.
        strict: raise if a file cannot be decoded, instead of skipping it.

    Returns:
        A list of (id, RGB image, path, SHA-256 of the file), with unique ids from the paths below the given folder,
        without suffix; and a list of (path, reason) of the files that were skipped.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in it.
        ValueError: `strict`, and a file cannot be decoded.
    """
    loaded: list[tuple[str, Image.Image, str, str]] = []
    skipped: list[tuple[str, str]] = []
    taken: set[Id] = set()
    for name, path in find_images(paths):
        try:
            data = path.read_bytes()
            image = decode_picture(data)
        except Exception as error:  # decoders raise all kinds of errors on broken files
            skip(str(path), error, strict, skipped)
        else:
            loaded.append((unique_name(name, taken), image, str(path), sha256(data)))
    return loaded, skipped


def _count_in(path: str) -> int | None:
    if path.lower().endswith(TAR_SUFFIXES):
        return count_tar_pictures(path)
    return count_table_pictures(path) if path.lower().endswith(TABLE_SUFFIXES) else 1


def _each(paths: Paths) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _files_of(given: str) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of the images, archives and tables that a given path stands for."""
    if not given.startswith("@"):
        yield from _matching_files(given, IMAGE_SUFFIXES + TAR_SUFFIXES + TABLE_SUFFIXES)
        return
    if not os.path.isfile(given[1:]):
        raise FileNotFoundError(f"There is no list of paths at {given[1:]}.")
    with open(given[1:], encoding="utf-8", errors="surrogateescape") as lines:
        for path in filter(None, map(str.strip, lines)):
            if os.path.isdir(path):
                yield from _files_of(path)
            else:
                yield _stem(os.path.basename(path)), path  # a missing file is reported like a broken one


def _matching_files(given: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (path below the given one without suffix, path) of the files that a path stands for, in order."""
    if os.path.isdir(given):
        yield from _walk(given, "", suffixes)
    elif os.path.isfile(given):
        yield _stem(os.path.basename(given)), given
    else:
        root = given
        while glob.has_magic(root):
            root = os.path.dirname(root)
        for path in sorted(glob.iglob(given, recursive=True), key=lambda path: Path(path).parts):
            if path.lower().endswith(suffixes) and os.path.isfile(path):
                yield _stem(Path(os.path.relpath(path, root or ".")).as_posix()), path


def _walk(folder: str, below: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, f"{below}{name}/", suffixes)
        # Hugging Face datasets keeps intermediate results in cache-*.arrow.
        elif name.lower().endswith(suffixes) and not (name.startswith("cache-") and name.endswith(".arrow")):
            yield below + _stem(name), path


def _stem(name: str) -> str:
    """Strip the suffix of a file name, which may have two parts (.tar.gz)."""
    stem, suffix = os.path.splitext(name)
    return stem.removesuffix(".tar") if suffix.lower() in (".gz", ".bz2", ".xz") else stem
