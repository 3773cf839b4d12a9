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
_SEED = "seed:"  # a source of the set
_MOST_SEEDS = 100_000  # of one range


@dataclass(frozen=True)
class Memory:
    """A folder of remembered latents.

    Args:
        folder: holds one protected set for each kind of model and latent size.
        limit: most images that each of these sets may hold.
        seeds: only the images of these seeds are recalled; None: all.
    """

    folder: Path
    limit: int
    seeds: tuple[int, ...] | None = None


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
    rows = range(len(remembered))
    if memory.seeds is not None:
        wanted = {_source(seed) for seed in memory.seeds}
        rows = [row for row, source in enumerate(remembered.sources) if source in wanted]
    return remembered.vectors(torch.tensor(list(rows), dtype=torch.long)).view(-1, *shape)


def seeds_of(memory: Memory) -> list[int]:
    """List the seeds of the images that a memory recalls, of all models and sizes, without repetition."""
    found: dict[int, None] = {}
    if memory.folder.is_dir():
        with _locked(memory):
            for folder in sorted(path for path in memory.folder.iterdir() if path.is_dir()):
                sources = (source for source in ProtectedSet.open(folder).sources if source)
                found |= dict.fromkeys(int(source[len(_SEED) :]) for source in sources if source.startswith(_SEED))
    return [seed for seed in found if memory.seeds is None or seed in memory.seeds]


def parse_seeds(text: str) -> tuple[int, ...] | None:
    """Read seeds such as "7, 12-15"; None for an empty text.

    Raises:
        ValueError: if it holds something else.
    """
    seeds: list[int] = []
    for part in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if part and (match is None or int(match[2] or match[1]) - int(match[1]) not in range(_MOST_SEEDS)):
            raise ValueError(
                f"SPELL Seeds: the input 'seeds' takes numbers and ranges such as 7, 12-15, of at most {_MOST_SEEDS} "
                f"seeds; got {part!r}."
            )
        if match is not None:
            seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(seeds)) or None


def remember(memory: Memory, latent_format: Any, latents: Tensor, seed: int | None = None) -> int:
    """Add finished latents to a memory, except those that it already holds.

    A full memory forgets its oldest tenth at once, so that its files are rewritten rarely.

    Args:
        memory: memory to add to.
        latent_format: the model's latent format; its class name tells kinds of models apart.
        latents: (B, *S) in the sampler's space.
        seed: that they were made with, to find them by.

    Returns:
        the number of latents of this kind and size that the memory holds now.

    Raises:
        ValueError: if a latent contains NaN or infinity.
    """
    latents = latents.detach().float().cpu()
    if not torch.isfinite(latents).all():
        raise ValueError(
            "SPELL Remember: the input 'latent' is not finite: it holds NaN or infinity. Usually the model overflowed "
            "in half precision: start ComfyUI with --force-fp32 or --bf16-unet. Nothing was remembered."
        )
    shape = tuple(latents.shape[1:])
    folder = _folder(memory, latent_format, shape)
    rows = {hashlib.sha256(row.numpy().tobytes()).hexdigest(): row for row in latents}
    with _locked(memory):
        remembered = ProtectedSet.open(folder) if folder.is_dir() else ProtectedSet.create(folder, LatentSpace(shape))
        new = [name for name in rows if name not in set(remembered.ids)]
        if new:
            sources = None if seed is None else [_source(seed)] * len(new)
            remembered.add(torch.stack([rows[name] for name in new]), new, sources=sources)
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


def _source(seed: int) -> str:
    return f"{_SEED}{seed}"


def _folder(memory: Memory, latent_format: Any, shape: tuple[int, ...]) -> Path:
    return memory.folder / f"{type(latent_format).__name__}-{'x'.join(map(str, shape))}"
