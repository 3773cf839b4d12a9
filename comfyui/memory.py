"""Memory of finished images on disk: one protected set for each kind of model and latent size."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from shielded import LatentSpace, ProtectedSet

_LOCK = "memory.lock"


@dataclass(frozen=True)
class Memory:
    """A folder of remembered latents.

    Args:
        folder: holds one protected set for each kind of model and latent size.
        limit: most images that each of these sets may hold.
    """

    folder: Path
    limit: int


def named(root: Path, name: str, limit: int) -> Memory:
    """Return the memory `name` below `root`.

    Raises:
        ValueError: if the name is not a plain folder name.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"The name of a memory consists of letters, digits, - and _; got {name!r}.")
    return Memory(root / name, limit)


def recall(memory: Memory, latent_format: Any, shape: tuple[int, ...]) -> Tensor:
    """Load the remembered latents of this kind and size in the sampler's space: (M, *shape), oldest first."""
    folder = _folder(memory, latent_format, shape)
    if not folder.is_dir():
        return torch.zeros(0, *shape)
    with _locked(memory):
        remembered = ProtectedSet.open(folder)
    return remembered.vectors(torch.arange(len(remembered)))


def remember(memory: Memory, latent_format: Any, latents: Tensor) -> int:
    """Add finished latents to a memory, except those that it already holds.

    A full memory forgets its oldest tenth at once, so that its files are rewritten rarely.

    Args:
        memory: memory to add to.
        latent_format: the model's latent format; its class name tells kinds of models apart.
        latents: (B, *S) in the sampler's space.

    Returns:
        the number of latents of this kind and size that the memory holds now.

    Raises:
        ValueError: if a latent contains NaN or infinity.
    """
    latents = latents.detach().float().cpu()
    shape = tuple(latents.shape[1:])
    folder = _folder(memory, latent_format, shape)
    rows = {hashlib.sha256(row.numpy().tobytes()).hexdigest(): row for row in latents}
    with _locked(memory):
        remembered = ProtectedSet.open(folder) if folder.is_dir() else ProtectedSet.create(folder, LatentSpace(shape))
        new = [name for name in rows if name not in set(remembered.ids)]
        if new:
            remembered.add(torch.stack([rows[name] for name in new]), new)
        excess = len(remembered) - memory.limit
        if excess > 0:
            remembered.remove(remembered.ids[: excess + memory.limit // 10])
            remembered.compact()
    return len(remembered)


def forget(memory: Memory) -> None:
    """Delete the latents of all models and sizes."""
    with _locked(memory):
        for folder in memory.folder.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)


def state(folder: Path) -> str:
    """Return a fingerprint of a folder that changes when one of its files does."""
    files = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (_LOCK, "lock")
    )
    return hashlib.sha256(repr(files).encode()).hexdigest()


@contextmanager
def _locked(memory: Memory) -> Iterator[None]:
    """Hold the lock of a memory; another ComfyUI process may use the same one."""
    memory.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(memory.folder / _LOCK, timeout=60):
        yield


def _folder(memory: Memory, latent_format: Any, shape: tuple[int, ...]) -> Path:
    return memory.folder / f"{type(latent_format).__name__}-{'x'.join(map(str, shape))}"
