"""Where images come from: files, folders, globs, tar archives, parquet and Arrow files, lists of paths."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_IMAGES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_TABLES = (".parquet", ".arrow")

Paths = str | Path | Iterable[str | Path]


@dataclass(frozen=True)
class Picture:
    """An image that has not been read yet.

    Args:
        name: where it lies below the given path, without suffix.
        source: its path; for one in an archive or table, that of the file and its place in there.
        read: its bytes; raises whatever is wrong with it.
    """

    name: str
    source: str
    read: Callable[[], bytes]


def find_images(paths: Paths) -> list[tuple[str, Path]]:
    """The image files of files, folders and globs: (path relative to the given one without suffix, path), each once.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image in it.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for given in _each(paths):
        files = list(_files(given, _IMAGES))
        if not files:
            raise FileNotFoundError(f"No images at {given}; expected an image, a folder of images or a glob.")
        for name, path in files:
            found.setdefault(Path(path).resolve(), (name, Path(path)))
    return list(found.values())


def require_images(paths: Paths) -> None:
    """Refuses paths with nothing to protect, before anything is read.

    Raises:
        FileNotFoundError: if a path does not exist, or there is no image, archive or table in it.
    """
    for given in _each(paths):
        if next(_containers(given), None) is None:
            raise FileNotFoundError(
                f"No images at {given}; expected an image, a folder, a glob, a .tar, .parquet or .arrow file, or "
                "@FILE with a path on each line."
            )


def pictures(paths: Paths) -> Iterator[Picture]:
    """All images of the given paths, in an order that depends on nothing but names.

    Args:
        paths: one or several image files, folders (with their subfolders), globs, tar archives (webdataset), parquet
            files, Arrow files as Hugging Face `datasets` saves them, and @FILE for a text file with such a path on each
            line.
    """
    for given in _each(paths):
        for name, path in _containers(given):
            yield from _reader(path)(name, path)


def count(paths: Paths) -> int | None:
    """How many images there are, without reading them; None if that would mean to decompress an archive."""
    total = 0
    for given in _each(paths):
        for _, path in _containers(given):
            number = _count(path)
            if number is None:
                return None
            total += number
    return total


def _each(paths: Paths) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _containers(given: str) -> Iterator[tuple[str, str]]:
    """(name, path) of the images, archives and tables that a given path stands for."""
    if not given.startswith("@"):
        yield from _files(given, _IMAGES + _TARS + _TABLES)
        return
    if not os.path.isfile(given[1:]):
        raise FileNotFoundError(f"There is no list of paths at {given[1:]}.")
    with open(given[1:], encoding="utf-8", errors="surrogateescape") as lines:
        for path in filter(None, map(str.strip, lines)):
            if os.path.isdir(path):
                yield from _containers(path)
            else:
                yield _stem(os.path.basename(path)), path  # one that is missing is reported like one that is broken


def _files(given: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(path relative to the given one without suffix, path) of the files that a path stands for, in order."""
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
    """A name without its suffix, which may have two parts (.tar.gz)."""
    stem, suffix = os.path.splitext(name)
    return stem.removesuffix(".tar") if suffix.lower() in (".gz", ".bz2", ".xz") else stem


# ---- readers: each yields the pictures of one file ----


def _reader(path: str) -> Callable[[str, str], Iterator[Picture]]:
    lower = path.lower()
    return _in_tar if lower.endswith(_TARS) else _in_table if lower.endswith(_TABLES) else _image


def _image(name: str, path: str) -> Iterator[Picture]:
    yield Picture(name, path, Path(path).read_bytes)


def _in_tar(name: str, path: str) -> Iterator[Picture]:
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in _members(tar):
                data = tar.extractfile(member).read()
                yield Picture(
                    f"{name}/{os.path.splitext(member.name)[0]}", f"{path}/{member.name}", partial(_given, data)
                )
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Picture(name, path, partial(_fail, f"the archive is damaged: {error}"))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # tarfile remembers every member, a kilobyte each
        if member.isfile() and member.name.lower().endswith(_IMAGES):
            yield member


def _in_table(name: str, path: str) -> Iterator[Picture]:
    row = 0
    try:
        for column in _batches(path):
            for value in column.to_pylist():
                data, file = (value or {}).get("bytes"), (value or {}).get("path")
                read = Path(file).read_bytes if data is None and file else partial(_given, data)
                yield Picture(f"{name}/{row}", f"{path}/{row}", read)
                row += 1
    except (OSError, _pyarrow().ArrowException) as error:
        yield Picture(name, path, partial(_fail, f"the table is damaged: {error}"))


def _batches(path: str) -> Iterator[Any]:
    """The images of a table, some at a time: Arrow arrays of {bytes, path}, as Hugging Face datasets stores them."""
    pa = _pyarrow()
    if path.lower().endswith(".parquet"):
        table = pa.parquet.ParquetFile(path)
        name = _image_column(table.schema_arrow, path)
        batches = table.iter_batches(batch_size=64, columns=[name])
    else:
        batches = pa.ipc.open_stream(pa.memory_map(path))
        name = _image_column(batches.schema, path)
    for batch in batches:
        for start in range(0, len(batch), 64):
            column = batch.column(name)[start : start + 64]
            if not pa.types.is_struct(column.type):
                column = pa.StructArray.from_arrays([column], ["bytes"])
            yield column


def _image_column(schema: Any, path: str) -> str:
    """The column with {bytes, path}, or else the only one of bytes."""
    types = _pyarrow().types
    encoded = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    if not encoded and len(binary) != 1:
        raise ValueError(
            f"{path} has no column of images (a struct with `bytes`, or one binary column); it has {schema.names}."
        )
    return (encoded or binary)[0]


def _count(path: str) -> int | None:
    lower = path.lower()
    try:
        if lower.endswith(".tar"):
            with tarfile.open(path, "r:") as tar:
                return sum(1 for _ in _members(tar))
        if lower.endswith(_TARS):
            return None
        if lower.endswith(".parquet"):
            return _pyarrow().parquet.ParquetFile(path).metadata.num_rows
        if lower.endswith(".arrow"):
            pa = _pyarrow()
            return sum(len(batch) for batch in pa.ipc.open_stream(pa.memory_map(path)))
    except (OSError, EOFError, tarfile.TarError, ValueError):
        return None  # what is wrong is reported when it is read
    return 1


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeError("Parquet and Arrow files need pyarrow: pip install 'shielded[parquet]'.") from None
    return pyarrow


def _given(data: bytes | None) -> bytes:
    return _fail("the table has no image in this row") if data is None else data


def _fail(reason: str) -> bytes:
    raise ValueError(reason)
