"""Run a pipeline for prompts and seeds, with or without SPELL, and keep what the sampler finished with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shielded.samplers import attach
from shielded.spell import Spell


@dataclass
class Generated:
    """Images, the sampler's final latents (B, *S) float32 behind them, and the time that both took."""

    images: list[Image.Image]
    latents: Tensor
    seconds: float


class Watch:
    """Corrects nothing and keeps the final latents: the plain pipeline, watched."""

    finished: Tensor | None = None

    def __call__(self, x0: Tensor, noise: Tensor | None, alpha: float, sigma: float, last: bool = False) -> Tensor:
        return torch.zeros_like(x0)

    def start(self) -> None:
        pass

    def finish(self, latents: Tensor) -> None:
        self.finished = latents


def generate(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    spell: Spell | None = None,
    steps: int = 25,
    batch_size: int = 16,
    label: str = "images",
    progress: bool = True,
    **options: Any,
) -> Generated:
    """One image per prompt and seed.

    Image i depends on prompts[i] and seeds[i] alone, and, with batch repellency, on the others of its batch.

    Args:
        pipe: a diffusers pipeline with a supported scheduler.
        prompts: one per image.
        seeds: one per image; each image has a generator of its own.
        spell: None generates plainly.
        steps: of the sampler.
        batch_size: images made at once; batch references are those of the same batch.
        label: in front of the progress bar.
        progress: whether a progress bar is shown.
        **options: passed on to the pipeline, for example guidance_scale.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt.")
    images: list[Image.Image] = []
    latents: list[Tensor] = []
    watch = Watch() if spell is None else spell
    start = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        last = min(first + batch_size, len(prompts))
        pipe.set_progress_bar_config(disable=not progress, desc=f"{label} {first + 1}-{last} of {len(prompts)}")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        with attach(pipe, watch) if spell is None else spell.attach(pipe):
            made = pipe(prompts[part], num_inference_steps=steps, generator=generators, **options).images
        images += made
        latents.append(watch.finished.float().cpu())
    pipe.set_progress_bar_config(disable=True)
    return Generated(images, torch.cat(latents), time.perf_counter() - start)
