"""Choose a radius for the embedded model's training images; measure how the denoising error changes the posterior one.

Unpacks the training pictures with their captions, protects them, runs `shielded calibrate`, and samples 16 prompts with
a constant radius and with both kinds of posterior radius.

    python benchmarks/radius.py --data emoji128.tar --out radius
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import numpy as np

from shielded import Calibration, ProtectedSet, Spell
from shielded.cli import app
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import caption_score
from shielded.generation import generate
from shielded.models import EMOJI, PRESETS, load

LEVELS = ((1.0, 0.8), (0.8, 0.6), (0.6, 0.4), (0.4, 0.2), (0.2, 0.0))


def unpack(data: Path, folder: Path) -> None:
    """Unpack the images that the model was trained on, each with its caption in a .txt beside it."""
    known = set((EMOJI / "captions.txt").read_text().splitlines())
    folder.mkdir(parents=True)
    with tarfile.open(data) as tar:
        members = {member.name: member for member in tar}
        for name in sorted(members):
            if name.endswith(".json"):
                caption = json.load(tar.extractfile(members[name]))["caption"]
                if caption in known:
                    key = name.removesuffix(".json")
                    (folder / f"{key}.webp").write_bytes(tar.extractfile(members[f"{key}.webp"]).read())
                    (folder / f"{key}.txt").write_text(caption + "\n")


def posterior(out: Path, radii: list[float]) -> str:
    """Format a Markdown table: radius and schedule against shields, leaks and quality."""
    pipe = load("emoji", "cpu")
    encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
    protected = ProtectedSet.open(out / "set")
    captions = (EMOJI / "captions.txt").read_text().splitlines()
    prompts = [captions[i] for i in np.random.default_rng(1).permutation(len(captions))[:16]]
    schedules = {
        "constant": {"radius_schedule": "constant"},
        "posterior, energy·t²": {"radius_schedule": "posterior"},
        "posterior, measured": {
            "radius_schedule": "posterior",
            "calibration": Calibration.load(out / "calibration" / "calibration.json"),
        },
    }
    head = ["r", "schedule", "inside", "nearest", "caption score", *(f"t {high}–{low}" for high, low in LEVELS)]
    rows = [head, ["---"] * len(head)]
    for radius, schedule in [(radii[0], None), *((radius, schedule) for radius in radii for schedule in schedules)]:
        spell = None if schedule is None else Spell(protected, radius, batch=False, **schedules[schedule])
        made = generate(
            pipe, prompts, list(range(16)), spell, label=schedule or "plain", guidance_scale=PRESETS["emoji"].guidance
        )
        nearest = protected.nearest_rows(made.latents)[0][:, 0]
        inside = (nearest < radius).sum().item() if spell else ""
        rows.append([f"{radius:.3g}", schedule, inside] if spell else ["", "no SPELL", ""])
        rows[-1] += [
            f"{nearest.min():.2f}",
            f"{caption_score(encoder.image_features(made.images), encoder.text_features(prompts)).mean():.3f}",
        ]
        rows[-1] += [shields(spell.trace, *level) if spell else "" for level in LEVELS]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def shields(trace: list[dict], high: float, low: float) -> str:
    """Return the mean number of active shields per image and step in a range of noise levels."""
    active = [row["active"] for row in trace if low <= row["noise_level"] < high or row["noise_level"] == high == 1]
    return f"{np.mean(active):.1f}" if active else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pictures, protected, found = (str(args.out / name) for name in ("pictures", "set", "calibration"))
    if not Path(pictures).exists():
        unpack(args.data, Path(pictures))
    for command in (
        ["protect", pictures, "--out", protected, "--add"],
        ["calibrate", "--protect", protected, "--out", found, "--sample", "200", "--per-image", "--overwrite"],
    ):
        print("$ shielded", *command)
        app(command, standalone_mode=False)
    table = json.loads((args.out / "calibration" / "radius.json").read_text())["protection"]["table"]
    # At the suggested radius hardly any of 16 images meets a shield, so these are those for 10 % and 50 %.
    print(posterior(args.out, [table[4]["radius"], table[6]["radius"]]))


if __name__ == "__main__":
    main()
