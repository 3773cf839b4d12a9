"""Suggest radii and measure a model's denoising error: the job behind `shielded calibrate`.

Distances are L2 in the model's latent space; an image that is far away in it can still resemble another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded.files import write_json
from shielded.generation import generate
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, guidance_call, load, preset_of
from shielded.models.calls import takes_prompts
from shielded.protected import ProtectedSet
from shielded.radius.choose import (
    diversity_radius,
    protection_radius,
    radii_per_image,
    summarise_radii,
    write_radii,
)
from shielded.radius.choose import read_radii as read_radii  # its path in version 0.1
from shielded.radius.evidence import QUERIES, Evidence, draw_indices, measure_evidence, open_pictures
from shielded.radius.plot import plot_evidence
from shielded.radius.similarity import copy_threshold, measure_similarities
from shielded.spell.posterior import measure_calibration

PROMPTS = 16  # captions for plain images where no prompts are given
_MAX_CLOSEST_PAIRS = 20  # in the report


def calibrate(
    out: Path,
    model: str = DEFAULT_MODEL,
    protect: Path | None = None,
    images: Sequence[str] = (),
    prompts: Sequence[str] = (),
    seeds: int = 4,
    rate: float = 0.01,
    radius: float | None = None,
    per_image: bool = False,
    most: int = 100,
    seed: int = 0,
    steps: int = 25,
    device: str | None = None,
    progress: bool = True,
    pipe: Any = None,
    space: LatentSpace | None = None,
) -> dict[str, Any]:
    """Measure distances and the denoising error, and suggest radii.

    Writes `radius.json`, `radius.png` (with matplotlib), `calibration.json` and, with `per_image`, `radii.csv`;
    returns the content of `radius.json`.

    Args:
        out: folder for the results.
        model: as for `shielded.models.load`.
        protect: a protected set.
        images: files, folders or globs: where the set's image files are now or, without a set, images to measure.
        prompts: texts or classes for plain images; empty: captions of the model where its preset has some, else none.
            Models that take neither make plain images without.
        seeds: plain images per prompt; 0: none.
        rate: tolerated share of false alarms.
        radius: radius to report on instead of the suggested one.
        per_image: also write a radius for each protected image.
        most: images that are altered and denoised, at most.
        seed: seed of all random draws.
        steps: sampler steps.
        device: where the model runs; None: CUDA if there is one.
        progress: whether progress bars are shown.
        pipe: a pipeline that is loaded already; `model` is then its name in the result. None: `model` is loaded.
        space: of its latents, where `LatentSpace.of` does not know it.

    Raises:
        ValueError: nothing to measure, or a set that is empty or of another latent space.
    """
    out.mkdir(parents=True, exist_ok=True)
    if pipe is not None and model == DEFAULT_MODEL:
        model = type(pipe).__name__
    pipe = load(model, device) if pipe is None else pipe
    space = space or LatentSpace.of(pipe)
    captions = prompts or (_captions(model, seed) if takes_prompts(pipe) else [""])
    texts = [text for text in captions for _ in range(seeds)]
    with open_pictures(space, protect, images, progress) as pictures:
        plain = torch.empty(0, *space.shape)
        if texts:
            options = guidance_call(pipe, model)
            # Seeds differ between prompts too, so that no two images start from the same noise.
            numbers = list(range(seed, seed + len(texts)))
            plain = generate(pipe, texts, numbers, None, steps, label="plain", progress=progress, **options).latents
        elif pictures is None:
            raise ValueError("nothing to measure: give a protected set, pictures, or texts for plain images.")
        every = len(pictures.protected) if per_image and pictures is not None else QUERIES
        evidence = measure_evidence(space, pictures, plain, texts, every, most, seed, progress)
        clean, described = plain[:most], texts[:most]
        result: dict[str, Any] = {"model": model, "dim": space.dim, "space": space.fingerprint}
        if pictures is not None:
            clean, described = pictures.latents(most, seed)
            described = described if takes_prompts(pipe) else [""] * len(clean)
            result |= {"rows": len(pictures.protected), "version": pictures.protected.version}
            result["changed_pictures"] = len(evidence.copied)
            result["closest"] = _closest_pairs(pictures.protected, evidence)
        enough = np.isfinite(evidence.different).any() or len(evidence.generations)
        result["protection"] = protection_radius(evidence, rate, radius) if enough else None
        if pictures is not None and pictures.protected.descriptor is not None:
            chosen = None if result["protection"] is None else result["protection"]["radius"]
            similarities = measure_similarities(pictures, evidence, most, seed)
            result["copies"] = copy_threshold(similarities, evidence, rate, chosen, pictures.protected.ids)
        result["diversity"] = diversity_radius(evidence, rate) if len(evidence.other_prompt) else None
        if per_image and pictures is not None and result["protection"]:
            radii = radii_per_image(evidence.different, result["protection"]["radius"])
            write_radii(out / "radii.csv", pictures.protected, radii, evidence.different)
            result["per_image"] = summarise_radii(evidence, radii)
    result["denoising_error"] = _denoising_error(
        out / "calibration.json",
        pipe,
        clean,
        described,
        steps=steps,
        seed=seed,
        space=space.fingerprint,
        progress=progress,
    )
    result["distances"] = evidence.quantiles()
    drawn = result["protection"] or result["diversity"]
    result["plot"] = drawn is not None and _plotted(evidence, out / "radius.png", drawn["radius"])
    write_json(out / "radius.json", result)
    return result


def _denoising_error(path: Path, pipe: Any, clean: Tensor, captions: list[str], **options: Any) -> dict[str, Any]:
    """Write the calibration, or return why the pipeline cannot be measured: the radii do not depend on it."""
    try:
        measured = measure_calibration(pipe, clean, captions, **options)
    except (TypeError, ValueError) as error:
        return {"failed": str(error)}
    measured.save(path)
    return {
        "pictures": len(clean),
        "with_caption": sum(map(bool, captions)),
        "levels": measured.levels,
        "error": measured.error,
        "without_measurement": [measured.energy * level**2 for level in measured.levels],
    }


def _captions(model: str, seed: int) -> list[str]:
    """Draw captions that the model was trained on; none where they are not known."""
    captions = preset_of(model).read_captions()
    return [captions[i] for i in draw_indices(len(captions), PROMPTS, seed)]


def _plotted(evidence: Evidence, path: Path, radius: float) -> bool:
    try:
        plot_evidence(evidence, path, radius)
    except ImportError:
        return False
    return True


def _closest_pairs(protected: ProtectedSet, evidence: Evidence) -> list[list[Any]]:
    """Return the closest different images [id, id, distance]: variants to look at, or duplicates to remove."""
    pairs = {
        (min(row, other), max(row, other)): distance
        for row, other, distance in zip(
            evidence.rows.tolist(), evidence.nearest.tolist(), evidence.different.tolist(), strict=True
        )
        if other >= 0
    }
    closest = sorted(pairs.items(), key=lambda pair: pair[1])[:_MAX_CLOSEST_PAIRS]
    return [[protected.ids[a], protected.ids[b], distance] for (a, b), distance in closest]
