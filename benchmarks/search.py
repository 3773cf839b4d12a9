"""Check that the search is exact, and compare its cost with brute force and FAISS.

python benchmarks/search.py exact --work DIR    # against brute force in float64, three latent spaces
python benchmarks/search.py speed --work DIR    # 10 k, 100 k and 1.2 M rows along a sampler's trajectories
python benchmarks/search.py pairs --work DIR    # side by side: a tensor and a set of the same references

All need photos, the first two tiny autoencoders as well (`--photos`, `--taesd`; `search_data.py` builds sets from
them), and keep sets and indexes in DIR: 40 GB for 1.2 M rows. `speed` needs the extras `bench` and `large`, and
an idle machine; with `--device cuda` queries, our search and brute force are on a GPU, and FAISS is on the CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_data import (
    BATCH,
    SIDE,
    SPACES,
    STEPS,
    held_out,
    large_set,
    protected_part,
    real_latents,
    trajectories,
    windows,
)
from search_pairs import pairs
from store import private
from torch import Tensor
from tqdm import tqdm

from shielded import LatentSpace, ProtectedSet
from shielded.files import replace_section
from shielded.protected.search.choose import MAX_UNINDEXED_ROWS
from shielded.spell import Calibration

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
MAX_FLAT_ROWS = 100_000  # as float32, larger sets do not fit into memory


# ---- exact ----


def queries(latents: Tensor, refs: Tensor, count: int) -> Tensor:
    """Draw sharp, blurred and noisy latents of other images, references, and points between two references."""
    generator = torch.Generator().manual_seed(1)
    part = count // 5
    drawn = latents[torch.randint(len(latents), (3 * part,), generator=generator)].float()
    sharp, blurred, noisy = drawn.split(part)
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(blurred, 4), scale_factor=4)
    noisy = noisy + 0.5 * torch.randn(noisy.shape, generator=generator)
    hits = refs[torch.randint(len(refs), (3, part), generator=generator)].float()
    return torch.cat([sharp, blurred, noisy, hits[0], 0.7 * hits[1] + 0.3 * hits[2]])


def float64_distances(x: np.ndarray, z: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """Compute distances (B, K) by one float64 matrix product; the error is below 1e-4 where small, 1e-10 elsewhere."""
    return np.sqrt(np.maximum(np.square(x).sum(1)[:, None] + squared - 2 * x @ z.T, 0))


def exact(folder: Path, photos: Path, taesd: Path, count: int, out: Path | None) -> None:
    lines = [
        "| latents of | rows | numbers per row | queries | hits | wrong: within | nearest 1 | nearest 10 |",
        "|---" * 8 + "|",
    ]
    for space, channels in SPACES.items():
        latents = real_latents(folder, photos, taesd, space, 256, None if space == "sd1" else 500)[:500]
        rows = windows(protected_part(latents), 16, 3)
        others = windows(held_out(latents), 16, 3)
        path = folder / f"exact-{space}"
        protected = ProtectedSet.create(path, LatentSpace(shape=(channels, 16, 16)), torch.float16, overwrite=True)
        for part in rows.split(5000):
            protected.add(part, [f"{len(protected) + i}" for i in range(len(part))])
        removed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))[:500]
        protected.remove([str(i) for i in removed.tolist()])
        protected.add(rows[removed[:200]], [f"again {i}" for i in range(200)])
        assert len(protected) > MAX_UNINDEXED_ROWS
        z = protected.vectors(range(len(protected))).flatten(1).double().numpy()
        squared = np.square(z).sum(1)
        x0s = queries(others, rows, count)
        wrong = {"within": 0, "nearest 1": 0, "nearest 10": 0}
        found = 0
        for x0 in tqdm(x0s.split(50), space):
            x = x0.flatten(1).double().numpy()
            approximate = float64_distances(x, z, squared)
            # The 20 nearest, by subtraction; the 20th distance itself is the radius, so it is no hit.
            near = np.argpartition(approximate, 30, axis=1)[:, :31]
            near.sort(axis=1)
            distance = np.stack([np.sqrt(np.square(x[i] - z[near[i]]).sum(1)) for i in range(len(x))])
            order = np.argsort(distance, axis=1, kind="stable")
            row, distance = np.take_along_axis(near, order, 1), np.take_along_axis(distance, order, 1)
            radius = np.maximum(distance[:, 19], 1e-3)
            # The approximate distances left out no row within the radius.
            assert (np.partition(approximate, 30, axis=1)[:, 30] > radius + 1e-3).all()
            hits = protected.within(x0, torch.from_numpy(radius)[:, None].expand(-1, len(z)))
            for i in range(len(x)):
                inside = np.sort(row[i][distance[i] < radius[i]])
                wrong["within"] += not np.array_equal(hits.row[hits.query == i].numpy(), inside)
                found += len(inside)
            for k in (1, 10):
                distances, rows_found = protected.nearest_rows(x0, k)
                same = (rows_found.numpy() == row[:, :k]).all(1) & np.isclose(
                    distances, distance[:, :k], rtol=1e-12
                ).all(1)
                wrong[f"nearest {k}"] += int((~same).sum())
        numbers = (len(protected), z.shape[1], len(x0s), found, *wrong.values())
        lines.append(f"| {space} | {' | '.join(f'{number:,}' for number in numbers)} |")
        print(lines[-1], flush=True)
    if out is not None:
        replace_section(out, "exact", "\n".join(lines))


# ---- speed ----


def protected_set(folder: Path, photos: Path, taesd: Path, rows: int) -> ProtectedSet:
    path = folder / f"set-{rows}"
    if not path.exists():
        draft = ProtectedSet.create(folder / f"draft-{rows}", LatentSpace(shape=(4, SIDE, SIDE)), torch.float16, True)
        start = 0
        for part in tqdm(large_set(folder, photos, taesd, rows), f"{rows:,} rows", total=-(-rows // 8192)):
            draft.add(part, list(range(start, start + len(part))))
            start += len(part)
        draft.path.rename(path)
    return ProtectedSet.open(path)


Job = Callable[[Tensor, float], Any]  # x0 (B, *S) and its noise level


def timed(job: Job, run: dict[str, list]) -> tuple[float, list[Any]]:
    """Time one trajectory in seconds, and return the answers of its steps."""
    start = time.perf_counter()
    answers = [job(x0, level) for x0, level in zip(run["x0"], run["levels"], strict=True)]
    return time.perf_counter() - start, answers


def ours(protected: ProtectedSet, radius: float) -> dict[str, Job]:
    """List the searches that `Spell` makes in a protected set."""
    calibration = Calibration(energy=protected.energy)

    def posterior(x0: Tensor, level: float) -> Any:
        return protected.within(x0, radius, calibration.posterior_variance(x0.flatten(1).square().sum(1), level))

    return {
        "nearest 1": lambda x0, level: protected.nearest_rows(x0, 1)[1].cpu().numpy(),
        "nearest 10": lambda x0, level: protected.nearest_rows(x0, 10)[1].cpu().numpy(),
        "SPELL-1": lambda x0, level: protected.within(x0, radius, nearest=1),
        "SPELL-10": lambda x0, level: protected.within(x0, radius, nearest=10),
        "posterior": posterior,
        "constant": lambda x0, level: protected.within(x0, radius),
    }


def brute_force(protected: ProtectedSet, k: int, device: str) -> Job:
    """Search by float32 matrix products over all rows, which stay in float16."""
    parts = [torch.from_numpy(rows).to(device) for _, rows in protected._reader.vectors.parts()]
    norms = [part.float().square().sum(1) for part in parts]

    def job(x0: Tensor, level: float) -> Any:
        x, start = x0.flatten(1), 0
        best, row = x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.long)
        for part, squared in zip(parts, norms, strict=True):
            distance = squared - 2 * x @ part.float().T
            best = torch.cat([best, distance], dim=1)
            numbers = torch.arange(start, start + len(part), device=x.device)
            row = torch.cat([row, numbers.expand(len(x), -1)], dim=1)
            best, at = best.topk(k, largest=False)
            row = row.gather(1, at)
            start += len(part)
        return row.cpu().numpy()

    return job


def faiss_ivf(folder: Path, protected: ProtectedSet) -> Any:
    """Build or read an IVF index of 4 √N cells, as FAISS advises, with float16 rows: 1.2 M in float32 would take 20 GB.

    k-means runs for 4 rounds on 20 rows per cell and torch assigns the rows, so that building takes minutes, not hours.
    """
    import faiss

    faiss.omp_set_num_threads(THREADS)
    file = folder / f"faiss-{len(protected)}.index"
    if not file.exists():
        dim, cells = protected.space.dim, int(4 * len(protected) ** 0.5)
        index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(dim), dim, cells, faiss.ScalarQuantizer.QT_fp16)
        index.cp.niter, index.cp.min_points_per_centroid = 4, 1
        parts = [rows for _, rows in protected._reader.vectors.parts()]
        stride = max(1, len(protected) // (20 * cells))
        index.train(np.concatenate([rows[::stride] for rows in parts]).astype(np.float32))
        centres = torch.from_numpy(index.quantizer.reconstruct_n(0, cells))
        half, squared, start = centres.T.bfloat16(), centres.square().sum(1), 0
        for rows in tqdm(parts, "FAISS"):
            cell = (squared - 2 * (torch.from_numpy(rows).bfloat16() @ half).float()).argmin(1).numpy()
            rows = rows.astype(np.float32)
            ids = np.arange(start, start := start + len(rows))
            index.add_core(len(rows), *map(faiss.swig_ptr, (rows, ids, cell)))
        faiss.write_index(index, str(file))
    return faiss.read_index(str(file))


def faiss_search(index: Any, k: int, probes: int | None) -> Job:
    def job(x0: Tensor, level: float) -> Any:
        if probes is not None:
            index.nprobe = probes
        return index.search(x0.flatten(1).cpu().numpy(), k)[1]

    return job


def recall(found: list[np.ndarray], true: list[np.ndarray]) -> float:
    same = [
        len(np.intersect1d(a, b)) / len(b) for f, t in zip(found, true, strict=True) for a, b in zip(f, t, strict=True)
    ]
    return float(np.mean(same))


def unet_step(device: str) -> float:
    """Time one guided step of 8 images in a UNet of Stable Diffusion 1.5's size (860 M parameters), in seconds.

    A GPU runs all images at once in float16; a CPU runs one image after the other.
    """
    from diffusers import UNet2DConditionModel

    cuda = device != "cpu"
    size, dtype = (BATCH, torch.float16) if cuda else (1, torch.float32)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval().to(device, dtype)
    latents, text = (torch.randn(2 * size, *shape).to(device, dtype) for shape in ((4, 64, 64), (77, 768)))
    seconds = []
    with torch.no_grad():
        for _ in range(4 if cuda else 2):
            start = time.perf_counter()
            unet(latents, 10, text)[0].sum().item()
            seconds.append(time.perf_counter() - start)
    return BATCH / size * min(seconds)


def speed(
    folder: Path, photos: Path, taesd: Path, counts: list[int], seeds: int, device: str, out: Path | None
) -> None:
    step = unet_step(device)
    print(f"a UNet step of {BATCH} images: {step:.3f} s", flush=True)
    results = []
    for count in counts:
        # A new process for each set, so that its memory is that of this set alone.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results += pool.submit(measure, folder, photos, taesd, count, seeds, device, step).result()
    if out is not None:
        replace_section(out, "search" if device == "cpu" else "search-device", table(results, step, seeds, device))


def measure(
    folder: Path, photos: Path, taesd: Path, count: int, seeds: int, device: str, step: float
) -> list[dict[str, Any]]:
    """Time our searches on all trajectories, then the others: memory does not hold both kinds of index at once."""
    torch.set_num_threads(THREADS)
    others = held_out(real_latents(folder, photos, taesd, "sd1", 256))
    runs = trajectories(others, seeds)
    for run in runs:
        run["x0"] = [x0.to(device) for x0 in run["x0"]]
    protected = protected_set(folder, photos, taesd, count)
    before = private()
    protected.nearest_rows(runs[0]["x0"][-1], 1)  # builds or maps the index, or copies the set to the device
    # A tenth of the held-out photos lie within it.
    radius = float(protected.nearest(others[:100].float().to(device))[0].quantile(0.1))
    jobs = ours(protected, radius)
    true = {k: [timed(jobs[f"nearest {k}"], run)[1] for run in runs] for k in (1, 10)}
    seconds = {name: [timed(job, run)[0] for run in runs] for name, job in jobs.items()}
    memory = (private() - before) * 2**20 / 1e9
    found: dict[str, float] = {}

    def compare(name: str, job: Job, k: int) -> None:
        pairs = [timed(job, run) for run in runs]
        seconds[name] = [taken for taken, _ in pairs]
        found[name] = float(np.mean([recall(a, t) for (_, a), t in zip(pairs, true[k], strict=True)]))

    index = faiss_ivf(folder, protected)
    for k in (1, 10):
        for probes in (1, 10):
            compare(f"FAISS IVF, nprobe {probes}, k = {k}", faiss_search(index, k, probes), k)
    del index
    if count <= MAX_FLAT_ROWS:
        index = faiss_flat(protected)
        for k in (1, 10):
            compare(f"FAISS flat, k = {k}", faiss_search(index, k, None), k)
    name, job = "torch brute force, k = 10", brute_force(protected, 10, device)
    if count <= MAX_FLAT_ROWS or device != "cpu":
        compare(name, job, 10)
    else:  # every step costs the same, and 30 of them would take minutes
        short = {key: values[:1] for key, values in runs[0].items()}
        timed(job, short)
        seconds[name] = [STEPS * timed(job, short)[0]]
    rows = [
        {
            "rows": count,
            "search": name,
            "seconds": statistics.median(taken),
            "least": min(taken),
            "most": max(taken),
            "recall": found.get(name, 1.0),
            "share": statistics.median(taken) / STEPS / step,
            "memory": memory,
            "radius": radius,
        }
        for name, taken in seconds.items()
    ]
    print(*rows, sep="\n", flush=True)
    return rows


def faiss_flat(protected: ProtectedSet) -> Any:
    import faiss

    index = faiss.IndexFlatL2(protected.space.dim)
    for _, rows in protected._reader.vectors.parts():
        index.add(rows.astype(np.float32))
    return index


def table(results: list[dict[str, Any]], step: float, seeds: int, device: str) -> str:
    counts = list(dict.fromkeys(row["rows"] for row in results))
    lines = [f"| search | {' | '.join(f'{count:,} rows' for count in counts)} | recall | share of a UNet step |"]
    lines.append("|---" * (len(counts) + 3) + "|")
    for name in dict.fromkeys(row["search"] for row in results):
        by_count = {row["rows"]: row for row in results if row["search"] == name}
        cells = [
            f"{by_count[c]['seconds']:.2f} ({by_count[c]['least']:.2f}–{by_count[c]['most']:.2f})"
            if c in by_count
            else "–"
            for c in counts
        ]
        last = by_count[max(by_count)]
        found = "1, exact" if last["recall"] == 1.0 else f"{last['recall']:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {found} | {100 * last['share']:.2f} % |")
    most = max(row["memory"] for row in results)
    lines.append(
        f"\nSeconds per trajectory, median (least–most) of {seeds}; recall and share of the largest set. Radius "
        + ", ".join(f"{next(r['radius'] for r in results if r['rows'] == c):.1f} ({c:,} rows)" for c in counts)
        + f". The search holds at most {most:.2f} GB of private memory. A guided step of {BATCH} images in a UNet of "
        f"Stable Diffusion 1.5's size takes {step:.2g} s on {machine(device)}.\n"
    )
    return "\n".join(lines)


def machine(device: str) -> str:
    cores = f"{THREADS} cores"
    return cores if device == "cpu" else f"one {torch.cuda.get_device_name(device)}, in float16; FAISS on {cores}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["exact", "speed", "pairs"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=Path("../shared/data/photos1000.npz"))
    parser.add_argument("--taesd", type=Path, default=Path("../shared/data/taesd"))
    parser.add_argument("--queries", type=int, default=10_000, help="exact: queries in each latent space")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000, 1_200_000], help="speed: sizes of the sets"
    )
    parser.add_argument("--pictures", type=int, default=16_945, help="pairs: references of 12,288 numbers")
    parser.add_argument("--trajectories", type=int, default=3, help="speed: number of trajectories")
    parser.add_argument("--device", default="cpu", help="speed: device of the queries")
    parser.add_argument("--out", type=Path, help="Markdown file whose table is replaced")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.what == "pairs":
        table_of_pairs = pairs(args.work, args.photos, args.pictures)
        if args.out is not None:
            replace_section(args.out, "pairs", table_of_pairs)
    elif args.what == "exact":
        exact(args.work, args.photos, args.taesd, args.queries, args.out)
    else:
        speed(args.work, args.photos, args.taesd, args.rows, args.trajectories, args.device, args.out)


if __name__ == "__main__":
    main()
