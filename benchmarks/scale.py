"""Measure several processes and a Ray cluster on this machine with 1 and 2 workers, and extrapolate to more.

python benchmarks/scale.py                      # measure, then print the model (some minutes)
python benchmarks/scale.py --measured FILE      # print the model of an earlier run, whose results FILE holds
python benchmarks/scale.py --docs docs/scale.md # also write the results to the page

Needs the extras accelerate and ray. Two workers need two idle cores to mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from shielded import LatentSpace, ProtectedSet, Spell
from shielded.files import replace_section, write_json
from shielded.generation import distributed, generate
from shielded.models import PRESETS, load
from shielded.protected import store, writer
from shielded.protected.ray.ingest import encoded_rows
from shielded.protected.ray.search import ClusterSnapshot

SPACES = {
    "emoji, 128 px": 1_024,
    "Stable Diffusion 1.5, 512 px": 16_384,
    "SDXL, 1,024 px": 65_536,
    "Stable Diffusion 3, FLUX.1, 1,024 px": 262_144,
    "Wan 2.1, 480×832, 81 frames": 2_096_640,
}
BATCH = 8  # images per search
SHORT_JOB_IMAGES = 32  # images of the shorter of the two encoding jobs
STEP_SHARE = 0.03  # move of x0 in a step, as a share of the distance between two images
# Assumed: bytes, and bytes/s to and from memory and network (10 Gbit/s).
MACHINE = {"cores": 64, "memory": 512e9, "bandwidth": 200e9, "network": 1.25e9}


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def median_seconds(job: Any, repeats: int = 7) -> float:
    job()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- generation: accelerate ----


def generation(workers: int, images: int, steps: int) -> dict[str, float]:
    """Time one batch, and gathering x0 at one step, in seconds, with `workers` processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [*launch, __file__, "--process", str(out), "--images", str(images), "--steps", str(steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"})
        return json.loads(out.read_text())


def one_process(out: Path, images: int, steps: int) -> None:
    device = distributed.join("cpu")
    pipe = load("emoji", "cpu")
    spell = Spell(radius=26.0)
    options = {"steps": steps, "guidance_scale": PRESETS["emoji"].guidance, "progress": False, "batch_size": images}

    def job() -> None:
        generate(pipe, ["red heart"] * images, list(range(images)), spell, processes=device is not None, **options)

    share = distributed.Share.of(BATCH)
    x0 = torch.zeros(share.size, 16_384)
    measured = {"seconds": median_seconds(job, 3), "gather": median_seconds(lambda: share.gather(x0))}
    if distributed.is_main():
        write_json(out, measured)
    distributed.leave()


# ---- search and encoding: Ray ----


def latents(count: int, side: int, seed: int) -> torch.Tensor:
    """Sum noise of several sizes: as in latents of images, most of its energy is in low frequencies."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(side, 2**n) for n in range(1, 5)] + [side]
    layers = [torch.randn(count, 4, n, n, generator=generator) for n in sizes]
    z = sum(F.interpolate(layer, (side, side), mode="bilinear") for layer in layers)
    return z / z.flatten(1).std(1).view(-1, 1, 1, 1)


def large_set(folder: Path, rows: int, side: int) -> ProtectedSet:
    """Build a set of eight files, which two workers can share evenly."""
    writer._MAX_SHARD_BYTES = rows * 4 * side * side * 2 // 8
    protected = ProtectedSet.create(folder, LatentSpace(shape=(4, side, side)), torch.float16)
    for first in range(0, rows, rows // 8):
        count = min(rows // 8, rows - first)
        protected.add(latents(count, side, first + 1), list(range(first, first + count)))
    return protected


def searches(protected: ProtectedSet, radius: float, side: int) -> dict[str, float]:
    """Time a search for images unlike all before, which reads all codes, and those one step later, in seconds."""
    unlike = iter([latents(BATCH, side, -n) for n in range(1, 17)])
    x, y = next(unlike), next(unlike)
    steps = iter([x + STEP_SHARE * n * (y - x) for n in range(17)])
    return {
        "first": median_seconds(lambda: protected.within(next(unlike), radius)),
        "later": median_seconds(lambda: protected.within(next(steps), radius), 15),
    }


def on_ray(workers: int, stored: Path, radius: float, side: int, pictures: Path, images: int) -> dict[str, float]:
    os.environ.update(RAY_worker_niceness="0", RAY_BACKEND_LOG_LEVEL="fatal")  # read by Ray when it is imported
    import ray

    # One processor more than encoders: one is left for reading.
    ray.init("local", num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    say(f"{workers} of Ray: search")
    manifest = store.read_manifest(stored)
    space = LatentSpace.from_json(manifest["space"])
    spread = ClusterSnapshot(stored, manifest, space, workers=workers)
    measured = searches(ProtectedSet(spread), radius, side)
    measured["question"] = median_seconds(lambda: spread._ask_all("count"), 101)
    # The difference of two jobs excludes the time in which workers load the model.
    say(f"{workers} of Ray: encode {images} images")
    short, long = encoding(pictures / "short"), encoding(pictures)
    measured["encode"] = (long - short) / (images - SHORT_JOB_IMAGES)
    ray.shutdown()
    return measured


def encoding(pictures: Path) -> float:
    """Time reading and encoding all pictures of a folder, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        target = ProtectedSet.create(Path(folder, "set"), LatentSpace.of(load("emoji", "cpu")))
        start = time.perf_counter()
        assert all(not row["error"] for row in encoded_rows(target, str(pictures), "emoji", 32, False))
        return time.perf_counter() - start


def noise_pictures(folder: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "short").mkdir(parents=True)
    for i in range(images):
        target = folder / "short" if i < SHORT_JOB_IMAGES else folder
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(target / f"{i:06d}.png")


def measure(rows: int, side: int, images: int, encoded: int, steps: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"rows": rows, "dim": 4 * side * side, "images": images, "steps": steps}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stored, pictures = Path(folder, "set"), Path(folder, "pictures")
        say(f"a set of {rows} images")
        noise_pictures(pictures, encoded)
        alone = large_set(stored, rows, side)
        # Just below the nearest distance: bounds have the most work there, and no reference is a hit.
        radius = 0.9 * min(alone.nearest(latents(BATCH, side, -n))[0].min().item() for n in range(1, 4))
        say("one process: search")
        measured["alone"] = searches(alone, radius, side)
        for workers in (1, 2):
            measured[f"ray {workers}"] = on_ray(workers, stored, radius, side, pictures, encoded)
        for name, pattern in (("index", "*.index.safetensors"), ("set", "*")):
            measured[f"{name} bytes"] = sum(file.stat().st_size for file in stored.glob(pattern))
        assert measured["index bytes"], "too few rows per worker: such small sets are searched without an index"
    for workers in (1, 2):
        say(f"{workers} of accelerate: generate")
        measured[f"processes {workers}"] = generation(workers, images, steps)
    return measured


# ---- the model ----


def efficiency(one: float, two: float) -> tuple[float, float]:
    """Compute the efficiency at two workers and the serial share s of Amdahl's law, T(w) = T(1) (s + (1 - s)/w)."""
    return one / two / 2, min(1.0, max(0.0, 2 * two / one - 1))


def show(measured: dict[str, Any]) -> str:
    m, ray, processes = measured, "ray", "processes"
    lines = [
        "| work | 1 worker | 2 workers | efficiency | serial share | model: efficiency at 8 | at 64 |",
        "|---" * 7 + "|",
    ]
    for name, kind, key in (
        (f"generate, a batch of {m['images']} in {m['steps']} steps", processes, "seconds"),
        ("search, first step", ray, "first"),
        ("search, later step", ray, "later"),
        ("encode, one image", ray, "encode"),
    ):
        one, two = m[f"{kind} 1"][key], m[f"{kind} 2"][key]
        if min(one, two) <= 0:
            lines.append(f"| {name} |" + " too short to be measured |" * 6)
            continue
        now, serial = efficiency(one, two)
        later = " | ".join(f"{1 / (1 + serial * (w - 1)):.0%}" for w in (8, 64))
        lines.append(f"| {name} | {1e3 * one:.1f} ms | {1e3 * two:.1f} ms | {now:.0%} | {serial:.0%} | {later} |")
    rows, dim = m["rows"], m["dim"]
    per_number, per_row = m["alone"]["first"] / rows / dim, m["alone"]["later"] / rows
    question, gather = m["ray 2"]["question"] / 2, m["processes 2"]["gather"]
    prefix = m["index bytes"] / rows - dim  # bytes per row, with the other small numbers of each row
    cached = prefix + 4 * BATCH + 1  # a search caches a float32 per row and image, and the step it belongs to
    metadata = (m["set bytes"] - m["index bytes"]) / rows - 2 * dim  # ids, digests, norms
    lines += [
        "",
        f"Measured on one core with {rows:,} latents of {dim:,} numbers and {BATCH} images per search: a first step, "
        f"which reads the codes of all rows, takes {1e12 * per_number:.0f} ps per stored number; a later one, in which "
        f"x0 has moved by {STEP_SHARE:.0%} and cached products rule most rows out, {1e9 * per_row:.0f} ns per row. An "
        f"actor answers in {1e3 * question:.2f} ms, and two processes gather {BATCH} latents of 16,384 numbers in "
        f"{1e3 * gather:.1f} ms. A row takes 2 bytes per number and {metadata:.0f} more; its index 1 byte per number "
        f"and {prefix:.0f} more.",
        "",
        "| images | latents | disk | memory: codes | memory: prefixes | machines | network/step | first step | later |",
        "|---" * 9 + "|",
    ]
    for count in (10**6, 10**8, 10**9):
        for name, dim in SPACES.items():
            disk, codes, prefixes = count * (3 * dim + metadata + prefix), count * (dim + cached), count * cached
            machines = max(1, int(np.ceil(codes / MACHINE["memory"])))
            cores = machines * MACHINE["cores"]
            sent = BATCH * dim * 8 * machines
            fixed = question * cores + sent / MACHINE["network"]
            first = max(count * dim * per_number / cores, codes / machines / MACHINE["bandwidth"]) + fixed
            later = min(first, max(count * per_row / cores, prefixes / machines / MACHINE["bandwidth"]) + fixed)
            cells = (
                bytes_(disk),
                bytes_(codes),
                bytes_(prefixes),
                f"{machines:,}",
                bytes_(sent),
                time_(first),
                time_(later),
            )
            lines.append(f"| {count:,} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Assumed: machines with {MACHINE['cores']} cores as fast as this one's, an actor on each, "
        f"{bytes_(MACHINE['memory'])} of memory at {bytes_(MACHINE['bandwidth'])}/s and a network of "
        f"{bytes_(MACHINE['network'])}/s; as many machines as hold all codes in memory. x0 goes as float64 from the "
        "searching process to one machine after the other, and actors answer it one after the other. The work of a "
        "first step is proportional to rows and numbers, that of a later step to rows, as prefixes have the same size "
        "in every space; all actors finish at the same time. Hits are few: each costs a read of its row, and a blurred "
        "x0 within the radius of very many references costs far more than a first step. With less memory a first step "
        "waits for codes from disk; later ones need only the prefixes. Efficiency at more workers is Amdahl's law, "
        "T(w) = T(1) (s + (1 − s)/w), with the serial share s measured at two.",
    ]
    return "\n".join(lines)


def bytes_(number: float) -> str:
    power = min(5, max(0, int(np.log10(number) // 3)))
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def time_(seconds: float) -> str:
    return f"{seconds:,.{0 if seconds >= 10 else 1}f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=65536, help="rows of the set; with 20,000 or fewer there is no index"
    )
    parser.add_argument(
        "--side", type=int, default=32, help="height and width of its latents, which have four channels"
    )
    parser.add_argument("--images", type=int, default=16, help="images in the generated batch")
    parser.add_argument("--encoded", type=int, default=1024, help="images of the longer of the two encoding jobs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--docs", type=Path, help="Markdown page whose section `scale` is replaced")
    parser.add_argument("--measured", type=Path, help="JSON file of measurements: read if it exists, written otherwise")
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        one_process(arguments.process, arguments.images, arguments.steps)
        return
    if arguments.measured and arguments.measured.exists():
        measured = json.loads(arguments.measured.read_text())
    else:
        measured = measure(arguments.rows, arguments.side, arguments.images, arguments.encoded, arguments.steps)
        if arguments.measured:
            write_json(arguments.measured, measured)
    print(show(measured))
    if arguments.docs:
        replace_section(arguments.docs, "scale", show(measured))


if __name__ == "__main__":
    main()
