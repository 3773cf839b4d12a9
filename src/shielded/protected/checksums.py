"""Compute digests of a set's files where their content is first used: once per process, while a file stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shielded.files import file_sha256

_SETTLED_SECONDS = 2.0  # a file that changed less than this before it was read may change again within one clock tick
_LARGE = ("latents", "descriptors")  # first parts of the names of tensors that are compared when they are first used
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as the format says

_lock = threading.Lock()
_known: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}  # (path, kind) -> state of the file, digest then


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a whole file, or return it if the file has not changed since it was last computed."""
    return _once(path, "file", file_sha256)


def columns_digest(path: Path) -> str:
    """Compute `columns_sha256` of a shard, or return it if the file has not changed since it was last computed.

    Raises:
        ValueError: it is no safetensors file.
    """
    return _once(path, "columns", _file_columns_sha256)


def columns_sha256(file: BinaryIO) -> str:
    """Compute the SHA-256 of a shard without its latents and descriptors: of its header and of every other tensor.

    Raises:
        ValueError: it is no safetensors file.
    """
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > _MAX_HEADER_BYTES:
        raise ValueError("no safetensors file")
    header = file.read(size)
    digest = hashlib.sha256(length + header)
    try:
        tensors = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name, (begin, end) in sorted(tensors.items()):
            if not name.startswith(_LARGE):
                file.seek(8 + size + begin)
                digest.update(file.read(max(0, end - begin)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError, OSError):
        raise ValueError("no safetensors file") from None
    return digest.hexdigest()


def _file_columns_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return columns_sha256(file)


def _once(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    key, before = (os.path.abspath(path), kind), _state(path)
    with _lock:
        known = _known.get(key)
    if known is not None and known[0] == before:
        return known[1]
    digest, started = compute(path), time.time_ns()
    settled = started - max(before[-2:]) > _SETTLED_SECONDS * 1e9
    if settled and _state(path) == before:
        with _lock:
            _known[key] = before, digest
    return digest


def _state(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no file.")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
