"""Finished images that later runs stay away from, on disk: one protected set for each kind of model and size."""

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
    """A folder, and how many images it holds at most for each kind of model and size."""

    folder: Path
    limit: int


def named(root: Path, name: str, limit: int) -> Memory:
    """The memory of this name.

    Raises:
        ValueError: a name that is not a plain folder name.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"A memory's name is made of letters, digits, - and _; got {name!r}.")
    return Memory(root / name, limit)


def recall(memory: Memory, latent_format: Any, shape: tuple[int, ...]) -> Tensor:
    """What is remembered for this kind of model and size, in the sampler's space: (M, *shape), oldest first."""
    folder = _folder(memory, latent_format, shape)
    if not folder.is_dir():
        return torch.zeros(0, *shape)
    with _locked(memory):
        remembered = ProtectedSet.open(folder)
    return remembered.vectors(torch.arange(len(remembered)))


def remember(memory: Memory, latent_format: Any, latents: Tensor) -> int:
    """Remembers finished latents; those that are remembered already are not taken twice.

    When the memory is full, the oldest tenth is forgotten at once, so that the files are rewritten rarely.

    Args:
        memory: where to.
        latent_format: the model's.
        latents: (B, *S) in the sampler's space.

    Returns:
        How many latents of this kind and size are remembered now.

    Raises:
        ValueError: latents with NaN or infinity.
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
    """Forgets everything, for all models and sizes."""
    with _locked(memory):
        for folder in memory.folder.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)


def state(folder: Path) -> str:
    """A fingerprint of the files in a folder, which changes when one of them does."""
    files = sorted(
        (path.relative_to(folder).as_posix(), path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (_LOCK, "lock")
    )
    return hashlib.sha256(repr(files).encode()).hexdigest()


@contextmanager
def _locked(memory: Memory) -> Iterator[None]:
    """One process at a time; another ComfyUI may use the same memory."""
    memory.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(memory.folder / _LOCK, timeout=60):
        yield


def _folder(memory: Memory, latent_format: Any, shape: tuple[int, ...]) -> Path:
    return memory.folder / f"{type(latent_format).__name__}-{'x'.join(map(str, shape))}"
