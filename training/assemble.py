"""Put the trained parts together as the model that the package ships.

python training/assemble.py --model runs/model --vae runs/vae --encoder runs/encoder --out src/shielded/models/emoji
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "vae", "encoder", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    # The decoder may have been trained on after the text-to-image model; the encoder is the same.
    vae = AutoencoderTiny.from_pretrained(args.vae, dtype=torch.float16)
    pipe = StableDiffusionPipeline.from_pretrained(args.model / "pipeline", vae=vae, dtype=torch.float16)
    pipe.save_pretrained(args.out)
    for file in args.out.rglob("*.json"):  # where the parts came from is nobody's business
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
    shutil.copy(args.model / "pipeline" / "captions.txt", args.out / "captions.txt")
    shutil.copytree(args.encoder, args.out / "encoder", dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
