"""Measure what the correction costs, and whether it leaves every shield.

python benchmarks/core.py cost --out docs/cost.md   # time and memory by batch, active shields and dimension
python benchmarks/core.py idle       # no active shield, as a share of a UNet of Stable Diffusion 1.5's size
python benchmarks/core.py overlap    # random overlapping sets with up to 500 active shields
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from shielded import Spell, repellency
from shielded.files import replacing

GENERATOR = torch.Generator().manual_seed(0)


def median_seconds(job, clock=time.perf_counter) -> float:
    """Return the median time of five runs; of fewer where these take long."""
    times = []
    while len(times) < 5 and sum(times) < 2:
        start = clock()
        job()
        times.append(clock() - start)
    return statistics.median(times)


def crowd(batch: int, active: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return x0 near the middle of `active` references, all of them closer than the radius."""
    references = torch.randn(active, dim, generator=GENERATOR)
    x0 = 0.3 * torch.randn(batch, dim, generator=GENERATOR)
    return x0, references, 1.1 * torch.cdist(x0, references).max().item()


def measure(case: tuple[int, int, int]) -> tuple[float, float, float]:
    """Return the seconds of the sum and of the projection, and the larger peak of memory beyond the inputs in MB."""
    torch.set_num_threads(1)
    x0, references, radius = crowd(*case)
    noise = torch.randn(x0.shape, generator=GENERATOR)
    inputs = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    ways = ("sum", "project")
    jobs = [partial(repellency, x0, references, radius, overlap=way, noise=noise) for way in ways]
    seconds = [median_seconds(job, time.process_time) for job in jobs]
    return *seconds, memory("VmHWM") - inputs


def cost(out: Path | None, limit: float) -> None:
    lines = [
        "# What the correction costs",
        "",
        "B images, all of them inside the shields of the same K references, as blurred images are early in sampling. "
        "*sum* is the paper's formula, *project* the default. Written by `python benchmarks/core.py cost --out "
        "docs/cost.md`: float32, processor seconds of one CPU core, so that other jobs do not count, the "
        "median of five runs, or of fewer where these take more than 2 s. *Peak* is the most memory that either took "
        "beyond its inputs (x0, references, noise), beside what the differences x0 − z alone would take as one tensor "
        "(B, K, dim).",
        "",
        "| B | K active | dim | sum, s | project, s | peak, MB | (B, K, dim), MB |",
        "|---|---|---|---|---|---|---|",
    ]
    sizes = [(b, k, dim) for dim in (4096, 16384, 65536, 262144) for b in (8, 64, 512) for k in (1, 10, 100, 500)]
    sizes = [(b, k, dim) for b, k, dim in sizes if 4e-6 * b * k * dim <= limit]
    print("\n".join(lines[-2:]))
    # A process for each, so that what one has left behind does not count for the next.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for (batch, active, dim), row in zip(sizes, pool.imap(measure, sizes, chunksize=1), strict=True):
            lines.append(
                f"| {batch} | {active} | {dim:,} | {row[0]:.3g} | {row[1]:.3g} | {row[2]:,.0f} | "
                f"{4e-6 * batch * active * dim:,.0f} |"
            )
            print(lines[-1], flush=True)
    if out is not None:
        with replacing(out) as draft:
            draft.write_text("\n".join(lines) + "\n")


def memory(name: str) -> float:
    """Return memory in MB, as Linux counts it."""
    return next(int(line.split()[1]) * 1.024e-3 for line in Path("/proc/self/status").open() if line.startswith(name))


def idle() -> None:
    from diffusers import UNet2DConditionModel

    # The configuration of Stable Diffusion 1.5: 860 M parameters.
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    latents, text = torch.randn(1, 4, 64, 64, generator=GENERATOR), torch.randn(1, 77, 768, generator=GENERATOR)
    with torch.no_grad():
        forward = 16 * median_seconds(lambda: unet(latents, 10, text), time.process_time)
    x0 = torch.randn(16, 4, 64, 64, generator=GENERATOR)
    for count in (100, 1000):
        references = 5 + torch.randn(count, 4, 64, 64, generator=GENERATOR)
        spell = Spell(references, radius=50.0)
        assert not spell(x0).any()
        step = median_seconds(lambda s=spell: s(x0), time.process_time)
        share = f"{1e3 * step:.1f} ms, {100 * step / forward:.3f} % of {forward:.1f} s (processor time)"
        print(f"B = 16, dim 16,384, {count} references, none active: {share}")


def overlap(cases: int) -> None:
    """Test sets of 2 to 500 shields in 16 to 4,096 dimensions that all contain x0: opposed, clustered or plain."""
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
    parser.add_argument("--limit", type=float, default=1e6, help="skip cases in which B·K·dim floats exceed so many MB")
    parser.add_argument("--out", type=Path, help="page of the documentation to write the costs to")
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.out, args.limit)
    elif args.what == "idle":
        idle()
    else:
        overlap(args.cases)


if __name__ == "__main__":
    main()
