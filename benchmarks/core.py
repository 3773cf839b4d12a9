"""What the correction costs, and whether it leaves every shield.

python benchmarks/core.py cost       # time and memory by batch, active shields and dimension
python benchmarks/core.py idle       # no active shield, as a share of a UNet of Stable Diffusion 1.5's size
python benchmarks/core.py overlap    # random overlapping sets with up to 500 active shields
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from shielded import Spell, repellency

GENERATOR = torch.Generator().manual_seed(0)


def median_seconds(job, repeats: int = 5) -> float:
    if repeats > 1:
        job()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def crowd(batch: int, active: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """x0 near the middle of `active` references, all of them closer than the radius."""
    references = torch.randn(active, dim, generator=GENERATOR)
    x0 = 0.3 * torch.randn(batch, dim, generator=GENERATOR)
    return x0, references, 1.1 * torch.cdist(x0, references).max().item()


def cost(limit: float) -> None:
    print("| B | K active | dim | sum, ms | project, ms | peak, MB | a (B, K, dim) tensor would be, MB |")
    print("|---|---|---|---|---|---|---|")
    for dim in (4096, 16384, 65536, 262144):
        for batch in (8, 64, 512):
            for active in (1, 10, 100, 500):
                size = 4e-6 * batch * active * dim
                if size > limit:
                    continue
                x0, references, radius = crowd(batch, active, dim)
                noise = torch.randn(x0.shape, generator=GENERATOR)
                inputs = memory("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
                row = [
                    1e3 * median_seconds(partial(repellency, x0, references, radius, overlap=way, noise=noise), 1)
                    for way in ("sum", "project")
                ]
                peak = memory("VmHWM") - inputs
                print(
                    f"| {batch} | {active} | {dim:,} | {row[0]:.1f} | {row[1]:.1f} | {peak:.0f} | {size:,.0f} |",
                    flush=True,
                )


def memory(name: str) -> float:
    """MB, as Linux counts them."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith(name))


def idle() -> None:
    from diffusers import UNet2DConditionModel

    # The configuration of Stable Diffusion 1.5: 860 M parameters.
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    latents, text = torch.randn(1, 4, 64, 64, generator=GENERATOR), torch.randn(1, 77, 768, generator=GENERATOR)
    with torch.no_grad():
        forward = 16 * median_seconds(lambda: unet(latents, 10, text), 1)
    x0 = torch.randn(16, 4, 64, 64, generator=GENERATOR)
    for count in (100, 1000):
        references = 5 + torch.randn(count, 4, 64, 64, generator=GENERATOR)
        spell = Spell(references, radius=50.0)
        step = median_seconds(lambda s=spell: s(x0))
        assert not spell(x0).any()
        share = f"{1e3 * step:.1f} ms, {100 * step / forward:.3f} % of {forward:.1f} s"
        print(f"B = 16, dim 16,384, {count} references, none active: {share}")


def overlap(cases: int) -> None:
    """Sets of 2 to 500 shields in 16 to 4,096 dimensions that all contain x0; opposed, clustered and plain ones."""
    outside = flagged = silent = most = 0
    start = time.perf_counter()
    for case in range(cases):
        few = case % 10 != 0
        count = int(torch.randint(2 if few else 9, 9 if few else 501, (), generator=GENERATOR))
        dim = 2 ** int(torch.randint(4, 13, (), generator=GENERATOR))
        rank = dim if case % 3 else min(dim, 4)
        references = torch.zeros(count, dim)
        references[:, :rank] = torch.randn(count, rank, generator=GENERATOR)
        if case % 5 == 0:
            references[count // 2 :] = -references[: count - count // 2]
        x0 = 0.2 * torch.randn(1, dim, generator=GENERATOR) * (case % 7 != 0)
        radius = 1.05 * torch.cdist(x0, references).max().item()
        spell = Spell(references, radius, overcompensation=1.0, batch=False)
        moved = x0 + spell(x0, noise=torch.randn(1, dim, generator=GENERATOR), alpha=1.0, sigma=1.0)
        kept = torch.cdist(moved.double(), references.double()).min().item() >= radius * (1 - 1e-5)
        said = spell.trace[0]["unresolved"]
        outside += kept
        flagged += said and not kept
        silent += not kept and not said
        most = max(most, spell.trace[0]["active"])
    print(
        f"{cases} cases, up to {most} active shields: {100 * outside / cases:.2f} % outside all, {flagged} flagged, "
        f"{silent} inside without a flag ({time.perf_counter() - start:.0f} s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "idle", "overlap"])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--limit", type=float, default=1e4, help="skip cases in which B·K·dim floats exceed so many MB")
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.limit)
    elif args.what == "idle":
        idle()
    else:
        overlap(args.cases)


if __name__ == "__main__":
    main()
