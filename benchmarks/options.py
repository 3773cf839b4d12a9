"""Measure what each option of Spell does on the embedded model: leaks, diversity, quality, sparsity.

8 prompts x 8 seeds. Protection: their plain images are protected and the same seeds run again. Diversity: images of one
prompt repel each other. Quality in the features of the embedded encoder.

    python benchmarks/options.py --out docs/options.md
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from shielded import LatentSpace, Spell
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import caption_score, frechet_distance, vendi
from shielded.files import replacing
from shielded.generation import Generated, generate
from shielded.models import EMOJI, PRESETS, PROTECTION, PROTECTION_RADIUS, VARIETY, VARIETY_RADIUS, load

SEEDS = 8
KEPT = {"release": None, "radius_schedule": "constant"}  # as published
PROTECTED = {
    "the paper's sum": {"overlap": "sum", **KEPT},
    "the paper's sum, nearest 1 (SPELL-1)": {"overlap": "sum", "nearest": 1, **KEPT},
    "guidance kept": KEPT,
    "guidance kept, λ = 1": {"overcompensation": 1.0, **KEPT},
    "default of `Spell`": {},
    "release at all levels": {"release": 0.0},
    "constant radius": {"radius_schedule": "constant"},
    "window 1.0–0.5": {"window": (1.0, 0.5)},
    "`PROTECTION` (default of `generate`)": PROTECTION,
}
DIVERSITY = {
    "the paper's sum": {"overlap": "sum", **KEPT},
    "guidance kept": KEPT,
    "guidance kept, window 1.0–0.8": {"window": (1.0, 0.8), **KEPT},
    "default of `Spell`": {},
    "`VARIETY` (default of `generate`)": VARIETY,
    "`VARIETY`, window 1.0–0.5": {"window": (1.0, 0.5), **VARIETY},
    "`VARIETY`, one image at a time, history": {"batch": False, "history": True, **VARIETY},
}
LEVELS = ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.0))


class Study:
    def __init__(self, prompts: int) -> None:
        self.pipe = load("emoji", "cpu")
        self.encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
        captions = (EMOJI / "captions.txt").read_text().splitlines()
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
        self.captions = [captions[i] for i in order[:prompts]]
        self.texts = [caption for caption in self.captions for _ in range(SEEDS)]
        other, _ = self.run(first_seed=100)
        self.reference = self.encoder.image_features(other.images)

    def run(self, first_seed: int = 0, **options) -> tuple[Generated, list[dict]]:
        """Sample prompt by prompt, so that only images of one prompt repel each other, and collect the trace."""
        parts, trace = [], []
        for caption in self.captions:
            spell = Spell(**options) if options else None
            seeds = range(first_seed, first_seed + SEEDS)
            size = 1 if spell and spell.history is not None else SEEDS
            for some in (seeds[i : i + size] for i in range(0, SEEDS, size)):
                parts.append(
                    generate(
                        self.pipe,
                        [caption] * size,
                        list(some),
                        spell,
                        guidance_scale=PRESETS["emoji"].guidance,
                        progress=False,
                    )
                )
                trace.append(spell.trace if spell else [])
        images = [image for part in parts for image in part.images]
        return Generated(images, torch.cat([p.latents for p in parts]), sum(p.seconds for p in parts)), trace

    def row(
        self, name: str, protected: torch.Tensor | None, radius: float, made: Generated, trace: list[list[dict]]
    ) -> str:
        features = self.encoder.image_features(made.images)
        latents = made.latents.double().flatten(1)
        cells = []
        if protected is not None:
            nearest = torch.cdist(latents, protected.double().flatten(1)).min(dim=1).values
            inside = int((nearest < radius * (1 - 1e-5)).sum())
            cells = [f"{inside} of {len(latents)}", f"{nearest.min().item():.2f}"]
        closest = min(torch.pdist(part).min().item() for part in latents.split(SEEDS))
        cells += [
            f"{closest:.1f}",
            f"{statistics.mean(vendi(part) for part in features.split(SEEDS)):.2f}",
            f"{caption_score(features, self.encoder.text_features(self.texts)).mean().item():.3f}",
            f"{frechet_distance(features, self.reference):.3f}",
            *sparsity(trace),
        ]
        line = " | ".join(["", name, *cells, ""]).strip()
        print(line, flush=True)
        return line


def sparsity(trace: list[list[dict]]) -> list[str]:
    """Format the share of pushed images and, per noise level, the share of pushed steps and the median push/score."""
    rows = [row | {"call": n} for n, call in enumerate(trace) for row in call]
    if not rows:
        return [""] * (1 + len(LEVELS))
    images = {(row["call"], row["run"], row["image"]) for row in rows}
    touched = {(row["call"], row["run"], row["image"]) for row in rows if row["push"] > 0}
    cells = [f"{100 * len(touched) / len(images):.0f} %"]
    for high, low in LEVELS:
        here = [row for row in rows if low <= row["noise_level"] < high or row["noise_level"] == high == 1.0]
        pushed = [row["score_ratio"] for row in here if row["push"] > 0]
        share = 100 * len(pushed) / max(1, len(here))
        cells.append(f"{share:.0f} %, {statistics.median(pushed):.2f}" if pushed else "0 %")
    return cells


def table(
    study: Study, title: str, radius: float, cases: dict[str, dict], plain: Generated, protected: torch.Tensor | None
) -> list[str]:
    columns = [] if protected is None else ["inside", "nearest"]
    columns += ["closest pair", "Vendi", "caption score", "Fréchet", "images pushed"]
    columns += [f"t {high:g}–{low:g}" for high, low in LEVELS]
    lines = [" | ".join(["", title, *columns, ""]).strip(), "|---" * (len(columns) + 1) + "|"]
    lines.append(study.row("no SPELL", protected, radius, plain, [[]]))
    for name, options in cases.items():
        options = {
            "radius": radius,
            **({} if protected is None else {"protected": protected, "batch": False}),
            **options,
        }
        lines.append(study.row(name, protected, radius, *study.run(**options)))
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--radius", type=float, default=PROTECTION_RADIUS, help="in units of √dim")
    parser.add_argument("--diversity-radius", type=float, default=VARIETY_RADIUS, help="in units of √dim")
    args = parser.parse_args()
    study = Study(args.prompts)
    root = LatentSpace.of(study.pipe).dim ** 0.5
    protection, diversity = args.radius * root, args.diversity_radius * root
    plain, _ = study.run()
    text = [
        "# What the options do",
        "",
        f"Embedded model, {args.prompts} prompts × {SEEDS} seeds, 25 DDIM steps, guidance 3; written by "
        "`python benchmarks/options.py --out docs/options.md`. *Inside* and *nearest*: final latents against the plain "
        "images of the same seeds, which the first table protects. Vendi per prompt, then averaged. Fréchet distance "
        "(features of the embedded encoder) is to plain images of the same prompts at other seeds; with so few images "
        "it compares the rows of one table and says nothing in absolute terms. The columns t give, for a range of "
        "noise levels t = σ/(α + σ), the share of image steps that were pushed, and the median length of the push as "
        "a share of the score.",
        "",
        *table(study, f"protection, r = {protection:.3g}", protection, PROTECTED, plain, plain.latents),
        *table(study, f"diversity, r = {diversity:.3g}", diversity, DIVERSITY, plain, None),
    ]
    with replacing(args.out) as draft:
        draft.write_text("\n".join(text).rstrip() + "\n")


if __name__ == "__main__":
    main()
