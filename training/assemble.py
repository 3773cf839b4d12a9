"""Put the trained parts together as the model that the package ships, and measure its denoising error.

    python training/assemble.py --data emoji128.tar --model runs/model --vae runs/vae --encoder runs/encoder \\
        --out src/shielded/models/emoji
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from data import Emoji, load
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from shielded import LatentSpace
from shielded.spell.posterior import measure_calibration


def write_calibration(folder: Path, data: Emoji, sample: int) -> None:
    """Measure the denoising error on pictures that the model learned, evenly spread."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    learned = data.select(set((folder / "captions.txt").read_text().splitlines()))
    rows = [i * len(learned.captions) // sample for i in range(sample)]
    space = LatentSpace.of(pipe)
    with torch.no_grad():
        clean = space.encode(learned.images[rows].float() / 255)
    captions = [learned.captions[row] for row in rows]
    measure_calibration(pipe, clean, captions, space=space.fingerprint).save(folder / "calibration.json")


def name_for_transformers_4(path: Path) -> None:
    """Name the text encoder's weights as transformers 4 does, which leaves others at random; 5 reads both."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "model", "vae", "encoder", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=200, help="pictures that the denoising error is measured on")
    args = parser.parse_args()
    # The decoder may have been trained on after the text-to-image model; the encoder is the same.
    vae = AutoencoderTiny.from_pretrained(args.vae, dtype=torch.float16)
    pipe = StableDiffusionPipeline.from_pretrained(args.model / "pipeline", vae=vae, dtype=torch.float16)
    pipe.save_pretrained(args.out)
    name_for_transformers_4(args.out / "text_encoder" / "model.safetensors")
    pipe.tokenizer.backend_tokenizer.model.save(str(args.out / "tokenizer"))  # for transformers 4
    for file in args.out.rglob("*.json"):  # where the parts came from is nobody's business
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(args.model / "pipeline" / "captions.txt", args.out / "captions.txt")
    shutil.copytree(args.encoder, args.out / "encoder", dirs_exist_ok=True)
    write_calibration(args.out, load(str(args.data)), args.sample)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
