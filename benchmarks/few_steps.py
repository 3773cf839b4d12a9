"""Few steps and one image at a time on the embedded model: variety and protection at 4 and 8 steps.

    python benchmarks/few_steps.py --reference emoji128.tar --work runs/few --out docs/reproduction.md

Everything is made by `generate` with the defaults of `shielded generate`. For protection each plain picture of the same
number of steps is protected, and the same prompts and seeds are sampled again. Quality is in the features of the
embedded encoder; precision and recall are per prompt, against real images of it. What was made is kept in the folder
--work, a file per row of a table, so a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from shielded import LatentSpace, ProtectedSet, Spell, __version__
from shielded.evaluation.encoder import encoder_of
from shielded.evaluation.metrics import caption_score, frechet_distance, manifold_rows, vendi
from shielded.evaluation.reproduce import emoji_prompts
from shielded.evaluation.reproduce.measures import NEIGHBOURS
from shielded.evaluation.reproduce.reference import real_images
from shielded.files import replace_section, replacing
from shielded.generation import generate
from shielded.models import PROTECTION, PROTECTION_RADIUS, VARIETY, VARIETY_RADIUS, load, preset_of
from shielded.spell import Calibration

OTHER_SEEDS = 1_000_000  # of plain images to compare with, where there are no real ones


@dataclass(frozen=True)
class Setting:
    """Row of a table; `spell` are the options of a Spell, None: no SPELL."""

    name: str
    spell: dict[str, Any] | None = None
    call: dict[str, Any] = field(default_factory=dict)


_ALONE = {"batch": False, "history": True}
VARIED = (
    Setting("plain"),
    Setting("plain, coupled noise", None, {"couple": True}),
    Setting("SPELL, a batch of one prompt", VARIETY),
    Setting("the same, coupled noise", VARIETY, {"couple": True}),
    Setting("SPELL, one image at a time with history", {**VARIETY, **_ALONE}, {"batch_size": 1}),
)
KEPT_AWAY = (
    Setting("plain"),
    Setting("SPELL, sampled once", {**PROTECTION, "batch": False}),
    Setting("SPELL, leaks repaired (`generate`)", {**PROTECTION, "batch": False}, {"on_leak": "restart"}),
)
VARIETY_HEAD = [
    "steps",
    "setting",
    "Vendi",
    "precision",
    "recall",
    "Fréchet",
    "caption score",
    "closest pair / √dim",
]
KEPT_HEAD = ["steps", "setting", "pictures inside", "samplings", "refused", "similarity", "caption score"]


class Study:
    """The model, its prompts and what they are compared with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.work, self.images = args.work, args.images
        self.pipe = load("emoji", "cpu")
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
        self.space, self.preset = LatentSpace.of(self.pipe), preset_of("emoji")
        encoder = encoder_of("emoji")
        assert encoder is not None
        self.encoder = encoder
        self.prompts = emoji_prompts(args.prompts, args.reference)
        self.real = {} if args.reference is None else real_images(args.reference)

    def reference(self, prompt: str, steps: int) -> Tensor:
        """Return features (m, d) of real images of a prompt, or of plain ones at other seeds."""
        if self.real:
            return self.encoder.image_features(self.real[prompt])
        seeds = range(OTHER_SEEDS, OTHER_SEEDS + self.images)
        return self.made(Setting("reference"), steps, None, [prompt], seeds)["features"]

    def made(
        self,
        setting: Setting,
        steps: int,
        protected: ProtectedSet | None = None,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return `latents`, `decoded`, `features`, `attempts`, `refused` of all images; those made before are read."""
        prompts, seeds = self.prompts if prompts is None else prompts, seeds or range(self.images)
        key = [__version__, setting.spell, setting.call, steps, list(prompts), list(seeds), protected is not None]
        file = self.work / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file():
            parts: list[dict[str, Tensor]] = []
            for prompt in prompts:  # each with a history of its own
                parts.append(self._of_prompt(setting, steps, protected, prompt, seeds))
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as draft:
                save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, draft)
        return load_file(file)

    def _of_prompt(
        self, setting: Setting, steps: int, protected: ProtectedSet | None, prompt: str, seeds: Sequence[int]
    ) -> dict[str, Tensor]:
        spell = None
        if setting.spell is not None:
            radius = (VARIETY_RADIUS if protected is None else PROTECTION_RADIUS) * self.space.dim**0.5
            error = None if protected is None else Calibration.load(self.preset.calibration)
            spell = Spell(protected, **{"radius": radius, "calibration": error, **setting.spell})
        call = {"guidance_scale": self.preset.guidance, "progress": False, **setting.call}
        made = generate(self.pipe, [prompt] * len(seeds), list(seeds), spell, steps, **call)
        return {
            "latents": made.latents,
            "decoded": self.space.encode(made.images),
            "features": self.encoder.image_features(made.images),
            "attempts": torch.tensor(made.attempts),
            "refused": torch.tensor([reason is not None for reason in made.refused]),
            "pixels": torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in made.images]),
        }

    # Rows of the tables -----------------------------------------------------------------------------------------------

    def variety(self, setting: Setting, steps: int) -> list[str]:
        """Format variety and quality, per prompt and then averaged; the Fréchet distance is over all images."""
        made = self.made(setting, steps)
        references = [self.reference(prompt, steps) for prompt in self.prompts]
        features, latents = made["features"].split(self.images), made["latents"].flatten(1).split(self.images)
        rows = [manifold_rows(f, r, NEIGHBOURS) for f, r in zip(features, references, strict=True)]
        closest = torch.stack([torch.pdist(z.double()).min() for z in latents])
        texts = [self.encoder.text_features([prompt]) for prompt in self.prompts]
        captions = [caption_score(f, text) for f, text in zip(features, texts, strict=True)]
        return [
            str(steps),
            setting.name,
            f"{_mean(vendi(f) for f in features):.2f}",
            *(f"{_mean(row[name].mean().item() for row in rows):.3f}" for name in ("precision", "recall")),
            f"{frechet_distance(made['features'], torch.cat(references)):.4f}",
            f"{torch.cat(captions).mean():.3f}",
            f"{closest.mean() / self.space.dim**0.5:.3f}",
        ]

    def kept_away(self, settings: Sequence[Setting], steps: int) -> list[list[str]]:
        """Format how far images stay from the plain pictures of the same prompts and seeds, which are protected."""
        plain = self.made(settings[0], steps)
        radius, rows = PROTECTION_RADIUS * self.space.dim**0.5, []
        with tempfile.TemporaryDirectory() as folder:
            protected = ProtectedSet.create(Path(folder) / "set", self.space)
            protected.add(plain["decoded"], list(range(len(plain["decoded"]))), radius)
            for setting in settings:
                made = plain if setting.spell is None else self.made(setting, steps, protected)
                kept = ~made["refused"]
                inside = (protected.nearest(made["decoded"][kept])[0] < radius).double().mean().item()
                texts = [prompt for prompt in self.prompts for _ in range(self.images)]
                texts = [text for text, good in zip(texts, kept.tolist(), strict=True) if good]
                features = made["features"][kept]
                caption = caption_score(features, self.encoder.text_features(texts)).mean().item()
                rows.append(
                    [
                        str(steps),
                        setting.name,
                        f"{inside:.1%}",
                        str(int(made["attempts"].sum())),
                        str(int(made["refused"].sum())),
                        f"{(features @ plain['features'].T).amax(dim=1).mean():.3f}",
                        f"{caption:.3f}",
                    ]
                )
        return rows


def _mean(values: Any) -> float:
    return torch.tensor(list(values), dtype=torch.float64).mean().item()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def sheet(study: Study, steps: int, settings: Sequence[Setting], file: Path) -> None:
    """Draw a row of pictures for each setting, of the first two prompts."""
    rows = [study.made(setting, steps)["pixels"][: 2 * study.images].view(-1, 128, 128, 3) for setting in settings]
    whole = Image.new("RGB", (128 * len(rows[0]), 128 * len(rows)), "white")
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            whole.paste(Image.fromarray(picture.numpy()), (128 * x, 128 * y))
    whole.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="real images; without them plain ones of other seeds")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--work", type=Path, default=Path("runs/few"))
    parser.add_argument("--out", type=Path, help="Markdown file whose section is replaced; default: only printed")
    parser.add_argument("--sheet", type=Path, help="folder for pictures of the first two prompts")
    args = parser.parse_args()
    study = Study(args)
    reference = "real images of the same prompts" if args.reference else "plain images of other seeds"
    size = f"{args.prompts} prompts × {args.images} images, DPM++ 2M; reference: {reference}."
    varied = [study.variety(setting, steps) for steps in args.steps for setting in VARIED]
    kept = [row for steps in args.steps for row in study.kept_away(KEPT_AWAY, steps)]
    text = "\n\n".join([size, table(VARIETY_HEAD, varied), table(KEPT_HEAD, kept)])
    print(text)
    if args.out is not None:
        replace_section(args.out, "few-steps", text)
    for steps in args.steps if args.sheet is not None else ():
        args.sheet.mkdir(parents=True, exist_ok=True)
        sheet(study, steps, VARIED, args.sheet / f"variety-{steps}.png")


if __name__ == "__main__":
    main()
