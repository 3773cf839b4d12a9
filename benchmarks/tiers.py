"""Shield the embedded model's whole training set by distance alone, and by distance and copy descriptor together.

Like `benchmarks/shielding.py`, whose prompts, seeds and set it takes; the methods take turns.

    python benchmarks/tiers.py --data emoji128.tar --work runs/tiers --out docs/copies_measured.md --sheet docs/images
    python benchmarks/tiers.py --data emoji128.tar --work runs/tiers --blur    # how early x0 shows what is a copy

Beside leaks, copies and time it measures how similar each picture is to the nearest protected one in the features of
the contrastive encoder, which takes no part in the runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from shielding import CHUNK, Study, read_pictures
from torch import Tensor
from tqdm import tqdm

from shielded import ProtectedSet, Spell, __version__
from shielded.certificates.certificate import measure
from shielded.evaluation.metrics import caption_score, frechet_distance, precision_recall
from shielded.files import replace_section, replacing, write_json
from shielded.generation import generate
from shielded.models import PRESETS, PROTECTION, PROTECTION_RADIUS

PLAIN, DISTANCE, BOTH = "no SPELL", "distance", "distance and descriptor"
PAIRS = 20  # on the sheet


class TwoTiers(Study):
    """The study of `shielding`, with a set that has a copy descriptor."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.protected.set_copy_threshold(None)
        self.by_distance = ProtectedSet.open(self.protected.path, self.protected.version)
        self.protected.set_copy_threshold(args.threshold)

    def _protect(self, chosen: set[str]) -> ProtectedSet:
        folder = self.args.work / "protected"
        self.pictures, captions = read_pictures(self.args.data)
        self.known = self.encoder.image_features(self.pictures)
        self.real = self.known[[i for i, caption in enumerate(captions) if caption in chosen]]
        protected = (
            ProtectedSet.open(folder)
            if folder.is_dir()
            else ProtectedSet.create(folder, self.space, descriptor="shielded")
        )
        for first in tqdm(range(len(protected), len(self.pictures), 512), desc="protect"):
            part = self.pictures[first : first + 512]
            protected.add(part, [f"{first + i:05d} {captions[first + i]}" for i in range(len(part))])
        return protected

    def tensors(self, name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Make all images of a method; those of an earlier run are read from disk."""
        files = [self._file(name, first) for first in range(0, len(self.prompts), CHUNK)]
        parts = [load_file(file) for file in files]
        records = [record for file in files for record in json.loads(file.with_suffix(".json").read_text())]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, records

    def make_all(self) -> None:
        """Make what is missing, the methods in turn."""
        for first in tqdm(range(0, len(self.prompts), CHUNK), desc="images", unit="chunk"):
            for name in (PLAIN, DISTANCE, BOTH):
                if not self._file(name, first).is_file():
                    self._make(name, slice(first, first + CHUNK), self._file(name, first))

    def _file(self, name: str, first: int) -> Path:
        args = self.args
        setting = [__version__, name, args.radius, args.steps, args.attempts, args.prompts, args.images, args.seed]
        setting += [args.threshold] if name == BOTH else []
        folder = args.work / hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:12]
        folder.mkdir(exist_ok=True)
        return folder / f"{first:05d}.safetensors"

    def _make(self, name: str, part: slice, file: Path) -> None:
        events: list[tuple[str, int]] = []
        spell, repairs = None, {}
        if name != PLAIN:
            protected = self.protected if name == BOTH else self.by_distance
            spell = Spell(protected, self.radius, batch=False, calibration=self.calibration, **PROTECTION)
            repairs = {"on_leak": "restart", "attempts": self.args.attempts}
        made = generate(
            self.pipe,
            self.prompts[part],
            self.seeds[part],
            spell,
            self.args.steps,
            CHUNK,
            progress=False,
            log=lambda event, **content: events.append((event, content["seed"])),
            guidance_scale=PRESETS["emoji"].guidance,
            **repairs,
        )
        similarities, rows = self.protected.copy_rows(made.images)
        records = [
            {"attempts": a, "repair": how, "refused": why, "seconds": made.seconds / len(made.images)}
            for a, how, why in zip(made.attempts, made.repair, made.refused, strict=True)
        ]
        records[0]["copying"] = sum(event == "copying" for event, _ in events)
        write_json(file.with_suffix(".json"), records)
        content = {
            "latents": made.latents,
            "decoded": self.space.encode(made.images),
            "features": self.encoder.image_features(made.images),
            "similarity": similarities[:, 0],
            "copied": rows[:, 0],
        }
        with replacing(file) as draft:
            save_file(content, draft)

    def row(self, name: str, plain_seconds: float) -> tuple[str, float]:
        """Format the method's row of the table, and sum its seconds; refused images count in their column alone."""
        found, records = self.tensors(name)
        kept = [i for i, record in enumerate(records) if record["refused"] is None]
        seconds = sum(record["seconds"] for record in records)
        lines = [measure(found[key][kept], self.protected, self.radius) for key in ("latents", "decoded")]
        inside = sum(any(at.leak is not None for at in pair) for pair in zip(*lines, strict=True))
        similarity, features = found["similarity"][kept], found["features"][kept]
        nearest = (features @ self.known.T).amax(dim=1)
        score = caption_score(features, self.encoder.text_features([self.prompts[i] for i in kept])).mean().item()
        precision, _ = precision_recall(features, self.real)
        text = (
            f"| {name} | {inside} | {int((similarity >= self.args.threshold).sum())} | {len(records) - len(kept)} "
            f"| {sum(record['attempts'] for record in records)} | {similarity.mean():.3f} | {nearest.mean():.3f} "
            f"| {precision:.3f} | {score:.3f} | {frechet_distance(features, self.real):.3f} "
            f"| {seconds / (plain_seconds or seconds):.2f} |"
        )
        return text, seconds

    def pairs(self, side: int = 96) -> Image.Image:
        """Draw the protected picture that a plain one resembles most, that plain one, and the shielded one."""
        (plain, _), (shielded, records) = self.tensors(PLAIN), self.tensors(BOTH)
        kept = torch.tensor([record["refused"] is None for record in records])
        order = plain["similarity"].masked_fill(~kept, -2).argsort(descending=True).tolist()
        chosen: dict[str, int] = {}  # one of each prompt
        for i in order:
            chosen.setdefault(self.prompts[i], i)
        places = list(chosen.values())[:PAIRS]
        sheet = Image.new("RGB", (PAIRS // 2 * side + 72, 6 * side + 10), "white")
        draw = ImageDraw.Draw(sheet)
        for number, i in enumerate(places):
            column, half = number % (PAIRS // 2), number // (PAIRS // 2)
            made = self.space.decode(torch.stack([plain["latents"][i], shielded["latents"][i]]))
            for line, picture in enumerate([self.pictures[int(plain["copied"][i])], *made]):
                at = (72 + column * side + 2, half * (3 * side + 10) + line * side + 2)
                sheet.paste(picture.convert("RGB").resize((side - 4, side - 4), Image.Resampling.LANCZOS), at)
        for half in range(2):
            for line, text in enumerate(("protected", "plain", "shielded")):
                draw.text((4, half * (3 * side + 10) + line * side + side // 2 - 6), text, fill="black")
        return sheet


class Watched:
    """The correction of a Spell; keeps the similarity of every x0 to the most similar protected picture."""

    def __init__(self, spell: Spell, study: TwoTiers, seen: dict[float, list[Tensor]]) -> None:
        self.spell, self.study, self.seen = spell, study, seen
        self.start, self.finish, self.colliding = spell.start, spell.finish, spell.colliding
        self.release, self.release_scale, self.guidance = spell.release, spell.release_scale, None

    def __call__(self, x0: Tensor, *, alpha: float, sigma: float, **state: Any) -> Tensor:
        similarity = self.study.protected.copy_rows(self.study.space.decode(x0))[0]
        self.seen.setdefault(sigma / (alpha + sigma), []).append(similarity[:, 0])
        return self.spell(x0, alpha=alpha, sigma=sigma, **state)


def blur(study: TwoTiers, count: int = 100, close: float = 0.95) -> str:
    """Compare the similarity of x0 at each noise level with that of the finished picture."""
    seen: dict[float, list[Tensor]] = {}
    finished: list[Tensor] = []
    chosen = range(0, len(study.prompts), -(-len(study.prompts) // count))
    for first in tqdm(range(0, len(chosen), CHUNK), desc="images", unit="chunk"):
        rows = chosen[first : first + CHUNK]
        spell = Spell(study.by_distance, study.radius, batch=False, calibration=study.calibration, **PROTECTION)
        generators = [torch.Generator().manual_seed(study.seeds[i]) for i in rows]
        options: dict[str, Any] = {"num_inference_steps": study.args.steps, "generator": generators}
        with spell.attach(study.pipe, through=Watched(spell, study, seen)):
            made = study.pipe([study.prompts[i] for i in rows], guidance_scale=PRESETS["emoji"].guidance, **options)
        finished.append(study.protected.copy_rows(made.images)[0][:, 0])
    last = torch.cat(finished)
    lines = ["| noise level | correlation | less similar, median | at most |", "|--:|--:|--:|--:|"]
    for level, values in sorted(seen.items(), reverse=True):
        x0 = torch.cat(values)
        less = (last - x0)[last >= close]
        both = torch.corrcoef(torch.stack([x0, last]))[0, 1]
        lines.append(f"| {level:.2f} | {both:.2f} | {less.median():.3f} | {less.max():.3f} |")
    return "\n".join(
        [*lines, "", f"{len(last)} images, {int((last >= close).sum())} of them at least {close:g} similar."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="webdataset tar with the training pictures")
    parser.add_argument("--work", type=Path, required=True, help="folder for what was made, kept between runs")
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced; default: only printed")
    parser.add_argument("--sheet", type=Path, help="folder for the sheet of pairs")
    parser.add_argument("--blur", action="store_true", help="compare x0 with the finished pictures, and do no more")
    parser.add_argument("--threshold", type=float, default=0.985, help="from which on a picture is a copy")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--images", type=int, default=5, help="per prompt")
    parser.add_argument("--radius", type=float, default=PROTECTION_RADIUS, help="in units of √dim")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    study = TwoTiers(args)
    if args.blur:
        print(blur(study))
        return
    study.make_all()
    plain, seconds = study.row(PLAIN, 0)
    rows = [plain, *(study.row(name, seconds)[0] for name in (DISTANCE, BOTH))]
    copying = sum(record.get("copying", 0) for record in study.tensors(BOTH)[1])
    text = "\n".join(
        [
            f"{len(study.prompts):,} images, {args.prompts} prompts of {args.images} seeds, {args.steps} steps, all "
            f"{len(study.protected):,} training pictures protected with r = {study.radius:.4g} and the threshold "
            f"{args.threshold:g}.",
            "",
            "| | inside | copies | refused | samplings | similarity | by the encoder | precision | caption | Fréchet "
            "| time |",
            "|---|" + "---|" * 10,
            *rows,
            "",
            f"While sampling, {copying} comparisons found a copy.",
        ]
    )
    print(f"{text}\n\n{time.perf_counter() - begun:.0f} s")
    if args.out is not None:
        replace_section(args.out, "tiers", text)
    if args.sheet is not None:
        study.pairs().save(args.sheet / "copies-pairs.png")


if __name__ == "__main__":
    main()
