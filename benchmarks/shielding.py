"""Shield the embedded model's whole training set: leaks, time and quality without SPELL, with the paper's and ours.

All training pictures are protected. The methods take turns at the same prompts and seeds, 20 images each, so that their
times compare; finished latents and the decoded pictures, encoded again, are measured against all of them, exactly.
Quality is in the features of the embedded encoder, against the training pictures with the captions that were prompted.

    python benchmarks/shielding.py --data emoji128.tar --work runs/shielding --out docs/shielding.md

What was made is kept in the folder --work, a file per 20 images, so a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from shielded import LatentSpace, ProtectedSet, Spell, __version__
from shielded.certificates.certificate import measure
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import caption_score, frechet_distance, precision_recall
from shielded.files import replacing, write_json
from shielded.generation import generate
from shielded.models import EMOJI, PRESETS, PROTECTION, PROTECTION_RADIUS, load, preset_of
from shielded.protected.ingest.archives import tar_files
from shielded.protected.ingest.pictures import decode_picture
from shielded.spell import Calibration

PLAIN, OURS = "no SPELL", "ours"
_PAPER = {"overlap": "sum", "release": None, "radius_schedule": "constant"}
METHODS: dict[str, tuple[dict[str, Any] | None, str]] = {
    PLAIN: (None, "report"),
    "the paper's sum, nearest 1": ({**_PAPER, "nearest": 1}, "report"),
    "the paper's sum, nearest 10": ({**_PAPER, "nearest": 10}, "report"),
    OURS: (PROTECTION, "restart"),
}
CHUNK = 20  # images per file


@dataclass
class Made:
    """Result of one method: (n, *S) latents and re-encoded pictures, (n, d) features, and a record per image."""

    latents: Tensor
    decoded: Tensor
    features: Tensor
    records: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return sum(record["seconds"] for record in self.records)


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pipe = load("emoji", "cpu")
        # Its second order makes up for few steps; the last one falls back to first order and lands on x0.
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.space = LatentSpace.of(self.pipe)
        self.radius = args.radius * self.space.dim**0.5
        preset = preset_of("emoji")
        assert preset.calibration is not None
        self.calibration = Calibration.load(preset.calibration)
        self.encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
        captions = (EMOJI / "captions.txt").read_text().splitlines()
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(args.seed)).tolist()
        chosen = [captions[i] for i in order[: args.prompts]]
        self.prompts = [caption for caption in chosen for _ in range(args.images)]
        self.seeds = [args.seed + k for _ in chosen for k in range(args.images)]
        self.protected = self._protect(set(chosen))

    def _protect(self, chosen: set[str]) -> ProtectedSet:
        """Protect the training images, and compute the features of those whose captions are prompted."""
        folder = self.args.work / "protected"
        pictures, captions = read_pictures(self.args.data)
        real = [picture for picture, caption in zip(pictures, captions, strict=True) if caption in chosen]
        self.real = self.encoder.image_features(real)
        protected = ProtectedSet.open(folder) if folder.is_dir() else ProtectedSet.create(folder, self.space)
        for first in tqdm(range(len(protected), len(pictures), 512), desc="protect"):
            names = [f"{i:05d} {captions[i]}" for i in range(first, min(first + 512, len(pictures)))]
            protected.add(self.space.encode(pictures[first : first + 512]), names)
        return protected

    def make(self) -> dict[str, Made]:
        """Return all images of each method; those of an earlier run are read from disk."""
        parts: dict[str, list[tuple[dict[str, Tensor], dict[str, Any]]]] = {name: [] for name in METHODS}
        for first in tqdm(range(0, len(self.prompts), CHUNK), desc="images", unit="chunk"):
            for name in METHODS:
                file = self._folder(name) / f"{first:05d}.safetensors"
                if not file.is_file():
                    self._make_chunk(slice(first, first + CHUNK), name, file)
                parts[name].append((load_file(file), json.loads(file.with_suffix(".json").read_text())))
        return {name: self._joined(found) for name, found in parts.items()}

    def _folder(self, name: str) -> Path:
        args = self.args
        setting = [name, *METHODS[name], args.radius, args.steps, args.attempts, args.prompts, args.images, args.seed]
        folder = args.work / hashlib.sha256(json.dumps([__version__, *setting]).encode()).hexdigest()[:12]
        folder.mkdir(exist_ok=True)
        return folder

    def _spell(self, options: dict[str, Any] | None) -> Spell | None:
        if options is None:
            return None
        calibration = {} if "radius_schedule" in options else {"calibration": self.calibration}
        return Spell(self.protected, self.radius, batch=False, **calibration, **options)

    @staticmethod
    def _joined(parts: list[tuple[dict[str, Tensor], dict[str, Any]]]) -> Made:
        tensors = {key: torch.cat([part[key] for part, _ in parts]) for key in ("latents", "decoded", "features")}
        return Made(**tensors, records=[record for _, content in parts for record in content["images"]])

    def _make_chunk(self, part: slice, name: str, file: Path) -> None:
        options, on_leak = METHODS[name]
        first: list[dict[str, Any]] = []  # where the images were before any repair

        def note(event: str, **content: Any) -> None:
            if event == "sampled":
                first.append({key: content[key] for key in ("nearest_distance", "decoded_distance")})

        made = generate(
            self.pipe,
            self.prompts[part],
            self.seeds[part],
            self._spell(options),
            self.args.steps,
            CHUNK,
            progress=False,
            on_leak=on_leak,
            attempts=self.args.attempts,
            log=note,
            guidance_scale=PRESETS["emoji"].guidance,
        )
        decoded = self.space.encode(made.images)  # also where it was measured on the way: the final word
        features = self.encoder.image_features(made.images)
        count = len(made.images)
        records = [
            {"attempts": a, "repair": how, "refused": why, "seconds": made.seconds / count, "first": here}
            for a, how, why, here in zip(made.attempts, made.repair, made.refused, first or [None] * count, strict=True)
        ]
        write_json(file.with_suffix(".json"), {"images": records})
        with replacing(file) as draft:
            save_file({"latents": made.latents, "decoded": decoded, "features": features}, draft)

    def row(self, name: str, made: Made, plain: Made) -> str:
        """Format the method's row of the table; quality and distances leave out refused images."""
        kept = [i for i, record in enumerate(made.records) if record["refused"] is None]
        refused = len(made.records) - len(kept)
        lines = [measure(x[kept], self.protected, self.radius) for x in (made.latents, made.decoded)]
        leaks = [sum(found.leak is not None for found in line) for line in lines]
        nearest = [min(found.distance for found in line) for line in lines]
        features = made.features[kept]
        captions = self.encoder.text_features([self.prompts[i] for i in kept])
        score = caption_score(features, captions).mean().item()
        precision, _ = precision_recall(features, self.real)
        time = made.seconds / plain.seconds
        return (
            f"| {name} | {leaks[0]} | {leaks[1]} | {nearest[0]:.2f} / {nearest[1]:.2f} | {refused} | {precision:.3f} "
            f"| {score:.3f} | {frechet_distance(features, self.real):.3f} | {time:.2f} |"
        )

    def changes(self, made: Made, plain: Made) -> str:
        """Say in a sentence how many samplings were needed, and how little SPELL did where nothing was near."""
        hows = [record["repair"] for record in made.records]
        refused = [record["refused"] for record in made.records if record["refused"] is not None]
        latents, pictures = (
            sum(record["first"][key] < self.radius for record in made.records)
            for key in ("nearest_distance", "decoded_distance")
        )
        far = [found.distance > 1.1 * self.radius for found in measure(plain.latents, self.protected, self.radius)]
        moved = (made.latents - plain.latents).flatten(1).norm(dim=1) / plain.latents.flatten(1).norm(dim=1)
        moved = moved[torch.tensor(far)]
        text = (
            f"Ours after the first sampling: {latents} latents and {pictures} pictures inside. It took "
            f"{sum(r['attempts'] for r in made.records)} samplings for {len(hows)} images: {hows.count(None)} were "
            f"outside at once, {hows.count('restart')} after a restart, {hows.count('push')} were pushed at the end, "
            f"{len(refused)} were refused. Of the {len(moved)} images whose plain latents are outside every shield by "
            f"more than a tenth of the radius, {100 * (moved == 0).double().mean():.0f} % are the same bit for bit; "
            f"the median moved by {100 * moved.median():.1f} % of its length."
        )
        return "\n".join([text, "", *(f"- refused: {reason}" for reason in refused)]).rstrip()


def read_pictures(tar: Path) -> tuple[list[Image.Image], list[str]]:
    """Read images and captions from a webdataset tar, in the order of its names."""
    pictures, captions = {}, {}
    for member, content in tar_files(str(tar), (".json", ".webp")):
        name, _, kind = member.rpartition(".")
        if kind == "json":
            captions[name] = json.loads(content)["caption"]
        else:
            pictures[name] = decode_picture(content)
    return [pictures[name] for name in sorted(pictures)], [captions[name] for name in sorted(pictures)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="webdataset tar with the training pictures")
    parser.add_argument("--work", type=Path, required=True, help="folder for what was made, kept between runs")
    parser.add_argument("--out", type=Path, help="Markdown file; default: only printed")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--images", type=int, default=5, help="per prompt")
    parser.add_argument("--radius", type=float, default=PROTECTION_RADIUS, help="in units of √dim")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    study = Study(args)
    made = study.make()
    rows = [study.row(name, found, made[PLAIN]) for name, found in made.items()]
    count = len(study.prompts)
    text = "\n".join(
        [
            "# Shielding the training set",
            "",
            f"Embedded model, all {len(study.protected):,} training pictures protected with r = "
            f"{study.radius:.4g}, that is {args.radius:g} √dim; {count:,} images "
            f"({args.prompts} prompts, {args.images} seeds each), {args.steps} steps of DPM-Solver++ (2M), "
            f"guidance {PRESETS['emoji'].guidance:g}; written by `python benchmarks/shielding.py "
            f"--data emoji128.tar --work runs/shielding --prompts {args.prompts} --images {args.images} "
            "--out docs/shielding.md`.",
            "",
            "Inside a shield: the finished latents, and the decoded picture encoded again, each measured exactly "
            "against the whole set. Refused images are not counted in the other columns. Precision and Fréchet "
            "distance are to the training pictures with the prompted captions, in the features of the embedded "
            "encoder, as is the caption score. Time is relative to that without SPELL, with all measuring and repairs; "
            "the methods took turns.",
            "",
            "| | latents inside | pictures inside | nearest: latents / pictures | refused | precision | caption score "
            "| Fréchet | time |",
            "|---|" + "---|" * 8,
            *rows,
            "",
            study.changes(made[OURS], made[PLAIN]),
        ]
    )
    print(f"{text}\n\n{time.perf_counter() - start:.0f} s")
    if args.out is not None:
        with replacing(args.out) as draft:
            draft.write_text(text + "\n")


if __name__ == "__main__":
    main()
