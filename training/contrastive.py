"""Train the small image and text encoder that scores the embedded model's images (`shielded.evaluation.encoder`).

    python training/contrastive.py --data emoji128.tar --tokenizer runs/model/pipeline/tokenizer --out runs/encoder

It learns all captions. Of --held-out captions of the text-to-image model it does not see the drawing in one style, to
measure retrieval on; with 0 it sees everything. Writes a checkpoint every few minutes and continues with --resume.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import checkpoint
import torch
import torch.nn.functional as F
from data import STYLES, Emoji, load, trained_captions
from text_to_image import prompts_of
from torch import Tensor, nn
from transformers import CLIPTokenizer

from shielded.evaluation.encoder import SIZE, Encoder


def augment(x: Tensor, keep_side: Tensor, strength: float) -> Tensor:
    """What a generator gets slightly wrong and what must not matter: place, size, side, colour, sharpness, grain.

    Args:
        x: (n, 3, 64, 64) in [-1, 1].
        keep_side: (n,) bool, images that must not be mirrored.
        strength: 0 (no change) to 1.
    """
    n = len(x)

    def jitter(amount: float, *shape: int) -> Tensor:
        return strength * amount * (2 * torch.rand(n, *shape) - 1)

    mirror = torch.where((torch.rand(n) < 0.5 * strength) & ~keep_side, -1.0, 1.0)
    scale = 1 + jitter(0.08)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = scale * mirror, scale
    affine[:, :, 2] = jitter(0.08, 2)  # up to 2.5 pixels
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x.lerp(blurred, strength * torch.rand(n, 1, 1, 1))
    x = x * (1 + jitter(0.1, 3, 1, 1)) + jitter(0.05, 3, 1, 1)
    return (x + jitter(0.06, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


def contrastive_loss(logits: Tensor, match: Tensor) -> Tensor:
    """CLIP's loss with several matches per row: cross-entropy to the uniform distribution over them, both ways.

    Args:
        logits: (n, n), images by prompts.
        match: (n, n) bool, prompts that describe the image.
    """
    target = match.float()
    return 0.5 * (
        F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
        + F.cross_entropy(logits.T, target.T / target.T.sum(dim=1, keepdim=True))
    )


def held_out_rows(data: Emoji, captions: list[str], count: int) -> list[int]:
    """One drawing of each of `count` captions, evenly spread; the style takes turns."""
    row = {key: i for i, key in enumerate(zip(data.captions, data.styles, strict=True))}
    return [row[captions[i * len(captions) // count], STYLES[i % len(STYLES)]] for i in range(count)]


def evaluate(encoder: Encoder, images: Tensor, data: Emoji, captions: list[str], rows: list[int]) -> str:
    """Image-to-caption retrieval among `captions`, and among the styles of the right caption."""
    images = torch.cat([encoder.image_features(batch.float() / 127.5 - 1) for batch in images[rows].split(256)])
    true = torch.tensor([captions.index(data.captions[i]) for i in rows])
    best = (images @ encoder.text_features(captions).T).topk(5).indices == true[:, None]
    styled = encoder.text_features([f"{data.captions[i]}, {style} style" for i in rows for style in STYLES])
    guess = (images[:, None] * styled.unflatten(0, (len(rows), len(STYLES)))).sum(dim=2).argmax(dim=1)
    style = torch.tensor([STYLES.index(data.styles[i]) for i in rows]) == guess
    parts = (("top-1", best[:, 0]), ("top-5", best.any(dim=1)), ("style", style))
    return ", ".join(f"{name} {100 * hit.float().mean():.1f} %" for name, hit in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600, help="all runs together")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = load(args.data)
    captions = trained_captions(data)
    images = F.interpolate(data.images.float(), size=(SIZE, SIZE), mode="area").round().to(torch.uint8)
    held_out = held_out_rows(data, captions, args.held_out)
    learned = [i for i in set(range(len(images))) - set(held_out)]
    seen = [i for i in learned if data.captions[i] in set(captions)]

    number = {caption: i for i, caption in enumerate(dict.fromkeys(data.captions))}
    caption = torch.tensor([number[c] for c in data.captions])
    style = torch.tensor([STYLES.index(s) for s in data.styles])
    keep_side = torch.tensor(["left" in c or "right" in c for c in data.captions])
    drawings: dict[str, list[int]] = {}
    for i in learned:
        drawings.setdefault(data.captions[i], []).append(i)
    choices = list(drawings.values())

    encoder = Encoder(CLIPTokenizer.from_pretrained(args.tokenizer))
    trained = nn.ModuleDict({"encoder": encoder})
    trained.register_parameter("temperature", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
    temperature = trained.temperature
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    print(
        f"{len(captions)} captions of {len(number)}, {len(learned)} images, {len(held_out)} held out, "
        f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )

    step, before, running = 0, 0.0, 0.0
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "checkpoint.pt"
    if args.resume:
        state = checkpoint.load(file)
        step, before, running = state["step"], state["minutes"], state["loss"]
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.manual_seed(args.seed + step)
    clock = checkpoint.Clock(before)
    saved = before
    while (progress := step / args.steps) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        # Two drawings of each caption: the prompt that names a style has a near miss to be told from.
        chosen = [choices[i] for i in torch.randperm(len(choices))[: args.batch // 2].tolist()]
        rows = [drawing[torch.randint(len(drawing), ())] for drawing in chosen for _ in range(2)]
        kind = torch.randint(4, (len(rows),))
        prompts = [prompts_of(data.captions[i], data.styles[i])[k] for i, k in zip(rows, kind.tolist(), strict=True)]
        rows = torch.tensor(rows)
        open_style = kind < 2
        match = (caption[rows, None] == caption[rows]) & (open_style | (style[rows, None] == style[rows]))

        # Plain images first: the towers find each other much faster, and have the second half to become robust.
        pixels = augment(images[rows].float() / 127.5 - 1, keep_side[rows], min(1, 2 * progress))
        logits = temperature.exp() * encoder.embed_images(pixels) @ encoder.embed_prompts(prompts).T
        loss = contrastive_loss(logits, match)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            temperature.clamp_(max=math.log(100))
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step:6d} {clock.minutes:5.1f} min loss {running:.4f}", flush=True)
        if clock.minutes - saved > 3 or step == args.steps:
            state = {"model": trained.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(file, {"step": step, "minutes": clock.minutes, "loss": running, **state})
            saved = clock.minutes

    encoder.save_pretrained(args.out)
    encoder = Encoder.from_pretrained(args.out, args.tokenizer)
    print(f"{step} steps, loss {running:.4f}, temperature {temperature.exp().item():.1f}")
    print(f"learned images, {len(captions)} captions: {evaluate(encoder, images, data, captions, seen)}")
    if held_out:
        print(f"held-out images, {len(captions)} captions: {evaluate(encoder, images, data, captions, held_out)}")


if __name__ == "__main__":
    main()
