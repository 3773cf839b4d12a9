"""Measure the embedded model: its pictures against what the prompts say, its autoencoder, its speed.

    python training/evaluate.py --data emoji128.tar --model src/shielded/models/emoji --json quality.json

Captions: for some drawn with a fixed seed one image each is generated; a hit is an image whose nearest training image
(L2 on RGB at 32x32) carries the caption. The caption score is the dot product of image and caption in the features of
an encoder (--encoder; by default the model's own); models are only comparable by the same one. Autoencoder: on the
pictures that training/autoencoder.py holds out, and on all that the text-to-image model learned.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import Emoji, core_captions, load, trained_captions
from diffusers import StableDiffusionPipeline
from measures import autoencoder_figures

from shielded.evaluation.encoder import Encoder


def small(images: torch.Tensor) -> torch.Tensor:
    """Return (N, 3, H, W) in [0, 1] as (N, 3·32·32)."""
    return F.interpolate(images, size=(32, 32), mode="area").flatten(1)


def drawn_from(captions: list[str], count: int, seed: int) -> list[str]:
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [captions[i] for i in order[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="folder of a model whose encoder and tokenizer score the captions")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=Path, help="folder for the generated images")
    args = parser.parse_args()

    data = load(args.data)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    scorer = args.encoder or args.model
    encoder = (
        Encoder.from_pretrained(scorer / "encoder", scorer / "tokenizer") if (scorer / "encoder").exists() else None
    )

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

    known = set((args.model / "captions.txt").read_text().splitlines())
    trained = [caption for caption in trained_captions(data) if caption in known]
    core = core_captions(data)
    learned = data.select(set(trained))
    references = small(learned.images.float() / 255)
    result = {"trained_captions": len(trained), "captions": args.captions, "steps": args.steps}
    result["guidance"] = args.guidance
    for name, captions in (("", trained), ("_core", core)):
        if captions == trained and name:
            continue
        drawn = drawn_from(captions, args.captions, args.seed)
        if not name:
            start = time.perf_counter()
            generate(drawn[:8], 0)
            result["seconds_for_8_images"] = round(time.perf_counter() - start, 1)
        images = torch.cat([generate(drawn[i : i + 20], i) for i in range(0, len(drawn), 20)])
        nearest = torch.cdist(small(images), references).argmin(dim=1).tolist()
        hits = [learned.captions[row] == caption for row, caption in zip(nearest, drawn, strict=True)]
        result[f"nearest_training_image_has_caption{name}"] = sum(hits) / len(hits)
        result[f"missed{name}"] = [caption for caption, hit in zip(drawn, hits, strict=True) if not hit]
        if encoder is not None:
            score = (encoder.image_features(images * 2 - 1) * encoder.text_features(drawn)).sum(dim=1)
            result[f"caption_score{name}"] = round(score.mean().item(), 3)
        if args.images:
            args.images.mkdir(parents=True, exist_ok=True)
            for caption, image in zip(drawn, pipe.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()), strict=True):
                image.save(args.images / f"{caption}.png")
    held_out = Emoji(data.images[::32], data.captions[::32], data.styles[::32], data.groups[::32])
    few = Emoji(learned.images[::16], learned.captions[::16], learned.styles[::16], learned.groups[::16])
    for name, part in (("held_out", held_out), ("learned", few)):
        figures = autoencoder_figures(pipe.vae, part, pipe.vae.config.scaling_factor)
        result[f"autoencoder_{name}"] = {key: round(value, 3) for key, value in figures.items()}
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
