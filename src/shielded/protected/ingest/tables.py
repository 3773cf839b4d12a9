"""Read pictures out of tables: parquet files, Arrow streams as `datasets` saves them, Arrow files (Feather)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from shielded._extras import missing
from shielded.protected.ingest.pictures import IMAGE_SUFFIXES, Passed, Picture, open_image

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")

_ROWS_AT_ONCE = 64
_ROWS_LOOKED_AT = 16  # to tell whether a column holds pictures
_STREAM_START, _STREAM_END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


class NoImagesError(ValueError):
    """A table without a column of images; `harmless` if its columns are numbers and text alone."""

    def __init__(self, path: str, schema: Any) -> None:
        super().__init__(
            f"{path} has no column of images (a struct with `bytes`, or one binary column); it has {schema.names}."
        )
        types = _pyarrow().types
        other = types.is_nested, types.is_dictionary, types.is_fixed_size_binary
        self.harmless = not any(is_other(field.type) for field in schema for is_other in other)


def table_pictures(name: str, path: str, columns: Sequence[str] = ()) -> Iterator[Picture]:
    """Yield the pictures of a table, row by row.

    Args:
        name: prefix of the pictures' names.
        path: the table. What is damaged is a picture that cannot be read, at the end.
        columns: names of the columns with images; none: the only one.

    Raises:
        RuntimeError: pyarrow is not installed.
        ValueError: the table has several columns of images of which none was named, or not those that were named.
    """
    pa = _pyarrow()
    row = 0
    try:
        try:
            chosen = image_columns(path, columns)
        except NoImagesError as error:
            if columns:
                raise
            yield Picture(name, path, bytes, Passed("tables without a column of images", error.harmless))
            return
        for batch in _batches(path, chosen):
            for values in zip(*(batch.column(column).to_pylist() for column in chosen), strict=True):
                for column, value in zip(chosen, values, strict=True):
                    place = f"{row}/{column}" if len(chosen) > 1 else str(row)
                    yield from _cell_pictures(f"{name}/{place}", f"{path}/{place}", value)
                row += 1
        damage = _damage(path)
    except (OSError, EOFError, pa.ArrowException) as error:
        damage = str(error).splitlines()[0] if str(error) else type(error).__name__
    if damage is not None:
        yield Picture(name, path, partial(_fail, f"the table is damaged: {damage}"))


def count_table_pictures(path: str) -> int | None:
    """Count the rows of a table; None if it is damaged."""
    try:
        return sum(len(batch) for batch in _batches(path, []))
    except (OSError, EOFError, ValueError):
        return None  # reading it reports what is wrong


def image_columns(path: str, columns: Sequence[str] = ()) -> list[str]:
    """Choose the columns of a table that hold images.

    Args:
        path: the table.
        columns: names; none: the only column whose values are pictures.

    Raises:
        OSError: the table is damaged.
        ValueError: it has none or several, or not those that were named.
    """
    try:
        schema, rows = _sample(path)
    except _pyarrow().ArrowException as error:
        raise OSError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    possible = [field.name for field in schema if _may_hold_images(field.type)]
    if columns:
        wrong = [name for name in columns if name not in possible]
        if wrong:
            raise ValueError(f"{path} has no column of images named {wrong[0]!r}; it has {schema.names}.")
        return [name for name in possible if name in columns]
    values = {name: [row[name] for row in rows if row[name]] for name in possible}
    found = [name for name in possible if any(map(_is_picture, values[name]))]
    if not found:  # empty or damaged in these rows: the type decides
        encoded = [field.name for field in schema if field.name in possible and not _is_binary(field.type)]
        sized = _pyarrow().types.is_fixed_size_binary  # pictures are hardly of one size; digests are
        found = encoded or [field.name for field in schema if field.name in possible and not sized(field.type)]
    if not found:
        raise NoImagesError(path, schema)
    if len(found) > 1:
        raise ValueError(
            f"{path} has several columns of images: {', '.join(found)}; name those to protect with --column (columns=)."
        )
    return found


def _may_hold_images(kind: Any) -> bool:
    types = _pyarrow().types
    lists = types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_dictionary
    if any(has_values(kind) for has_values in lists):
        return _may_hold_images(kind.value_type)
    return _is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _is_binary(kind: Any) -> bool:
    types = _pyarrow().types
    kinds = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(is_kind(kind) for is_kind in kinds) and not types.is_decimal(kind)


def _is_picture(value: Any) -> bool:
    """Tell whether a value, or one of a list, is a picture."""
    if isinstance(value, list):
        return any(_is_picture(part) for part in value if part)
    data, file = (value, None) if isinstance(value, bytes) else (value.get("bytes"), value.get("path"))
    if data is None:
        return str(file or "").lower().endswith(IMAGE_SUFFIXES)
    try:
        with open_image(data):
            return True
    except Exception:  # decoders raise all kinds of errors
        return False


def _cell_pictures(name: str, source: str, value: Any) -> Iterator[Picture]:
    if isinstance(value, list) and value:
        for number, part in enumerate(value):
            yield from _cell_pictures(f"{name}/{number}", f"{source}/{number}", part)
        return
    value = value if isinstance(value, dict) else {"bytes": value or None}
    data, file = value.get("bytes"), value.get("path")
    if data is None and file:
        yield Picture(name, source, Path(file).read_bytes)
    elif data is None:
        yield Picture(name, source, partial(_fail, "the table has no image in this row"))
    else:
        yield Picture(name, source, partial(bytes, data))


# Formats --------------------------------------------------------------------------------------------------------------


def _batches(path: str, columns: Sequence[str]) -> Iterator[Any]:
    """Yield record batches of some rows with these columns."""
    pa = _pyarrow()
    if _is_parquet(path):
        table = pa.parquet.ParquetFile(path)
        yield from table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(columns))
        return
    for batch in _arrow_batches(path):
        part = batch.select(list(columns)) if columns else batch
        for start in range(0, len(part), _ROWS_AT_ONCE):
            yield part[start : start + _ROWS_AT_ONCE]


def _arrow_batches(path: str) -> Iterator[Any]:
    pa = _pyarrow()
    file = pa.memory_map(path)
    if _head(path) == b"ARRO":
        table = pa.ipc.open_file(file)
        for number in range(table.num_record_batches):
            yield table.get_batch(number)
        return
    while True:  # joined streams follow each other
        yield from pa.ipc.open_stream(file)
        if file.tell() >= file.size():
            return


def _sample(path: str) -> tuple[Any, list[dict[str, Any]]]:
    """Read the schema and the first rows of a table, without columns that cannot hold images."""
    pa = _pyarrow()
    if _is_parquet(path):
        schema = pa.parquet.ParquetFile(path).schema_arrow
    elif _head(path) == b"ARRO":
        schema = pa.ipc.open_file(pa.memory_map(path)).schema
    else:
        schema = pa.ipc.open_stream(pa.memory_map(path)).schema
    names = [field.name for field in schema if _may_hold_images(field.type)]
    batches: Iterable[Any] = _batches(path, names) if names else ()
    rows = [row for batch in islice(batches, 1) for row in batch[:_ROWS_LOOKED_AT].to_pylist()]
    return schema, rows


def _damage(path: str) -> str | None:
    """Say what is missing from, or hidden in, a table that was read to its end."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(0, size - 8))
        end = file.read()
    head = _head(path)
    if head == b"PAR1":
        return _hidden_in_parquet(path, size)
    if head == _STREAM_START and end != _STREAM_END:
        return "its end marker is missing, so it may have been cut off"
    return None


def _hidden_in_parquet(path: str, size: int) -> str | None:
    """Find another parquet file between the rows and the footer of a file, which reads the last footer alone."""
    metadata = _pyarrow().parquet.ParquetFile(path).metadata
    ends = [4]
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
            ends.append(start + column.total_compressed_size)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        footer = int.from_bytes(content[size - 8 : size - 4], "little")
        if max(ends) < size - 8 - footer and content.find(b"PAR1PAR1") >= 0:
            return "several files were joined, and only the rows of one can be read"
    return None


def _is_parquet(path: str) -> bool:
    """Tell the format by the content, and by the name where that is damaged."""
    head = _head(path)
    return head == b"PAR1" or (path.lower().endswith(".parquet") and head not in (b"ARRO", _STREAM_START))


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeError(missing("Parquet and Arrow files", "parquet")) from None
    return pyarrow


def _fail(reason: str) -> NoReturn:
    raise ValueError(reason)
