r"""Train the copy descriptor of `shielded.copies`: a copy's vector stays beside that of its picture.

    python training/procedural.py --count 10000 --out runs/pictures.npy
    python training/procedural.py --count 1000 --seed 77 --out runs/held-out.npy
    python training/copy_descriptor.py --data emoji128.tar --pictures runs/pictures.npy --held-out runs/held-out.npy \
        --out runs/copies --minutes 60

A step compares pictures as a bank would hold them with changed copies of them (InfoNCE), against the other pictures of
the batch and those of earlier batches (Wang et al. 2020, "Cross-Batch Memory for Embedding Learning"), and spreads the
vectors over the sphere (the entropy regulariser of SSCD, Pizzi et al. 2022).
`--resume` goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import torch
import torch.nn.functional as F
from data import Emoji, load
from optimizer import Optimizers
from torch import Tensor, nn

from shielded.copies import Descriptor
from shielded.copies.network import SIDE, CopyNetwork, save_network

# Views whose mean describes a picture: share cut off at each edge, and whether mirrored.
VIEWS = [(0.0, False), (0.0, True), (0.08, False), (0.08, True)]
VIEWS_SIDE = 96  # pixels that a picture has before views of it are taken
SOURCE = 96  # pixels of the pictures that views are taken from
PLAIN, LAID_OVER = 0.25, 0.6  # share of emoji as they are; share of the other pictures with something laid over


def motif(caption: str) -> str:
    """Return the caption without the words that hardly change a drawing."""
    return " ".join(re.sub(r"\b(man|men|woman|women|people|person|boy|girl)\b", "", caption).split()) or caption


def between(n: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(n)


def grid(
    n: int, zoom: Tensor, angle: Tensor, aspect: Tensor, x: Tensor, y: Tensor, mirror: Tensor, side: int
) -> Tensor:
    """Return the places (n, side, side, 2) that n pictures are sampled at."""
    theta = torch.zeros(n, 2, 3)
    cos, sin = angle.cos(), angle.sin()
    theta[:, 0, 0], theta[:, 0, 1] = cos / zoom * aspect * mirror, -sin / zoom
    theta[:, 1, 0], theta[:, 1, 1] = sin / zoom * aspect * mirror, cos / zoom
    theta[:, 0, 2], theta[:, 1, 2] = x, y
    return F.affine_grid(theta, [n, 3, side, side], align_corners=False)


class Pictures:
    """New pictures from emoji and procedural ones: crops with changed colours, emoji and pieces laid over."""

    def __init__(self, emoji: Emoji, procedural: np.ndarray) -> None:
        self.emoji = F.interpolate(emoji.images.float(), size=SOURCE, mode="bilinear", antialias=True).to(torch.uint8)
        self.procedural = torch.from_numpy(procedural)
        motifs = {name: number for number, name in enumerate(sorted({motif(c) for c in emoji.captions}))}
        self.motif = torch.tensor([motifs[motif(caption)] for caption in emoji.captions])

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """Return pictures (n, 3, SOURCE, SOURCE) in 0..1 and what they show (n,); equal numbers are no opposites."""
        rows = torch.randint(len(self.procedural), (n,))
        pictures = self._recoloured(self._turned(self.procedural[rows].float() / 255, 1.0, 2.2))
        shown = rows + len(self.emoji)
        over = torch.rand(n) < LAID_OVER
        for _ in range(2):
            chosen = (over & (torch.rand(n) < 0.7)).nonzero()[:, 0]
            pictures[chosen] = self._laid_over(pictures[chosen])
        plain = (torch.rand(n) < PLAIN).nonzero()[:, 0]
        emoji = torch.randint(len(self.emoji), (len(plain),))
        pictures[plain] = self.emoji[emoji].float() / 255
        shown[plain] = self.motif[emoji]
        return pictures, shown

    def _turned(self, x: Tensor, low: float, high: float) -> Tensor:
        n = len(x)
        zoom = between(n, math.log(low), math.log(high)).exp()
        room = (1 - 1 / zoom).clamp(min=0)
        quarter = torch.randint(4, (n,)) * (math.pi / 2)
        x = F.grid_sample(
            x,
            grid(
                n, zoom, quarter, torch.ones(n), room * between(n, -1, 1), room * between(n, -1, 1),
                torch.where(torch.rand(n) < 0.5, 1.0, -1.0), SOURCE,
            ),
            padding_mode="reflection",
            align_corners=False,
        )  # fmt: skip
        return x

    def _recoloured(self, x: Tensor) -> Tensor:
        """Mix channels in a random order and strength."""
        n = len(x)
        mixing = torch.eye(3)[torch.rand(n, 3).argsort(dim=1)]
        mixing = mixing.lerp(torch.full((3, 3), 1 / 3), between(n, 0, 0.7)[:, None, None])
        return torch.einsum("nij,njhw->nihw", mixing, x) * between(n, 0.6, 1.1)[:, None, None, None].clamp(max=1)

    def _laid_over(self, below: Tensor) -> Tensor:
        """Lay an emoji, without its white ground, or a piece of another picture over each."""
        n = len(below)
        emoji = self.emoji[torch.randint(len(self.emoji), (n,))].float() / 255
        piece = self._recoloured(self.procedural[torch.randint(len(self.procedural), (n,))].float() / 255)
        is_emoji = (torch.rand(n) < 0.6)[:, None, None, None]
        above = torch.where(is_emoji, emoji, piece)
        ground = ((1 - emoji.amin(dim=1, keepdim=True)) * 12).clamp(0, 1)
        spread = torch.linspace(-1, 1, SOURCE)
        power = torch.where(torch.rand(n) < 0.5, 2.0, 8.0)[:, None, None]
        ball = (spread.abs()[None, :, None] ** power + spread.abs()[None, None, :] ** power < 0.9).float()[:, None]
        alpha = torch.where(is_emoji, ground, ball)
        where = grid(
            n, between(n, math.log(0.25), math.log(1.1)).exp(), between(n, -0.6, 0.6), torch.ones(n),
            between(n, -1.2, 1.2), between(n, -1.2, 1.2), torch.where(torch.rand(n) < 0.5, 1.0, -1.0), SOURCE,
        )  # fmt: skip
        laid = F.grid_sample(torch.cat([above * alpha, alpha], dim=1), where, align_corners=False)
        return below * (1 - laid[:, 3:]) + laid[:, :3]


def stored(pictures: Tensor) -> Tensor:
    """Return (n, 3, SIDE, SIDE) in [-1, 1] as a bank describes pictures of 0..1."""
    return 2 * F.interpolate(pictures, size=SIDE, mode="bilinear", antialias=True) - 1


def changed(pictures: Tensor, strength: float) -> Tensor:
    """Return changed copies (n, 3, SIDE, SIDE) in [-1, 1]: cut, moved, turned, mirrored, coloured, blurred, noisy."""
    n = len(pictures)

    def some(share: float) -> Tensor:
        return (torch.rand(n) < share).float()

    zoom = (strength * some(0.75) * between(n, -0.08, 0.36)).exp()
    angle = strength * some(0.4) * between(n, -0.2, 0.2)
    aspect = (strength * some(0.3) * between(n, -0.12, 0.12)).exp()
    x, y = (strength * some(0.6) * between(n, -0.24, 0.24) for _ in range(2))
    mirror = 1 - 2 * some(0.4)
    places = grid(n, zoom, angle, aspect, x, y, mirror, SIDE)
    out = F.grid_sample(pictures, places, padding_mode="border", align_corners=False)
    outside = (places.abs().amax(dim=-1) > 1)[:, None]
    fill = torch.where(torch.rand(n, 1, 1, 1) < 0.7, torch.randint(2, (n, 1, 1, 1)).float(), torch.rand(n, 3, 1, 1))
    out = torch.where(outside & (torch.rand(n, 1, 1, 1) < 0.5), fill.expand_as(out), out)

    shape = (n, 1, 1, 1)
    covered = (torch.rand(n) < 0.12 * strength).nonzero()[:, 0]
    for i in covered.tolist():  # a banner or a sticker
        h, w = (int(v) for v in torch.randint(6, 40, (2,)))
        top, left = int(torch.randint(SIDE - min(h, 20), ())), int(torch.randint(SIDE - min(w, 20), ()))
        out[i, :, top : top + min(h, 20), left : left + w] = torch.rand(3, 1, 1)
    mean = out.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (strength * some(0.4) * between(n, -0.45, 0.4)).exp().view(shape)
    out = mean + (out - mean) * contrast
    out = out * (strength * some(0.4) * between(n, -0.35, 0.3)).exp().view(shape)
    grey = out.mean(dim=1, keepdim=True)
    out = grey + (out - grey) * (1 + strength * some(0.25) * between(n, -1, 0.5)).view(shape)
    out = out * (1 + 0.1 * strength * some(0.3).view(shape) * torch.randn(n, 3, 1, 1))
    out = out.clamp(0, 1)
    out = out ** (strength * some(0.2) * between(n, -0.35, 0.35)).exp().view(shape)
    soft = F.avg_pool2d(F.pad(out, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    out = out.lerp(soft, (some(0.4) * torch.rand(n)).view(shape))
    small = F.interpolate(F.avg_pool2d(out, 4), size=SIDE, mode="bilinear")
    out = torch.where(torch.rand(shape) < 0.06 * strength, small, out)
    out = out + (0.06 * strength * some(0.3) * torch.rand(n)).view(shape) * torch.randn_like(out)
    return 2 * out.clamp(0, 1) - 1


def entropy_loss(vectors: Tensor, others: Tensor, alike: Tensor) -> Tensor:
    """Return the KoLeo estimate: minus the mean logarithm of the distance to the nearest other vector."""
    nearest = (vectors.detach() @ others.T).masked_fill(alike, -2).argmax(dim=1)
    return -((vectors - others[nearest]).norm(dim=1) + 1e-3).log().mean()


def export(state: dict[str, Any], path: Path, held_out: np.ndarray) -> None:
    """Write the averaged weights of a checkpoint as the package ships them, with a threshold.

    Args:
        state: the checkpoint.
        path: a safetensors file.
        held_out: (n, 3, SOURCE, SOURCE) uint8 pictures that were not trained on. At the threshold 1 % of them are as
            similar as that to another one.
    """

    def write(threshold: float | None) -> None:
        network = torch.optim.swa_utils.AveragedModel(CopyNetwork(), use_buffers=True)
        network.load_state_dict(state["average"])
        save_network(network.module, path, VIEWS, VIEWS_SIDE, threshold)

    write(None)
    vectors = Descriptor.load("shielded", path).of(torch.from_numpy(held_out) / 127.5 - 1)
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).amax(dim=1).sort(descending=True).values
    write(math.ceil(1e3 * float(nearest[len(nearest) // 100])) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pictures", nargs="+", required=True)
    parser.add_argument("--held-out", required=True, help="other pictures, to choose the threshold by")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--memory", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--entropy", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pictures = Pictures(load(args.data), np.concatenate([np.load(path) for path in args.pictures]))
    network = CopyNetwork().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    optimizer = Optimizers(network, args.lr, args.adam_lr, ("levels.0.", "project"), decay=1e-2)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters", flush=True)
    step, clock = 0, checkpoint.Clock()
    if args.resume:
        state = checkpoint.load(args.out / "checkpoint.pt")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, clock = state["step"], checkpoint.Clock(state["minutes"])
        torch.manual_seed(args.seed + step)

    def save() -> None:
        checkpoint.save(
            args.out / "checkpoint.pt",
            {
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "minutes": clock.minutes,
            },
        )

    memory, memory_shown = torch.empty(0, network.config["dim"]), torch.empty(0, dtype=torch.long)
    running = torch.zeros(3)
    network.train()
    while (progress := clock.minutes / args.minutes) < 1:
        drawn, shown = pictures.draw(args.batch)
        views = torch.cat([stored(drawn), changed(drawn, min(1.0, 0.4 + 4 * progress))])
        with torch.autocast("cpu", torch.bfloat16):
            vectors = network(views)
        keys, queries = vectors.split(args.batch)
        itself = torch.eye(args.batch, dtype=torch.bool)
        alike = (shown[:, None] == shown) & ~itself
        alike_memory = shown[:, None] == memory_shown
        there = (queries @ keys.T).masked_fill(alike, -1)
        held = (queries @ memory.T).masked_fill(alike_memory, -1)
        target = torch.arange(args.batch)
        contrast = 0.5 * (
            F.cross_entropy(torch.cat([there, held], dim=1) / args.temperature, target)
            + F.cross_entropy(there.T / args.temperature, target)
        )
        everything = torch.cat([keys, memory])
        spread = entropy_loss(keys, everything, torch.cat([alike | itself, alike_memory], dim=1))
        spread = 0.5 * (spread + entropy_loss(queries, everything, torch.cat([alike | itself, alike_memory], dim=1)))
        (contrast + args.entropy * spread).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step(min(1, (step + 1) / 200) * min(1, max(0.02, (1 - progress) / 0.4)))
        average.update_parameters(network)
        if step >= 100:
            memory = torch.cat([keys.detach(), memory])[: args.memory]
            memory_shown = torch.cat([shown, memory_shown])[: args.memory]
        found = (there.argmax(dim=1) == target).float().mean()
        running += torch.stack([contrast.detach(), spread.detach(), found])
        step += 1
        if step % 50 == 0:
            contrast_mean, spread_mean, found_mean = (running / 50).tolist()
            running.zero_()
            print(
                f"step {step} {clock.minutes:.1f} min contrast {contrast_mean:.4f} entropy {spread_mean:.4f} "
                f"found {100 * found_mean:.2f} %",
                flush=True,
            )
        if step % 100 == 0:
            save()
    save()
    export(checkpoint.load(args.out / "checkpoint.pt"), args.out / "descriptor.safetensors", np.load(args.held_out))
    print(f"{step} steps, {clock.minutes:.0f} minutes")


if __name__ == "__main__":
    main()
