"""Protect the embedded model's own plain pictures, and generate the same seeds again: with guidance kept and released.

    python benchmarks/release.py --out docs/method.md --sheet docs/images/release.webp

Each plain picture is protected with a radius of `PROTECTION_RADIUS`. Rows of the sheet: plain, guidance kept and images
inside sampled again, guidance released (the default of `shielded generate --protect`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from shielded import LatentSpace, ProtectedSet, Spell
from shielded.certificates.certificate import measure
from shielded.evaluation.encoder import Encoder, encoder_of
from shielded.evaluation.metrics import caption_score
from shielded.files import replace_section
from shielded.generation import Generated, generate
from shielded.models import PROTECTION, PROTECTION_RADIUS, load, preset_of
from shielded.spell import Calibration

PROMPTS = ["owl", "red heart", "pizza", "sunflower", "cat face", "rocket", "guitar", "tiger"]
PROMPTS += ["cactus", "banana", "dolphin", "clown face", "fox", "alarm clock", "umbrella", "red apple"]
SEEDS = range(4)
SETTINGS: dict[str, dict[str, Any]] = {
    "guidance kept": {"release": None, "radius_schedule": "constant"},
    "guidance released (default of `generate`)": PROTECTION,
}
HEAD = "| setting | samplings | refused | decoded: least / median | similarity to the nearest | caption score |"


def row(
    name: str, made: Generated, protected: ProtectedSet, plain: Generated, encoder: Encoder, texts: list[str]
) -> str:
    """Format a row of the table."""
    found = measure(protected.space.encode(made.images), protected)
    distance = torch.tensor([measured.distance for measured in found])
    features, others = encoder.image_features(made.images), encoder.image_features(plain.images)
    similarity = (features @ others.T).amax(dim=1).mean().item()
    caption = caption_score(features, encoder.text_features(texts)).mean().item()
    refused = sum(reason is not None for reason in made.refused)
    return (
        f"| {name} | {sum(made.attempts)} | {refused} | {distance.min():.1f} / {distance.median():.1f} | "
        f"{similarity:.3f} | {caption:.3f} |"
    )


def sheet(rows: list[list[Image.Image]], file: Path) -> None:
    """Paste rows of pictures below each other."""
    whole = Image.new("RGB", (128 * len(rows[0]), 128 * len(rows)), "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            whole.paste(picture, (128 * x, 128 * y))
    whole.save(file, quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--margins", type=float, nargs="*", default=[], help="also measured, in place of the default")
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced; default: only printed")
    parser.add_argument("--sheet", type=Path, help="picture of the first eight prompts")
    args = parser.parse_args()
    pipe, encoder, preset = load("emoji", "cpu"), encoder_of("emoji"), preset_of("emoji")
    assert encoder is not None
    assert preset.calibration is not None
    space, calibration = LatentSpace.of(pipe), Calibration.load(preset.calibration)
    texts = [prompt for prompt in PROMPTS[: args.prompts] for _ in SEEDS]
    seeds = [seed for _ in PROMPTS[: args.prompts] for seed in SEEDS]
    options = {"steps": preset.steps, "guidance_scale": preset.guidance}
    plain = generate(pipe, texts, seeds, label="plain", **options)
    chosen = [i for i in range(len(texts)) if i % len(SEEDS) < 2][:16]
    pictures = [[plain.images[i] for i in chosen]]
    with tempfile.TemporaryDirectory() as folder:
        protected = ProtectedSet.create(Path(folder) / "set", space)
        ids = [f"{text} {seed}" for text, seed in zip(texts, seeds, strict=True)]
        protected.add(space.encode(plain.images), ids, PROTECTION_RADIUS * space.dim**0.5)
        lines = [HEAD, "|---|---|---|---|---|---|", row("plain", plain, protected, plain, encoder, texts)]
        margins = {f"margin {margin:g}": {**PROTECTION, "margin": margin} for margin in args.margins}
        for name, setting in {**SETTINGS, **margins}.items():
            spell = Spell(protected, batch=False, calibration=calibration, **setting)
            made = generate(pipe, texts, seeds, spell, label=name, on_leak="restart", **options)
            lines.append(row(name, made, protected, plain, encoder, texts))
            pictures.append([made.images[i] for i in chosen])
    print("\n".join(lines))
    if args.out is not None:
        replace_section(args.out, "release", "\n".join(lines))
    if args.sheet is not None:
        sheet(pictures, args.sheet)


if __name__ == "__main__":
    main()
