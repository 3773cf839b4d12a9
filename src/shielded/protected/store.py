"""The files of a protected set.

    set.json              the manifest: which shards make up the current version, and how it came about
    000002.safetensors    a shard: the rows that version 2 added; never changed once it is written
    lock                  held by the one process that is writing

A shard holds `latents` (n, *shape), `radius` (n,) float64 with NaN for none, and `rows`: UTF-8 JSON with the ids,
sources and SHA-256 digests of the images. A new version is there once its manifest has replaced the old one, so a
process that is killed leaves at worst a file that no manifest names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

MANIFEST = "set.json"
LOCK = "lock"
FORMAT = 1


@dataclass
class Rows:
    """References in order.

    Args:
        latents: (n, *shape).
        radii: (n,) float64, NaN for none.
        ids: n names.
        sources: n paths or addresses, or None.
        sha256: n digests of the image files, or None.
    """

    latents: Tensor
    radii: Tensor
    ids: list[str | int]
    sources: list[str | None]
    sha256: list[str | None]

    def without(self, ids: list[str | int]) -> Rows:
        """The rows that are left when those with these ids are taken away."""
        gone = set(ids)
        keep = [row for row, name in enumerate(self.ids) if name not in gone]
        return Rows(
            self.latents[keep],
            self.radii[keep],
            *([names[row] for row in keep] for names in (self.ids, self.sources, self.sha256)),
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes this the only writer. The system lets go of the lock when the process ends, however it ends."""
    with open(folder / LOCK, "w") as file:
        try:
            _lock(file)
        except OSError:
            raise RuntimeError(f"Another process is writing to {folder}; try again when it has finished.") from None
        yield


def _lock(file: TextIO) -> None:
    if fcntl is None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The current manifest.

    Raises:
        FileNotFoundError: if there is no protected set in `folder`.
        ValueError: if the manifest is damaged or of a newer format.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no protected set at {folder}: {MANIFEST} is missing.") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged.") from None
    try:
        manifest = json.loads(text)
        del manifest["sha256"]
        intact = _manifest_text(manifest) == text
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}; this version of shielded reads format {FORMAT}.")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes `manifest` the current one, at once."""
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(_manifest_text(manifest), "utf-8")
    _replace(temporary, folder / MANIFEST)


def write_shard(folder: Path, version: int, rows: Rows) -> dict[str, Any]:
    """Writes a shard and returns its entry in the manifest."""
    names = {"ids": rows.ids, "sources": rows.sources, "sha256": rows.sha256}
    tensors = {
        "latents": rows.latents.contiguous(),
        "radius": rows.radii.contiguous(),
        "rows": torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8),
    }
    name = f"{version:06d}.safetensors"
    temporary = folder / f"{name}.tmp"
    save_file(tensors, temporary)
    entry = {"file": name, "rows": len(rows.ids), "sha256": file_sha256(temporary), "removed": []}
    _replace(temporary, folder / name)
    return entry


def read_shard(folder: Path, entry: dict[str, Any]) -> Rows:
    """The rows of a shard that have not been removed.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is damaged.
    """
    path = folder / entry["file"]
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, a part of the protected set.")
    try:
        tensors = load_file(path)
        names = json.loads(tensors["rows"].numpy().tobytes())
        rows = Rows(tensors["latents"], tensors["radius"], names["ids"], names["sources"], names["sha256"])
        intact = all(len(part) == entry["rows"] for part in vars(rows).values())
    except (SafetensorError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: it cannot be read as {entry['rows']} rows.")
    return rows.without(entry["removed"]) if entry["removed"] else rows


def check_shard(folder: Path, entry: dict[str, Any]) -> None:
    """Compares a shard with its checksum.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if a byte of the file has changed.
    """
    path = folder / entry["file"]
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, a part of the protected set.")
    if file_sha256(path) != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum does not hold.")


def delete_unused(folder: Path, manifest: dict[str, Any]) -> None:
    """Deletes shards and temporary files that the manifest does not name."""
    used = {entry["file"] for entry in manifest["shards"]}
    for path in folder.iterdir():
        if is_own(path) and path.name not in {*used, MANIFEST, LOCK}:
            path.unlink()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_own(path: Path) -> bool:
    """Whether a file of this name belongs to a protected set."""
    return re.fullmatch(r"(set\.json|\d{6,}\.safetensors)(\.tmp)?|lock", path.name) is not None


def _manifest_text(manifest: dict[str, Any]) -> str:
    """The only text that stands for this manifest, with its own checksum."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1) + "\n"


def _replace(temporary: Path, path: Path) -> None:
    """Renames a finished file so that it survives a power failure too."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
