"""What each option of Spell does on the embedded model: leaks, diversity, quality, sparsity.

Protection: the plain images of 16 prompts x 2 seeds are protected and the same seeds run again. Diversity: 8 prompts x
8 seeds, images of one prompt repel each other. Quality in the features of the embedded encoder.

    python benchmarks/options.py --out docs/options.md
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from shielded import Spell
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import caption_score, frechet_distance, vendi
from shielded.generate import Generated, generate
from shielded.models import EMOJI, GUIDANCE, load

PROTECTION = {
    "no SPELL": None,
    "sum": {"overlap": "sum"},
    "sum, nearest 1": {"overlap": "sum", "nearest": 1},
    "project (default)": {},
    "project, λ = 1": {"overcompensation": 1.0},
    "project, posterior radius": {"radius_schedule": "posterior"},
    "project, window 1.0–0.5": {"window": (1.0, 0.5)},
}
DIVERSITY = {
    "no SPELL": None,
    "sum": {"overlap": "sum"},
    "project (default)": {},
    "project, λ = 1": {"overcompensation": 1.0},
    "project, window 1.0–0.6": {"window": (1.0, 0.6)},
    "project, window 1.0–0.8": {"window": (1.0, 0.8)},
}
LEVELS = ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.0))


class Study:
    def __init__(self) -> None:
        self.pipe = load("emoji", "cpu")
        self.encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
        captions = (EMOJI / "captions.txt").read_text().splitlines()
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        self.captions = [captions[i] for i in order]

    def run(self, prompts: list[str], seeds: list[int], spell: Spell | None) -> tuple[Generated, list[dict]]:
        """Batches of 8, so that eight seeds of one prompt repel each other; the trace of all of them."""
        parts, trace = [], []
        for i in range(0, len(prompts), 8):
            part = slice(i, i + 8)
            made = generate(
                self.pipe, prompts[part], seeds[part], spell, guidance_scale=GUIDANCE["emoji"], progress=False
            )
            parts.append(made)
            trace += spell.trace if spell else []
        images = [image for part in parts for image in part.images]
        return Generated(images, torch.cat([p.latents for p in parts]), sum(p.seconds for p in parts)), trace

    def quality(self, made: Generated, prompts: list[str], plain: torch.Tensor) -> tuple[float, float]:
        features = self.encoder.image_features(made.images)
        score = caption_score(features, self.encoder.text_features(prompts)).mean().item()
        return score, frechet_distance(features, plain)


def sparsity(trace: list[dict]) -> str:
    """Per noise level: share of image steps with an active shield, and median push over score where active."""
    cells = []
    for high, low in LEVELS:
        rows = [row for row in trace if low <= row["noise_level"] < high or row["noise_level"] == high == 1.0]
        touched = [row["score_ratio"] for row in rows if row["active"]]
        share = len(touched) / max(1, len(rows))
        cells.append(f"{100 * share:.0f} %, {statistics.median(touched) if touched else 0:.2f}")
    return " | ".join(cells)


def protection(study: Study, radius: float) -> list[str]:
    prompts = [caption for caption in study.captions[:16] for _ in range(2)]
    seeds = [0, 1] * 16
    plain, _ = study.run(prompts, seeds, None)
    other, _ = study.run(prompts, [s + 100 for s in seeds], None)
    base = study.encoder.image_features(other.images)
    levels = " | ".join(f"t {high:g}–{low:g}" for high, low in LEVELS)
    lines = [
        f"| protection, r = {radius:g} | inside | nearest | caption score | Fréchet | {levels} | s |",
        "|---|" + "---|" * (5 + len(LEVELS)),
    ]
    for name, options in PROTECTION.items():
        spell = None if options is None else Spell(plain.latents, radius, batch=False, **options)
        made, trace = study.run(prompts, seeds, spell)
        nearest = torch.cdist(made.latents.double().flatten(1), plain.latents.double().flatten(1)).min(dim=1).values
        score, frechet = study.quality(made, prompts, base)
        inside = int((nearest < radius * (1 - 1e-5)).sum())
        table = sparsity(trace) if trace else " | ".join("" for _ in LEVELS)
        lines.append(
            f"| {name} | {inside} of {len(prompts)} | {nearest.min().item():.2f} | {score:.3f} | {frechet:.3f} "
            f"| {table} | {made.seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def diversity(study: Study, radius: float) -> list[str]:
    prompts = [caption for caption in study.captions[16:24] for _ in range(8)]
    seeds = list(range(8)) * 8
    other, _ = study.run(prompts, [s + 100 for s in seeds], None)
    base = study.encoder.image_features(other.images)
    levels = " | ".join(f"t {high:g}–{low:g}" for high, low in LEVELS)
    lines = [
        f"| diversity, r = {radius:g} | Vendi | closest pair | caption score | Fréchet | {levels} | s |",
        "|---|" + "---|" * (5 + len(LEVELS)),
    ]
    for name, options in DIVERSITY.items():
        made, trace = study.run(prompts, seeds, None if options is None else Spell(radius=radius, **options))
        features = study.encoder.image_features(made.images)
        scores = [vendi(part) for part in features.split(8)]
        closest = min(torch.pdist(part.double().flatten(1)).min().item() for part in made.latents.split(8))
        score, frechet = study.quality(made, prompts, base)
        table = sparsity(trace) if trace else " | ".join("" for _ in LEVELS)
        lines.append(
            f"| {name} | {statistics.mean(scores):.2f} | {closest:.1f} | {score:.3f} | {frechet:.3f} "
            f"| {table} | {made.seconds:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--radius", type=float, default=15.0)
    parser.add_argument("--diversity-radius", type=float, default=26.0)
    args = parser.parse_args()
    study = Study()
    text = [
        "# What the options do",
        "",
        "Embedded model, 25 DDIM steps, guidance 3; written by `python benchmarks/options.py --out docs/options.md`. "
        "Fréchet distance (features of the embedded encoder) is to plain images of the same prompts at other seeds; "
        "with so few images it compares the rows of one table and says nothing in absolute terms. The columns t give, "
        "for a range of noise levels t = σ/(α + σ), the share of image steps in which a shield was active, and the "
        "median length of the push as a share of the score.",
        "",
        *protection(study, args.radius),
        "",
        *diversity(study, args.diversity_radius),
    ]
    args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
