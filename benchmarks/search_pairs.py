"""Comparisons side by side for `search.py pairs`: both sides take turns in one process, and what counts is the ratio.

Processor time counts, so that other work on the machine hardly matters; for threads, the time on the clock.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from search_data import photos
from torch import Tensor

from shielded import LatentSpace, ProtectedSet, Spell

IMAGES, SIDE = 16, 64
HELD_OUT = 40  # photos that are not protected

Jobs = tuple[Callable[[], object], Callable[[], object]]


def ratio(jobs: Jobs, rounds: int, clock: Callable[[], float] = time.process_time) -> tuple[float, float]:
    """Return the median seconds of two jobs that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for job, taken in zip(jobs, seconds, strict=True):
            start = clock()
            job()
            taken.append(clock() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def crops(archive: Path) -> Tensor:
    """Cut photos of 256×256 into 16 pictures (N, 16, 3, 64, 64) each, from -1 to 1."""
    whole = torch.from_numpy(np.stack([np.array(image.resize((256, 256))) for image in photos(archive)]))
    parts = whole.unflatten(1, (4, SIDE)).unflatten(3, (4, SIDE)).permute(0, 1, 3, 5, 2, 4)
    return parts.flatten(1, 2).float() / 127.5 - 1


def blurred(images: Tensor, side: int) -> Tensor:
    """Reduce images to `side` pixels and enlarge them again: an early x0."""
    small = torch.nn.functional.interpolate(images, size=side, mode="area")
    return torch.nn.functional.interpolate(small, size=SIDE, mode="bilinear")


def tensor(folder: Path, archive: Path, rows: int) -> list[str]:
    """Call a Spell that protects a tensor and one that protects a set of the same pictures."""
    pictures = crops(archive)
    z = torch.cat([pictures[HELD_OUT:], pictures[HELD_OUT:].flip(-1)]).flatten(0, 1)[:rows].contiguous()
    path = folder / f"pictures-{len(z)}"
    if not path.exists():
        draft = ProtectedSet.create(folder / f"pictures-draft-{len(z)}", LatentSpace((3, SIDE, SIDE)), overwrite=True)
        draft.add(z, list(range(len(z))))
        draft.path.rename(path)
    protected = ProtectedSet.open(path)
    x0 = pictures[:HELD_OUT, 5][:IMAGES]
    closest = protected.nearest(x0)[0]
    lines = []
    for name, radius, sharpness in (
        ("no active shield, x0 from blurred to sharp", 0.5 * closest.min().item(), (2, 4, 8, 16, 32, 64)),
        ("few active shields, sharp x0", 1.02 * closest.median().item(), (64,)),
    ):
        spells = [Spell(z, radius, batch=False), Spell(protected, radius, batch=False)]
        pairs = []
        for side in sharpness:
            x = blurred(x0, side)
            for spell in spells:
                spell(x)  # builds what is kept
            deltas = [spell(x) for spell in spells]
            assert torch.allclose(*deltas, atol=1e-5 * radius)
            pairs.append(ratio(tuple(lambda s=s, x=x: s(x) for s in spells), 5))
        first, second = map(sum, zip(*pairs, strict=True))
        what = f"tensor, set of {len(z):,} × {z[0].numel():,}: {name}"
        lines.append(row(what, first / len(pairs), second / len(pairs)))
    return lines + threads(protected, x0)


def threads(protected: ProtectedSet, x0: Tensor) -> list[str]:
    """Search one set along two trajectories of 8 images each: one after the other, and in two threads."""
    runs = [[blurred(part, side) for side in range(2, SIDE + 1, 2)] for part in x0.split(IMAGES // 2)]

    def search(run: list[Tensor]) -> list[Tensor]:
        return [protected.nearest_rows(x, 10)[1] for x in run]

    with ThreadPoolExecutor(2) as pool:
        alone, at_once = [search(run) for run in runs], list(pool.map(search, runs))
        assert all(map(torch.equal, chain(*alone), chain(*at_once)))
        jobs = (lambda: [search(run) for run in runs]), (lambda: list(pool.map(search, runs)))
        return [row("two trajectories one after the other, in two threads", *ratio(jobs, 5, time.perf_counter))]


def groups() -> list[str]:
    """Separate ten groups of 32 images in one call, and in a call for each."""
    count, images = 10, 32
    x0 = torch.randn(count * images, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    radius = 1.02 * (2 * x0[0].numel()) ** 0.5
    together = Spell(radius=radius, groups=torch.arange(count).repeat_interleave(images))
    alone = Spell(radius=radius)
    assert torch.equal(together(x0), torch.cat([alone(part) for part in x0.split(images)]))
    jobs = (lambda: together(x0)), (lambda: [alone(part) for part in x0.split(images)])
    return [row(f"{count} groups of {images} in one call, {count} calls of {images}", *ratio(jobs, 5))]


def crowd() -> list[str]:
    """Lead 16 images out of 2,078 shields each: the smallest move, and the paper's sum."""
    generator, count, dim = torch.Generator().manual_seed(0), 2078, 4096
    common = 3 / 8 * torch.randn(64, dim, generator=generator)  # references have much in common, as latents do
    z = torch.randn(count, 64, generator=generator) @ common + 0.5 * torch.randn(count, dim, generator=generator)
    x0 = 0.3 * z[:IMAGES] + 0.1 * torch.randn(IMAGES, dim, generator=generator)
    radius = 1.05 * torch.cdist(x0, z).max().item()
    project, summed = (
        Spell(z, radius, batch=False, radius_schedule="constant", overlap=way) for way in ("project", "sum")
    )
    project(x0)
    assert project.trace[0]["active"] == count
    jobs = (lambda: project(x0)), (lambda: summed(x0))
    lines = [row(f"{IMAGES} images in {count:,} shields: the smallest move, the sum", *ratio(jobs, 5))]
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    lines.append(row(f"the same on {cores} cores, by the clock", *ratio(jobs, 15, time.perf_counter)))
    torch.set_num_threads(1)
    return lines


def row(name: str, first: float, second: float) -> str:
    line = f"| {name} | {first:.3g} | {second:.3g} | {first / second:.2f} |"
    print(line, flush=True)
    return line


def pairs(folder: Path, archive: Path, rows: int) -> str:
    torch.set_num_threads(1)
    lines = ["| what | first, s | second, s | ratio |", "|---|---|---|---|"]
    return "\n".join([*lines, *tensor(folder, archive, rows), *groups(), *crowd()])
