"""Files that are there whole or not at all, and the digests that show a change."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str], concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary name to write to; it takes the place of `path` when the block ends without an error.

    The new file and its folder entry are on the disk when this returns, so a power failure leaves the old file or the
    new one. After an error the temporary file is deleted.

    Args:
        path: the file.
        concurrent: whether several processes may write it at once; the last one remains. Otherwise they share the
            temporary name, so that what a killed process left is overwritten by the next one.
    """
    target = Path(path)
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp" if concurrent else f"{target.name}.tmp")
    with naming(target):
        try:
            yield draft
            sync(draft)
            os.replace(draft, target)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        if os.name == "posix":
            sync(target.parent)


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let errors of the system name the file that was to be written, or its folder if that is gone."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by this package, with a sentence
            raise
        if not target.parent.is_dir():
            raise OSError(f"{target.parent} is gone, so {target.name} could not be written.") from error
        if error.filename is None or str(error.filename).endswith(".tmp"):
            error.filename, error.filename2 = str(target), None
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2) + "\n")


def replace_section(document: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- <name>:begin -->` and `:end` in a Markdown file.

    Raises:
        ValueError: the file has no such section.
    """
    begin, end = (f"<!-- {name}:{mark} -->" for mark in ("begin", "end"))
    whole = document.read_text(encoding="utf-8")
    before, found, rest = whole.partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{document} has no section between {begin} and {end}.")
    with replacing(document) as draft:
        draft.write_text(f"{before}{begin}\n{text}\n{rest[rest.index(end) :]}", encoding="utf-8")


# Digests ------------------------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    """Compute the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def chained(line: bytes, previous: str = "") -> str:
    """Compute the link of a hash chain: the SHA-256 of a line behind the digest of the line before it.

    Args:
        line: with or without its end, always in the same way.
        previous: the digest before it; empty for the first line, and for lines that hold that digest themselves.
    """
    return sha256(previous.encode() + line)
