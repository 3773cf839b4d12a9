"""Find the images that paths stand for: files, folders, globs, tar archives, tables, lists of paths."""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from PIL import Image

from shielded.files import sha256
from shielded.protected.columns import Id
from shielded.protected.ingest import contents
from shielded.protected.ingest.archives import TAR_SUFFIXES, count_tar_pictures, tar_pictures
from shielded.protected.ingest.pictures import (
    IMAGE_SUFFIXES,
    NoPictureError,
    Passed,
    Picture,
    count_frames,
    decode_picture,
    skip,
    unique_name,
)
from shielded.protected.ingest.tables import (
    TABLE_SUFFIXES,
    NoImagesError,
    count_table_pictures,
    image_columns,
    table_pictures,
)

Paths = str | Path | Iterable[str | Path]

_READ_BEFORE = Passed("folders that were read already", True)
_CACHE = Passed("caches of datasets", True)
_SHEET = Passed("picture grids of a run", True)
_SHEETS = ("grid.png", "diversity.png")  # of a folder that `shielded generate` or `demo` has written


def find_images(paths: Paths) -> list[tuple[str, Path]]:
    """List the image files of files, folders and globs: (path below the given one without suffix, path), each once.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in it.
    """
    found: dict[str, tuple[str, Path]] = {}
    for given in _each(paths):
        matching = [(name, path) for name, path in _files_of(given) if _is_image_file(path)]
        if not matching:
            raise FileNotFoundError(f"No images at {given}; expected an image, a folder of images or a glob.")
        for name, path in matching:
            found.setdefault(os.path.realpath(path), (name, Path(path)))
    return list(found.values())


def require_images(paths: Paths, columns: Sequence[str] = ()) -> None:
    """Refuse paths without images, and tables whose column is not clear, before anything is read.

    Args:
        paths: as in `pictures`.
        columns: as in `pictures`.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image, archive or table in it.
        ValueError: a table has several columns of images of which none was named, or not those that were named.
    """
    for given in _each(paths):
        some = False
        for name, path in _files_of(given):
            kind = _kind(path)
            if kind == "table":
                try:
                    image_columns(path, columns)
                except NoImagesError:
                    if columns or path == given:
                        raise
                except OSError:
                    pass  # damaged; reading it reports that
            some = some or kind != "other" or _first(name, path).passed is None
        if not some:
            raise FileNotFoundError(
                f"No images at {given}; expected an image, a folder, a glob, a .tar, .parquet or .arrow file, or "
                "@FILE with a path on each line."
            )


def pictures(paths: Paths, columns: Sequence[str] = ()) -> Iterator[Picture]:
    """Yield all images of the given paths, in an order that depends on names alone.

    What cannot be read, and what is passed over, is a `Picture` as well, so that nothing is left out in silence.
    Content decides what a file is; names decide where it can be told from the suffix of a picture.

    Args:
        paths: one or several image files, folders (with their subfolders and hidden files), globs, tar archives
            (webdataset), parquet files, Arrow files as Hugging Face `datasets` saves them, and @FILE for a text file
            with such a path on each line.
        columns: names of the columns of a table that hold images; none: the only one.
    """
    for name, path in files(paths):
        yield from pictures_in(name, path, columns)


def files(paths: Paths) -> Iterator[tuple[str, str]]:
    """Yield (name, path) of everything at the given paths, in the order of `pictures`.

    The name is the path below the given one, without suffix.
    """
    for given in _each(paths):
        yield from _files_of(given)


def holds_many(path: str) -> bool:
    """Tell whether a file is an archive or a table, by its content."""
    return _kind(path) != "other"


def pictures_in(name: str, path: str, columns: Sequence[str] = ()) -> Iterator[Picture]:
    """Yield the pictures of one image file, archive or table, as `files` names it.

    Raises:
        RuntimeError: pyarrow is not installed, which a table needs.
        ValueError: the column of images of a table is not clear.
    """
    kind = _kind(path)
    if kind == "tar":
        yield from tar_pictures(name, path)
    elif kind == "table" and _is_cache(path):
        yield Picture(name, path, _no_bytes, _CACHE)
    elif kind == "table":
        yield from table_pictures(name, path, columns)
    else:
        yield _first(name, path)


def count_pictures(paths: Paths) -> int | None:
    """Count the images without reading them; None if an archive would have to be decompressed."""
    total = 0
    for name, path in files(paths):
        kind = _kind(path)
        if kind == "tar":
            number = count_tar_pictures(path)
        elif kind == "table":
            number = 0 if _is_cache(path) else count_table_pictures(path)
        else:
            number = int(_first(name, path).passed is None)
        if number is None:
            return None
        total += number
    return total


def load_images(
    paths: Paths, strict: bool = False, not_looked_at: Counter[str] | None = None
) -> tuple[list[tuple[str, Image.Image, str, str]], list[tuple[str, str]]]:
    """Load all images of files, folders (with their subfolders) and globs into memory.

    Of an animation or a document of several pages the first picture is loaded, and the others are among the skipped.

    Args:
        paths: one or several files, folders or globs.
        strict: raise if a file cannot be decoded, instead of skipping it.
        not_looked_at: counts files that hold no picture, by what they are.

    Returns:
        A list of (id, image in sRGB, path, SHA-256 of the file), with unique ids from the paths below the given folder,
        without suffix; and a list of (path, reason) of what was skipped.

    Raises:
        FileNotFoundError: a path does not exist, or there is no image in it.
        ValueError: `strict`, and a file cannot be decoded.
    """
    loaded: list[tuple[str, Image.Image, str, str]] = []
    skipped: list[tuple[str, str]] = []
    taken: set[Id] = set()
    seen: set[str] = set()
    for given in _each(paths):
        some = False
        for name, path in _files_of(given):
            some = some or _first(name, path).passed is None
            if (resolved := os.path.realpath(path)) in seen:
                continue
            seen.add(resolved)
            kind = _kind(path)
            reason = "an archive or a table; its pictures are read by `shielded protect` alone"
            picture = _first(name, path) if kind == "other" else Picture(name, path, partial(_fail, reason))
            try:
                if picture.passed is not None:
                    raise NoPictureError(picture.passed)
                data = picture.read()
                image = decode_picture(data)
                frames, _ = count_frames(data)
            except NoPictureError as error:
                if not_looked_at is not None:
                    not_looked_at[error.passed.reason] += 1
            except Exception as error:  # decoders raise all kinds of errors on broken files
                skip(path, error, strict, skipped)
            else:
                loaded.append((unique_name(name, taken), image, path, sha256(data)))
                if frames > 1:
                    skip(path, ValueError(f"only the first of its {frames} pictures is looked at"), strict, skipped)
        if not some:
            raise FileNotFoundError(f"No images at {given}; expected an image, a folder of images or a glob.")
    return loaded, skipped


def _each(paths: Paths) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


# What a file is -------------------------------------------------------------------------------------------------------


def _kind(path: str) -> contents.Kind:
    """Tell archives and tables from other files, by content where the suffix is not that of a picture."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return "other"
    try:
        head = _head(path)
    except OSError:
        return "other"  # reading it reports what is wrong
    kind = contents.kind_of(head)
    if kind == "other" and contents.is_picture(head):
        return kind
    if kind == "other" and (path.lower().endswith(TAR_SUFFIXES) or contents.is_compressed_tar(path, head)):
        return "tar"  # a damaged one, or one that is compressed
    return "table" if kind == "other" and path.lower().endswith(TABLE_SUFFIXES) else kind


def _first(name: str, path: str) -> Picture:
    """Make the picture of a file that is no archive and no table."""
    if _is_sheet(path):
        return Picture(name, path, _no_bytes, _SHEET)
    if path.lower().endswith(IMAGE_SUFFIXES) and not os.path.isdir(path):
        return Picture(name, path, Path(path).read_bytes)
    try:
        if os.path.isdir(path):
            os.listdir(path)  # raises an error if that was why it is here
            return Picture(name, path, _no_bytes, _READ_BEFORE)
        if stat.S_ISFIFO(os.stat(path).st_mode):  # given by its name, and read only once
            return Picture(name, path, Path(path).read_bytes)
        head = _head(path)
    except OSError as error:
        return Picture(name, path, partial(_fail, error.strerror or str(error)))
    text, reason = contents.without_pictures(head), contents.not_read(head)
    if text is not None:
        return Picture(name, path, _no_bytes, Passed(text, True))
    if reason is not None:
        return Picture(name, path, partial(_fail, reason))
    if contents.is_picture(head) or _is_image_file(path):
        return Picture(name, path, Path(path).read_bytes)
    return Picture(name, path, _no_bytes, Passed("files in which no picture is recognised", False))


def _is_sheet(path: str) -> bool:
    """Tell whether a picture is the grid of a run beside its report, which shows its pictures once more."""
    folder, name = os.path.split(path)
    return (
        name in _SHEETS
        and os.path.isfile(os.path.join(folder, "report.json"))
        and os.path.isdir(os.path.join(folder, "with"))
    )


def _is_image_file(path: str) -> bool:
    """Tell whether Pillow opens a file, or its suffix says that it is a picture."""
    if _is_sheet(path):
        return False
    if path.lower().endswith(IMAGE_SUFFIXES):
        return not os.path.isdir(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        if contents.without_pictures(_head(path)) is not None:
            return False
        with Image.open(path):
            return True
    except Exception:  # decoders raise all kinds of errors on other files
        return False


def _head(path: str) -> bytes:
    """Read the first bytes of a file; nothing of a pipe, which could be read only once."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b"\xff" * 8
    with open(path, "rb") as file:
        return file.read(contents.HEAD_BYTES)


def _is_cache(path: str) -> bool:
    """Tell whether a table is an intermediate result that Hugging Face `datasets` keeps."""
    name = os.path.basename(path)
    return name.startswith("cache-") and name.endswith(".arrow")


def _no_bytes() -> bytes:
    return b""


def _fail(reason: str) -> NoReturn:
    raise ValueError(reason)


# Where files are ------------------------------------------------------------------------------------------------------


def _files_of(given: str) -> Iterator[tuple[str, str]]:
    """Yield (path below the given one without suffix, path) of everything that a given path stands for, in order."""
    if not given.startswith("@"):
        yield from _matching_files(given)
        return
    if not os.path.isfile(given[1:]):
        raise FileNotFoundError(f"There is no list of paths at {given[1:]}.")
    with open(given[1:], encoding="utf-8", errors="surrogateescape") as lines:
        for path in filter(None, map(str.strip, lines)):
            if os.path.isdir(path):
                yield from _matching_files(path)
            else:
                yield _stem(os.path.basename(path)), path  # a missing file is reported like a broken one


def _matching_files(given: str) -> Iterator[tuple[str, str]]:
    if os.path.isdir(given):
        yield from _walk(given, "", set())
    elif os.path.exists(given) or not glob.has_magic(given):
        if os.path.lexists(given):
            yield _stem(os.path.basename(given)), given
    else:
        root = given
        while glob.has_magic(root):
            root = os.path.dirname(root)
        seen: set[tuple[int, int]] = set()
        matching = glob.iglob(given, recursive=True, include_hidden=True)
        for path in sorted(matching, key=lambda path: Path(path).parts):
            below = Path(os.path.relpath(path, root or ".")).as_posix()
            if os.path.isdir(path):
                if "**" not in given:  # which matches what is in the folder as well
                    yield from _walk(path, f"{below}/", seen)
            else:
                yield _stem(below), path


def _walk(folder: str, below: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield the files of a folder and its subfolders, also behind links; what cannot be read is among them.

    Args:
        folder: the folder.
        below: its path below the given one, with a slash.
        seen: device and number of the folders that were read, so that links in a circle end.
    """
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
    except OSError:
        yield below.rstrip("/") or ".", folder
        return
    if (status.st_dev, status.st_ino) in seen:
        yield below.rstrip("/") or ".", folder
        return
    seen.add((status.st_dev, status.st_ino))
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, f"{below}{name}/", seen)
        else:  # a pipe would wait for its writer; with a slash it cannot be opened
            yield below + _stem(name), path if os.path.isfile(path) or os.path.islink(path) else os.path.join(path, "")


def _stem(name: str) -> str:
    """Strip the suffix of a file name, which may have two parts (.tar.gz)."""
    stem, suffix = os.path.splitext(name)
    return stem.removesuffix(".tar") if suffix.lower() in (".gz", ".bz2", ".xz") else stem
