"""Generate with and without SPELL at the same seeds, measure both, and write what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from shielded.certificate import Certificate, certify, leaks
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import vendi
from shielded.files import replacing, write_json
from shielded.generate import Generated, generate
from shielded.latent_space import LatentSpace
from shielded.models import EMOJI, GUIDANCE, load
from shielded.protected import ProtectedSet
from shielded.report import Row, write_report
from shielded.report.grid import protection_grid
from shielded.spell import Spell

UNIT_FREE_RADIUS = 0.8  # per √dim; the paper's 200 for Stable Diffusion 3 is 0.78


def run(
    out: Path,
    prompt: str,
    model: str = "emoji",
    protect: Path | None = None,
    n: int = 4,
    radius: float | None = None,
    seed: int = 0,
    steps: int = 25,
    overcompensation: float = 1.6,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """n images of one prompt, kept away from a protected set or, without one, from each other.

    Writes the images, `grid.png`, `trace.csv`, `report.html` and `report.json` to the folder `out` and returns the
    report. Arguments as on the command line (`shielded generate --help`).
    """
    pipe = load(model, device)
    protected = None if protect is None else ProtectedSet.open(protect)
    if protected is None:
        radius = radius or UNIT_FREE_RADIUS * LatentSpace.of(pipe).dim ** 0.5
    spell = Spell(protected, radius, overcompensation, batch=protected is None)
    prompts, seeds = [prompt] * n, list(range(seed, seed + n))
    options: dict[str, Any] = {"steps": steps, "progress": progress}
    if model in GUIDANCE:
        options["guidance_scale"] = GUIDANCE[model]
    plain = generate(pipe, prompts, seeds, label="without SPELL", **options)
    shielded = generate(pipe, prompts, seeds, spell, label="with SPELL", **options)
    report, rows = compare(out, prompts, seeds, plain, shielded, protected, radius)
    if model == "emoji":
        encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
        report["vendi_without"] = vendi(encoder.image_features(plain.images))
        report["vendi_with"] = vendi(encoder.image_features(shielded.images))
    settings = {"radius": radius, "overcompensation": overcompensation, "batch": spell.batch}
    if protect is not None:
        settings = {"protected": str(protect), **settings}
    spell.write_trace(out / "trace.csv")
    save_image(protection_grid(rows, radius if protected is not None else None), out / "grid.png")
    write_report(out / "report.html", report, rows, None, spell.trace, settings)
    write_json(out / "report.json", report)
    return report


def compare(
    out: Path,
    prompts: list[str],
    seeds: list[int],
    plain: Generated,
    shielded: Generated,
    protected: ProtectedSet | None,
    radius: float | None,
) -> tuple[dict[str, Any], list[Row]]:
    """Write both sets of images, measure them against the protected set, and put the report together."""
    files_without = _write_images(out / "without", plain, prompts, seeds)
    files_with = _write_images(out / "with", shielded, prompts, seeds)
    before: list[Certificate] = []
    after: list[Certificate] = []
    if protected is not None:
        before = certify(plain.latents, files_without, protected, radius)
        after = certify(shielded.latents, files_with, protected, radius)
    rows = [
        Row(
            prompt,
            seed,
            plain.images[i],
            shielded.images[i],
            before[i].nearest_distance if before else None,
            after[i].nearest_distance if after else None,
            None,
        )
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    report = {
        "prompt": ", ".join(dict.fromkeys(prompts)),
        "n": len(rows),
        "radius": radius,
        "leaks_without": leaks(before) if before else None,
        "leaks_with": leaks(after) if after else None,
        "min_distance_without": min((c.nearest_distance for c in before), default=None),
        "min_distance_with": min((c.nearest_distance for c in after), default=None),
        "vendi_without": None,
        "vendi_with": None,
        "seconds_without": plain.seconds,
        "seconds_with": shielded.seconds,
        "certificates": [vars(c) for c in after],
        "certificates_without": [vars(c) for c in before],
    }
    return report, rows


def _write_images(folder: Path, made: Generated, prompts: list[str], seeds: list[int]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for prompt, seed, image in zip(prompts, seeds, made.images, strict=True):
        words = "".join(c if c.isalnum() else " " for c in prompt).split()
        files.append(folder / f"{'-'.join(words)[:60] or 'image'}-{seed}.png")
        save_image(image, files[-1])
    return files


def save_image(image: Image.Image, path: Path) -> None:
    with replacing(path) as draft:
        image.save(draft, format="PNG")
