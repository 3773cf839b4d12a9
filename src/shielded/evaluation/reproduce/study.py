"""Make the cells of a study: the images of one prompt, method and seed, reduced to features and cached on disk.

A cell's file is written atomically under a digest of everything that decides about it, so a run that was killed
continues where it stopped, and a larger run reuses the cells of a smaller one.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from shielded import __version__
from shielded._extras import show_progress
from shielded.evaluation.baselines import method
from shielded.evaluation.extractors import Features, features
from shielded.evaluation.metrics import caption_score, nearest_distance
from shielded.files import replacing, sha256
from shielded.models import DEFAULT_MODEL, guidance_call, load, preset_of
from shielded.models.calls import conditioning, images_of, step_option

REFERENCE_SEED = 1_000_000  # first seed of plain reference images, far from those of any experiment
_SEED_STRIDE = 10_000  # image j of seed s is sampled with seed s * 10,000 + j

PICTURE = "picture "  # name of a cell's reduced pictures, before their number
_PICTURES, _PICTURE_PIXELS = 4, 128  # how many, and their longer side

Cell = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Method with its strength and options, and its label in tables."""

    label: str
    method: str = "plain"
    strength: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> dict[str, Any]:
        """Return what decides about the images; settings that differ only in their label share cells."""
        return {"method": self.method, "strength": self.strength, "options": self.options}


@dataclass
class Study:
    """Parameters that all cells of an experiment share.

    Args:
        out: folder of results; cells go to `out/cells`.
        prompts: texts, or class names for class-conditional models.
        images: per prompt and seed; they are sampled as one batch and repel each other.
        seeds: number of seeds.
        model: as `shielded.models.load`.
        steps: sampler steps; None: enough for the model.
        encoder: name of the features, see `shielded.evaluation.extractors`.
        batch_size: images sampled at once; None: all of a prompt. With less, SPELL uses its history.
        device: None: CUDA if there is one.
        progress: whether a progress bar is shown.
    """

    out: Path
    prompts: list[str]
    images: int = 16
    seeds: int = 3
    model: str = DEFAULT_MODEL
    steps: int | None = None
    encoder: str = DEFAULT_MODEL
    batch_size: int | None = None
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.images < 2 or self.seeds < 1 or not self.prompts:
            raise ValueError("an experiment needs at least one prompt, two images and one seed.")
        preset = preset_of(self.model)
        self.sampler = preset.study_sampler
        self.steps = self.steps or preset.study_steps or preset.steps

    @cached_property
    def pipe(self) -> Any:
        """Load the pipeline with the sampler of the model's preset."""
        import diffusers

        pipe = load(self.model, self.device)
        if self.sampler is not None:
            pipe.scheduler = getattr(diffusers, self.sampler).from_config(pipe.scheduler.config)
        if preset_of(self.model).channels_last:
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
        return pipe

    @cached_property
    def call(self) -> dict[str, Any]:
        """Return the guidance scale as a keyword argument of the pipeline; empty: the pipeline's default."""
        return guidance_call(self.pipe, self.model)

    @cached_property
    def features(self) -> Features:
        """Load the feature extractor."""
        return features(self.encoder, device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def describe(self) -> dict[str, Any]:
        """Return what results depend on besides settings, prompts and seeds."""
        return {
            "version": __version__,
            "model": self.model,
            "steps": self.steps,
            "sampler": self.sampler,
            **self.call,
            "images": self.images,
            "batch_size": self.batch_size,
            "encoder": self.encoder,
        }

    def cells(
        self, settings: Iterable[Setting], protected: Tensor | None = None
    ) -> Iterator[tuple[Setting, list[Cell]]]:
        """Yield each setting with its cells, ordered by seed, then by prompt; cells that are not cached are made.

        Args:
            settings: settings to run.
            protected: (K, *S) latents that "spell" keeps away from, instead of the images of the batch; cells then hold
                the distance to the nearest of them.
        """
        settings = list(settings)
        total = len(settings) * self.seeds * len(self.prompts)
        with show_progress(total=total, desc="cells", unit="cell", shown=self.progress) as bar:
            for setting in settings:
                bar.set_description(setting.label)
                found = []
                for seed in range(self.seeds):
                    for prompt in self.prompts:
                        found.append(self.cell(setting, prompt, seed, protected))
                        bar.update()
                yield setting, found

    def cell(self, setting: Setting, prompt: str, seed: int, protected: Tensor | None = None) -> Cell:
        """Return one cell, from the cache if it was made before."""
        if setting.method == "plain" and protected is not None:  # the same images, measured against other references
            cell = self.cell(setting, prompt, seed)
            return {**cell, "protected": _nearest(cell["latents"], protected)}
        key = {**self.describe(), **setting.key(), "prompt": prompt, "seed": seed}
        if protected is not None:
            key["protected"] = sha256(protected.float().contiguous().numpy().tobytes())
        name = sha256(json.dumps(key, sort_keys=True).encode())[:24]
        path = self.out / "cells" / name[:2] / f"{name}.safetensors"
        if path.exists():
            return load_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            cell = self.make(setting, prompt, seed, protected)
        except KeyboardInterrupt as error:
            kept = len([*(self.out / "cells").rglob("*.safetensors")])
            error.add_note(f"{kept or 'No'} finished cells are in {self.out}; the same command goes on with the rest.")
            raise
        with replacing(path) as draft:
            save_file({k: v.contiguous() for k, v in cell.items()}, draft, metadata={"key": json.dumps(key)})
        return cell

    def make(self, setting: Setting, prompt: str, seed: int, protected: Tensor | None) -> Cell:
        """Generate the images of a cell and measure them."""
        size = self.batch_size or self.images
        options = dict(setting.options)
        if setting.method == "spell":
            if protected is not None:
                options |= {"protected": protected, "batch": False}
            elif size < self.images:
                options["history"] = True
        elif setting.method == "cads":
            options["seed"] = seed
        how = method(setting.method, setting.strength, **options)
        first = seed * _SEED_STRIDE
        images: list[Image.Image] = []
        latents, traces = [], []
        start = time.perf_counter()
        for begin in range(0, self.images, size):
            numbers = range(first + begin, first + min(begin + size, self.images))
            generators = [torch.Generator().manual_seed(number) for number in numbers]
            with how.attach(self.pipe):
                told = {**conditioning(self.pipe, [prompt] * len(numbers)), **step_option(self.pipe, self.steps or 0)}
                images += images_of(self.pipe, self.pipe(**told, generator=generators, **self.call))
            latents.append(how.finished.float().cpu())
            traces.append(trace_tensors(getattr(how, "trace", []), len(numbers)))
        seconds = time.perf_counter() - start
        flat = torch.cat(latents).flatten(1)
        found = self.features.image_features(images)
        pairs = torch.cdist(flat.double(), flat.double()).fill_diagonal_(torch.inf)
        cell = _pictures(images)
        cell |= {
            "features": found,
            "pair": pairs.amin(dim=1),
            "seconds": torch.tensor(seconds, dtype=torch.float64),
        }
        if self.features.text_features is not None:
            cell["caption"] = caption_score(found, self.features.text_features([prompt]))
        if setting.method == "plain":
            cell["latents"] = torch.cat(latents)  # they may become what is protected
        if protected is not None:
            cell["protected"] = _nearest(flat, protected)
        for name in traces[0] if traces[0] else ():
            cell[name] = torch.cat([trace[name] for trace in traces], dim=1)
        return cell


def _pictures(images: Sequence[Any]) -> Cell:
    """Reduce the first images of a cell to WebP files, as tensors (bytes,) uint8; videos are left out."""
    found = {}
    for i, image in enumerate(images[:_PICTURES]):
        if isinstance(image, Image.Image):
            small = image.convert("RGB")
            small.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
            file = io.BytesIO()
            small.save(file, "WEBP", quality=85)
            found[f"{PICTURE}{i}"] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return found


def _nearest(latents: Tensor, protected: Tensor) -> Tensor:
    """Return the (B,) float64 distance to the nearest protected latent."""
    return nearest_distance(latents.flatten(1), protected.flatten(1))


def trace_tensors(trace: list[dict[str, Any]], images: int) -> Cell:
    """Convert a trace to (steps, images) tensors: noise level, active shields, and push over score."""
    columns = {"level": "noise_level", "active": "active", "ratio": "score_ratio"}
    if not trace:
        return {}
    return {
        name: torch.tensor([float(row[column]) for row in trace]).view(-1, images) for name, column in columns.items()
    }
