"""Read pictures out of tar archives, parquet files and Arrow files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from shielded._extras import missing
from shielded.protected.ingest.pictures import Picture

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TABLE_SUFFIXES = (".parquet", ".arrow")

_TABLE_ROWS_AT_ONCE = 64


# Tar archives ---------------------------------------------------------------------------------------------------------


def tar_pictures(name: str, path: str) -> Iterator[Picture]:
    """Yield the pictures of a tar archive (webdataset), one member after the other.

    Args:
        name: prefix of the pictures' names.
        path: the archive, compressed or not. A damaged one ends with a picture that cannot be read.
    """
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in _image_members(tar):
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                stem = os.path.splitext(member.name)[0]
                yield Picture(f"{name}/{stem}", f"{path}/{member.name}", partial(_known_bytes, data))
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Picture(name, path, partial(_fail, f"the archive is damaged: {error}"))


def count_tar_pictures(path: str) -> int | None:
    """Count the pictures of a tar archive; None if it would have to be decompressed, or is damaged."""
    if not path.lower().endswith(".tar"):
        return None
    try:
        with tarfile.open(path, "r:") as tar:
            return sum(1 for _ in _image_members(tar))
    except (OSError, EOFError, tarfile.TarError, ValueError):
        return None  # reading it reports what is wrong


def _image_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        # tarfile remembers every member, a kilobyte each; its types do not name the list.
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
            yield member


# Tables ---------------------------------------------------------------------------------------------------------------


def table_pictures(name: str, path: str) -> Iterator[Picture]:
    """Yield the pictures of a parquet file, or of an Arrow file as Hugging Face `datasets` saves it, row by row.

    Args:
        name: prefix of the pictures' names.
        path: the table. A damaged one ends with a picture that cannot be read.

    Raises:
        RuntimeError: pyarrow is not installed.
        ValueError: the table has no column of images.
    """
    row = 0
    try:
        for column in _image_columns(path):
            for value in column.to_pylist():
                data, file = (value or {}).get("bytes"), (value or {}).get("path")
                read = Path(file).read_bytes if data is None and file else partial(_known_bytes, data)
                yield Picture(f"{name}/{row}", f"{path}/{row}", read)
                row += 1
    except (OSError, _pyarrow().ArrowException) as error:
        yield Picture(name, path, partial(_fail, f"the table is damaged: {error}"))


def count_table_pictures(path: str) -> int | None:
    """Count the rows of a table; None if it is damaged."""
    pa = _pyarrow()
    try:
        if path.lower().endswith(".parquet"):
            return pa.parquet.ParquetFile(path).metadata.num_rows
        return sum(len(batch) for batch in pa.ipc.open_stream(pa.memory_map(path)))
    except (OSError, EOFError, ValueError):
        return None  # reading it reports what is wrong


def _image_columns(path: str) -> Iterator[Any]:
    """Yield the images of a table, some rows at a time, as Arrow arrays of {bytes, path} as `datasets` stores them."""
    pa = _pyarrow()
    if path.lower().endswith(".parquet"):
        table = pa.parquet.ParquetFile(path)
        name = _image_column_name(table.schema_arrow, path)
        batches = table.iter_batches(batch_size=_TABLE_ROWS_AT_ONCE, columns=[name])
    else:
        batches = pa.ipc.open_stream(pa.memory_map(path))
        name = _image_column_name(batches.schema, path)
    for batch in batches:
        for start in range(0, len(batch), _TABLE_ROWS_AT_ONCE):
            column = batch.column(name)[start : start + _TABLE_ROWS_AT_ONCE]
            if not pa.types.is_struct(column.type):
                column = pa.StructArray.from_arrays([column], ["bytes"])
            yield column


def _image_column_name(schema: Any, path: str) -> str:
    """Choose the column with {bytes, path}, or else the only one of bytes."""
    types = _pyarrow().types
    encoded = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    if not encoded and len(binary) != 1:
        raise ValueError(
            f"{path} has no column of images (a struct with `bytes`, or one binary column); it has {schema.names}."
        )
    return (encoded or binary)[0]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeError(missing("Parquet and Arrow files", "parquet")) from None
    return pyarrow


def _known_bytes(data: bytes | None) -> bytes:
    return _fail("the table has no image in this row") if data is None else data


def _fail(reason: str) -> NoReturn:
    raise ValueError(reason)
