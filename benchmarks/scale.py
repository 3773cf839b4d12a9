"""Several processes and a Ray cluster on this machine, with 1 and with 2 workers, and what that means for more.

python benchmarks/scale.py                      # measures, then prints the model (a few minutes)
python benchmarks/scale.py --measured FILE      # prints the model of an earlier run, which is kept in FILE
python benchmarks/scale.py --docs docs/scale.md # and writes both there

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
from PIL import Image

from shielded import LatentSpace, ProtectedSet, Spell, distributed
from shielded.files import replacing, write_json
from shielded.generate import generate
from shielded.models import GUIDANCE, load
from shielded.protected import cluster, protected_set

SPACES = {
    "emoji": 1_024,
    "Stable Diffusion 1.5, 512 px": 16_384,
    "SDXL, 1,024 px": 65_536,
    "Stable Diffusion 3, FLUX.1, 1,024 px": 262_144,
    "Wan 2.1, 480×832, 81 frames": 2_096_640,
}
BATCH = 8  # images that search together
FEW = 32  # images of the shorter of the two jobs that encode
BEGIN, END = "<!-- begin: benchmarks/scale.py -->\n", "<!-- end -->\n"  # in the page
MACHINE = {"cores": 64, "memory": 512e9, "network": 1.25e9}  # assumed, bytes and bytes/s (10 Gbit/s)


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
    """Seconds of one batch, and of handing x0 around at one step, with so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "--master-port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [*launch, __file__, "--process", str(out), "--images", str(images), "--steps", str(steps)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"})
        return json.loads(out.read_text())


def one_process(out: Path, images: int, steps: int) -> None:
    device = distributed.join("cpu")
    pipe = load("emoji", "cpu")
    spell = Spell(radius=26.0)
    options = {"steps": steps, "guidance_scale": GUIDANCE["emoji"], "progress": False, "batch_size": images}

    def made() -> None:
        generate(pipe, ["red heart"] * images, list(range(images)), spell, processes=device is not None, **options)

    share = distributed.Share.of(BATCH)
    x0 = torch.zeros(share.size, SPACES["Stable Diffusion 1.5, 512 px"])
    measured = {"seconds": median_seconds(made, 3), "gather": median_seconds(lambda: share.gather(x0))}
    if distributed.is_main():
        write_json(out, measured)
    distributed.leave()


# ---- search and encoding: Ray ----


def random_set(folder: Path, rows: int, dim: int) -> ProtectedSet:
    """Latents of the size of images', in as many files as two workers can share evenly."""
    protected_set._SHARD_BYTES = rows * dim * 2 // 8
    protected = ProtectedSet.create(folder, LatentSpace(shape=(4, dim // 4)), torch.float16)
    generator = torch.Generator().manual_seed(0)
    protected.add(torch.randn(rows, 4, dim // 4, generator=generator), list(range(rows)))
    return protected


def on_ray(workers: int, stored: Path, alone: ProtectedSet, pictures: Path, images: int) -> dict[str, float]:
    import ray

    os.environ.update(RAY_worker_niceness="0")
    # One processor more than encoders: cluster.add_images leaves one for reading.
    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    x = torch.randn(BATCH, *alone.space.shape, generator=torch.Generator().manual_seed(1))
    radius = 0.5 * alone.nearest(x)[0].min().item()  # a blurred x0 finds more, and costs more
    manifest = protected_set.store.read_manifest(stored)
    spread = cluster.ClusterSet(stored, manifest, alone.space, workers=workers)
    measured = {
        "search": median_seconds(lambda: spread.within(x, radius)),
        "question": median_seconds(lambda: spread._ask("count")),
    }
    # The difference of two jobs is without the time that workers take to load the model.
    few, many = encoding(ray, pictures / "few"), encoding(ray, pictures)
    measured["encode"] = (many - few) / (images - FEW)
    ray.shutdown()
    return measured


def encoding(ray: Any, pictures: Path) -> float:
    """Seconds to read and encode all pictures of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        target = ProtectedSet.create(Path(folder, "set"), LatentSpace.of(load("emoji", "cpu")))
        start = time.perf_counter()
        assert all(not row["error"] for row in cluster._encoded(ray, target, str(pictures), "emoji", 32, False))
        return time.perf_counter() - start


def noise_pictures(folder: Path, images: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "few").mkdir(parents=True)
    for i in range(images):
        place = folder / "few" if i < FEW else folder
        Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(place / f"{i:06d}.png")


def measure(rows: int, dim: int, images: int, encoded: int, steps: int) -> dict[str, Any]:
    measured: dict[str, Any] = {"rows": rows, "dim": dim, "batch": BATCH, "images": images, "steps": steps}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stored, pictures = Path(folder, "set"), Path(folder, "pictures")
        noise_pictures(pictures, encoded)
        alone = random_set(stored, rows, dim)
        x = torch.randn(BATCH, *alone.space.shape, generator=torch.Generator().manual_seed(1))
        radius = 0.5 * alone.nearest(x)[0].min().item()
        measured["search alone"] = median_seconds(lambda: alone.within(x, radius))
        for workers in (1, 2):
            measured[f"ray {workers}"] = on_ray(workers, stored, alone, pictures, encoded)
        measured["bytes per number"] = sum(f.stat().st_size for f in stored.iterdir()) / rows / dim
    for workers in (1, 2):
        measured[f"processes {workers}"] = generation(workers, images, steps)
    return measured


# ---- the model ----


def efficiency(one: float, two: float) -> tuple[float, float]:
    """Efficiency at two workers, and the serial share s of Amdahl's law, T(w) = T(1) (s + (1 - s)/w)."""
    return one / two / 2, min(1.0, max(0.0, 2 * two / one - 1))


def show(measured: dict[str, Any]) -> str:
    m, ray, processes = measured, "ray", "processes"
    lines = [
        "| work | 1 worker | 2 workers | efficiency | serial share | model: efficiency at 8 | at 64 |",
        "|---" * 7 + "|",
    ]
    for name, kind, key in (
        ("generate, one batch", processes, "seconds"),
        ("search, one step", ray, "search"),
        ("encode, one image", ray, "encode"),
    ):
        one, two = m[f"{kind} 1"][key], m[f"{kind} 2"][key]
        now, serial = efficiency(one, two)
        later = " | ".join(f"{1 / (1 + serial * (w - 1)):.0%}" for w in (8, 64))
        lines.append(f"| {name} | {1e3 * one:.1f} ms | {1e3 * two:.1f} ms | {now:.0%} | {serial:.0%} | {later} |")
    question, gather = m["ray 2"]["question"], m["processes 2"]["gather"]
    per_number = m["ray 1"]["search"] / m["rows"] / m["dim"]
    lines += [
        "",
        f"Asking two actors and getting their answers takes {1e3 * question:.1f} ms; handing {m['batch']} latents of "
        f"16,384 numbers around between two processes {1e3 * gather:.1f} ms. Searching takes "
        f"{1e12 * per_number:.2f} ps of one core per stored number for {m['batch']} images "
        f"({m['rows']:,} random rows of {m['dim']:,} numbers), and a set {m['bytes per number']:.2f} bytes per number.",
        "",
        "| images | latents | disk | machines | network a step | time a step |",
        "|---" * 6 + "|",
    ]
    for count in (10**6, 10**8, 10**9):
        for name, dim in SPACES.items():
            disk = count * dim * m["bytes per number"]
            machines = max(1, int(np.ceil(disk / MACHINE["memory"])))
            sent = m["batch"] * dim * 8
            seconds = count * dim * per_number / (machines * MACHINE["cores"]) + question + sent / MACHINE["network"]
            lines.append(f"| {count:,} | {name} | {bytes_(disk)} | {machines:,} | {bytes_(sent)} | {time_(seconds)} |")
    lines += [
        "",
        f"Assumed: machines of {MACHINE['cores']} cores as fast as this one's, {bytes_(MACHINE['memory'])} of memory "
        f"and {bytes_(MACHINE['network'])}/s of network, as many as hold the whole set in memory; cores that do not "
        "wait for each other's memory; work in proportion to rows and numbers, all workers done at the same time; "
        f"{m['batch']} images a step, sent to every machine as float64; few hits. Efficiency at more workers is "
        "Amdahl's law with the serial share seen at two.",
    ]
    return "\n".join(lines)


def bytes_(number: float) -> str:
    power = min(5, max(0, int(np.log10(number) // 3)))
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def time_(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=16384)
    parser.add_argument("--images", type=int, default=16, help="of the batch that is generated")
    parser.add_argument("--encoded", type=int, default=1024, help="images of the longer of the two jobs that encode")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--docs", type=Path, help="a page with a place for the results")
    parser.add_argument(
        "--measured", type=Path, help="what was measured: read from here, or written if it is not there"
    )
    parser.add_argument("--process", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        one_process(arguments.process, arguments.images, arguments.steps)
        return
    if arguments.measured and arguments.measured.exists():
        measured = json.loads(arguments.measured.read_text())
    else:
        measured = measure(arguments.rows, arguments.dim, arguments.images, arguments.encoded, arguments.steps)
        if arguments.measured:
            write_json(arguments.measured, measured)
    print(show(measured))
    if arguments.docs:
        before, _, rest = arguments.docs.read_text().partition(BEGIN)
        with replacing(arguments.docs) as draft:
            draft.write_text(f"{before}{BEGIN}{show(measured)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
