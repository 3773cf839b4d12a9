"""The main job on the embedded model: protect what the plain model makes, then generate with the same seeds again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from shielded.certificate import certify, leaks
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import vendi
from shielded.generate import Generated, generate
from shielded.latent_space import LatentSpace
from shielded.models import EMOJI, load
from shielded.protected import ProtectedSet
from shielded.report import Diversity, Row, write_report
from shielded.report.grid import diversity_grid, protection_grid
from shielded.spell import Spell

PROMPTS = ("red heart", "pizza", "owl", "sunflower")
SEEDS = (0, 1, 2, 3)
DIVERSITY_PROMPT = "red heart"
DIVERSITY_SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
RADIUS = 18.0  # of the shields around protected images; the latents have norm 32
DIVERSITY_RADIUS = 26.0  # between the images of one prompt
GUIDANCE = 3.0


def demo(
    out: Path,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    seed: int = 0,
    steps: int = 25,
    radius: float = RADIUS,
    diversity_radius: float = DIVERSITY_RADIUS,
    overcompensation: float = 1.6,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write grids, certificates, `report.html` and `report.json` to the folder `out` and return the report.

    Part one generates prompts × 4 seeds plainly, protects the results, and generates the same prompts and seeds with
    SPELL. Part two generates one prompt with 8 seeds without and with batch repellency.

    Args:
        out: folder; files of an earlier run are replaced.
        prompts: of part one.
        seed: added to all seeds.
        steps: of the sampler.
        radius: of the shields in part one.
        diversity_radius: distance that the images of part two keep from each other.
        overcompensation: λ.
        device: None: CUDA if there is one.
        progress: whether progress bars are shown.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe = load("emoji", device)
    options = {"steps": steps, "guidance_scale": GUIDANCE, "progress": progress}

    every_prompt = [prompt for prompt in prompts for _ in SEEDS]
    every_seed = [seed + s for _ in prompts for s in SEEDS]
    plain = generate(pipe, every_prompt, every_seed, label="without SPELL", **options)
    space = LatentSpace.of(pipe)
    protected = ProtectedSet.create(out / "protected", space, overwrite=True)
    protected.add(plain.latents, [f"{p}, seed {s}" for p, s in zip(every_prompt, every_seed, strict=True)], radius)
    protection = Spell(protected, radius, overcompensation, batch=False)
    shielded = generate(pipe, every_prompt, every_seed, protection, label="with SPELL", **options)

    seeds = [seed + s for s in DIVERSITY_SEEDS]
    same = [DIVERSITY_PROMPT] * len(seeds)
    alike = generate(pipe, same, seeds, label="one prompt, without SPELL", **options)
    spread = Spell(radius=diversity_radius, overcompensation=overcompensation)
    differing = generate(pipe, same, seeds, spread, label="one prompt, with SPELL", **options)
    encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
    diversity = Diversity(
        prompt=DIVERSITY_PROMPT,
        seeds=seeds,
        without=alike.images,
        with_=differing.images,
        vendi_without=vendi(encoder.image_features(alike.images)),
        vendi_with=vendi(encoder.image_features(differing.images)),
        radius=diversity_radius,
    )

    files_without = _write_images(out / "without", plain, every_prompt, every_seed)
    files_with = _write_images(out / "with", shielded, every_prompt, every_seed)
    before = certify(plain.latents, files_without, protected, radius)
    after = certify(shielded.latents, files_with, protected, radius)
    own = (shielded.latents - plain.latents).flatten(1).norm(dim=1).tolist()
    rows = [
        Row(prompt, s, without, with_, b.nearest_distance, a.nearest_distance, None)
        for prompt, s, without, with_, b, a in zip(
            every_prompt, every_seed, plain.images, shielded.images, before, after, strict=True
        )
    ]
    report = {
        "prompt": ", ".join(prompts),
        "n": len(rows),
        "radius": radius,
        "leaks_without": leaks(before),
        "leaks_with": leaks(after),
        "min_distance_without": min(c.nearest_distance for c in before),
        "min_distance_with": min(c.nearest_distance for c in after),
        "vendi_without": diversity.vendi_without,
        "vendi_with": diversity.vendi_with,
        "seconds_without": plain.seconds,
        "seconds_with": shielded.seconds,
        "certificates": [vars(c) for c in after],
        "certificates_without": [vars(c) for c in before],
        "mean_distance_to_own_plain_image": sum(own) / len(own),
        "diversity": {
            "prompt": DIVERSITY_PROMPT,
            "radius": diversity_radius,
            "min_pair_distance_without": _closest_pair(alike),
            "min_pair_distance_with": _closest_pair(differing),
            "seconds_without": alike.seconds,
            "seconds_with": differing.seconds,
        },
    }
    settings = {
        "protected": "protected",
        "radius": radius,
        "overcompensation": overcompensation,
        "batch": False,
        "overlap": protection.overlap,
    }
    protection.write_trace(out / "trace.csv")
    _save(protection_grid(rows, radius), out / "grid.png")
    _save(diversity_grid(diversity), out / "diversity.png")
    write_report(out / "report.html", report, rows, diversity, protection.trace, settings)
    draft = out / "report.json.tmp"
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(out / "report.json")
    return report


def _write_images(folder: Path, made: Generated, prompts: list[str], seeds: list[int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for prompt, seed, image in zip(prompts, seeds, made.images, strict=True):
        name = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())
        files.append(folder / f"{name}-{seed}.png")
        _save(image, files[-1])
    return files


def _save(image: Any, path: Path) -> None:
    draft = path.with_suffix(".tmp")
    image.save(draft, format="PNG")
    draft.replace(path)


def _closest_pair(made: Generated) -> float:
    return torch.pdist(made.latents.double().flatten(1)).min().item()
