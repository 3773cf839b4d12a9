"""The main job on the embedded model: protect what the plain model makes, then generate with the same seeds again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shielded.evaluation.encoder import encoder_of
from shielded.evaluation.metrics import vendi
from shielded.files import write_json
from shielded.generation import generate
from shielded.generation.repair import OnLeak
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, load, preset_of
from shielded.protected import ProtectedSet
from shielded.runs.paired import closest_pair, compare, open_log, save_image, settings_of, write_images
from shielded.runs.report import Diversity, write_report
from shielded.runs.report.grid import diversity_grid, protection_grid
from shielded.spell import Spell

PROMPTS = ("red heart", "pizza", "owl", "sunflower")
SEEDS = (0, 1, 2, 3)
DIVERSITY_PROMPT = "red heart"
DIVERSITY_SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)
RADIUS = 8.0  # of the shields around protected pictures; the latents have norm 33
DIVERSITY_RADIUS = 26.0  # between the images of one prompt


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
    on_leak: OnLeak = "restart",
    attempts: int = 3,
) -> dict[str, Any]:
    """Write grids, certificates, `report.html` and `report.json` to the folder `out` and return the report.

    Part one generates prompts × 4 seeds plainly, protects the pictures, and generates the same prompts and seeds with
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
        on_leak: what is done with an image that lies inside a shield all the same; see `generate`.
        attempts: how often such an image is sampled at most.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe = load(DEFAULT_MODEL, device)
    options = {"steps": steps, **preset_of(DEFAULT_MODEL).guidance_call(), "progress": progress}

    every_prompt = [prompt for prompt in prompts for _ in SEEDS]
    every_seed = [seed + s for _ in prompts for s in SEEDS]
    plain = generate(pipe, every_prompt, every_seed, label="without SPELL", **options)
    space = LatentSpace.of(pipe)
    protected = ProtectedSet.create(out / "protected", space, overwrite=True)
    names = [f"{p}, seed {s}" for p, s in zip(every_prompt, every_seed, strict=True)]
    protected.add(space.encode(plain.images), names, radius)
    protection = Spell(protected, radius, overcompensation, batch=False)
    made_with = settings_of(protection, pipe, DEFAULT_MODEL, on_leak, attempts, options)
    log = open_log(out / "with", made_with, protected)
    repairs = {"on_leak": on_leak, "attempts": attempts, "log": log.append}
    shielded = generate(pipe, every_prompt, every_seed, protection, label="with SPELL", **repairs, **options)

    seeds = [seed + s for s in DIVERSITY_SEEDS]
    same = [DIVERSITY_PROMPT] * len(seeds)
    alike = generate(pipe, same, seeds, label="one prompt, without SPELL", **options)
    spread = Spell(radius=diversity_radius, overcompensation=overcompensation)
    differing = generate(pipe, same, seeds, spread, label="one prompt, with SPELL", **options)
    encoder = encoder_of(DEFAULT_MODEL)
    assert encoder is not None
    write_images(out / "without", plain, every_prompt, every_seed)
    write_images(out / "with", shielded, every_prompt, every_seed)
    diversity = Diversity(
        prompt=DIVERSITY_PROMPT,
        seeds=seeds,
        without=alike.images,
        with_=differing.images,
        vendi_without=vendi(encoder.image_features(alike.images)),
        vendi_with=vendi(encoder.image_features(differing.images)),
        radius=diversity_radius,
    )

    report, rows = compare(out, every_prompt, every_seed, plain, shielded, space, protected, radius, made_with, log)
    report["vendi_without"], report["vendi_with"] = diversity.vendi_without, diversity.vendi_with
    report["diversity"] = {
        "prompt": DIVERSITY_PROMPT,
        "radius": diversity_radius,
        "min_pair_distance_without": closest_pair(alike),
        "min_pair_distance_with": closest_pair(differing),
        "seconds_without": alike.seconds,
        "seconds_with": differing.seconds,
    }
    settings = {"protected": "protected", "radius": radius, "overcompensation": overcompensation, "batch": False}
    protection.write_trace(out / "trace.csv")
    save_image(protection_grid(rows, radius), out / "grid.png")
    save_image(diversity_grid(diversity), out / "diversity.png")
    write_report(out / "report.html", report, rows, diversity, protection.trace, settings, made_with)
    write_json(out / "report.json", report)
    return report
