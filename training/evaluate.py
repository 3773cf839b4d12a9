"""Measure the embedded text-to-image model: does the picture that it makes show what the prompt says?

For captions drawn with a fixed seed one image each is generated; a hit is an image whose nearest training image (L2 on
RGB at 32x32) carries the caption.

    python training/evaluate.py --data emoji128.tar --model src/shielded/models/emoji --json quality.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import load, trained_captions
from diffusers import StableDiffusionPipeline


def small(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3·32·32)"""
    return F.interpolate(images, size=(32, 32), mode="area").flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    everything = load(args.data)
    captions = trained_captions(everything)
    data = everything.select(set(captions))
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(args.seed)).tolist()
    drawn = [captions[i] for i in order[: args.captions]]
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], first_seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
        images = pipe(
            prompts,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=generators,
            output_type="np",
        ).images
        return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)

    start = time.perf_counter()
    generate(drawn[:8], 0)
    seconds = time.perf_counter() - start
    images = torch.cat([generate(drawn[i : i + 20], i) for i in range(0, len(drawn), 20)])
    nearest = torch.cdist(small(images), small(data.images.float() / 255)).argmin(dim=1).tolist()
    hits = sum(data.captions[row] == caption for row, caption in zip(nearest, drawn, strict=True))
    with torch.no_grad():
        pixels = data.images[::16].float() / 127.5 - 1
        decoded = pipe.vae.decoder(pipe.vae.encoder(pixels)).clamp(-1, 1)
        psnr = (-10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()).mean().item()
    result = {
        "trained_captions": len(captions),
        "captions": len(drawn),
        "steps": args.steps,
        "guidance": args.guidance,
        "nearest_training_image_has_caption": hits / len(drawn),
        "seconds_for_8_images": round(seconds, 1),
        "autoencoder_psnr_db": round(psnr, 2),
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
