"""Measure how fast a protected set is filled, and what it costs to keep one open.

python benchmarks/store.py protect --images ../shared/data/emoji128.tar   # share of the raw encoder's throughput
python benchmarks/store.py large           # a million rows: memory, opening, finding, removing
python benchmarks/store.py compare         # the same work with Lance, if pylance is installed
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from shielded import LatentSpace, ProtectedSet
from shielded.protected import add_images, writer


def private() -> float:
    """Measure the memory that belongs to this process alone, in MiB, without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:<44} {time.perf_counter() - start:9.3f} s   {private():7.0f} MiB private", flush=True)


def median_ms(job: Callable[[], object], repeats: int = 21) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


# ---- shielded protect against the encoder alone ----


def stable_diffusion_space(device: str) -> LatentSpace:
    """Build an autoencoder of Stable Diffusion's size (34 M parameters in the encoder), random weights, 512 pixels."""
    from diffusers import AutoencoderKL

    width = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=width,
        layers_per_block=2,
        latent_channels=4,
    )
    return LatentSpace((4, 64, 64), (512, 512), vae=vae.eval().to(device, torch.float16 if device == "cuda" else None))


def write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of 768x576 pixels: smooth colours with some grain, 190 kB each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((768, 576), Image.BICUBIC)
        grain = rng.integers(-20, 21, (576, 768, 1))
        Image.fromarray(np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)).save(
            folder / f"{number:05d}.jpg", quality=90
        )


def protect(given: str | None, model: str, count: int, device: str, repeats: int) -> None:
    from shielded.latent_space import to_pixels
    from shielded.models import load
    from shielded.protected.ingest import sources
    from shielded.protected.ingest.encoding import encode_pixels
    from shielded.protected.ingest.pictures import decode_picture

    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            (Path(folder) / "photos").mkdir()
            write_photos(Path(folder) / "photos", count)
            given = str(Path(folder) / "photos")
        space = stable_diffusion_space(device) if model == "sd" else LatentSpace.of(load(model, device))
        chosen = list(islice(sources.pictures(given), count))
        start = time.perf_counter()
        pixels = torch.stack([to_pixels(decode_picture(picture.read()), space.image_size) for picture in chosen])
        decoding = (time.perf_counter() - start) / len(chosen)
        listed = iter(lambda: iter(chosen), None)
        original, sources.pictures = sources.pictures, lambda _: next(listed)
        rates = []
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            for batch in pixels.split(32):
                encode_pixels(space, list(batch))
            raw = len(chosen) / (time.perf_counter() - start)
            protected = ProtectedSet.create(Path(folder) / f"set{repeat}", space, torch.float16)
            start = time.perf_counter()
            done = add_images(protected, given, progress=False)
            ours = (done.added + done.present) / (time.perf_counter() - start)
            if repeat:  # the first is a warm-up
                rates.append((raw, ours, ours / raw))
        sources.pictures = original
        raw, ours, share = (statistics.median(column) for column in zip(*rates, strict=True))
        print(
            f"{len(chosen)} images, {torch.get_num_threads()} threads, {device}: reading and decoding "
            f"{1e3 * decoding:.2f} ms per image; encoder alone {raw:.1f} images/s, protect {ours:.1f}: "
            f"{100 * share:.1f} % (from {100 * min(r[2] for r in rates):.1f} to {100 * max(r[2] for r in rates):.1f})"
        )


# ---- a large set ----


def large(rows: int, dim: int, shards: int) -> None:
    """Measure a set with few numbers per row, so that ids and digests dominate, and as many files as with 16,384."""
    per_shard = rows // shards
    writer._MAX_SHARD_BYTES = per_shard * dim * 2
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.standard_normal((per_shard, dim), dtype=np.float32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set"
        protected = ProtectedSet.create(path, LatentSpace((dim,)), torch.float16)
        with timed(f"{rows} rows of {dim} in {shards} adds"):
            for first in range(0, rows, per_shard):
                names = [f"train/{n // 10000:05d}/{n:09d}" for n in range(first, first + per_shard)]
                digests = [rng.bytes(32).hex() for _ in names]
                protected.add(latents, names, 8.0, [f"/data/{name}.jpg" for name in names], digests)
        del protected
        print(f"{size(path):.0f} MiB on disk, manifest {(path / 'set.json').stat().st_size / 1024:.0f} KiB")
        with timed("open"):
            protected = ProtectedSet.open(path)
        with timed("radii, mean norm"):
            protected.radii, protected.energy  # noqa: B018
        with timed("a thousand random ids"):
            names = [protected.ids[row] for row in rng.integers(0, rows, 1000)]
        with timed("find 1,000 ids"):
            assert len(protected.ids.find(names)) == len(set(names))
        with timed("1,000 random vectors"):
            protected.vectors(rng.integers(0, rows, 1000))
        with timed("remove 1 id"):
            protected.remove(names[:1])
        with timed(f"remove {rows // 100} ids"):
            protected.remove(protected.ids[::100][: rows // 100])
        with timed("add 1 row"):
            protected.add(latents[:1], ["one more"])
        with timed("all ids and digests, as protect reads at its start"):
            known = set(protected.ids), {bytes.fromhex(digest) for digest in protected.sha256 if digest}
        del known
        with timed("verify"):
            protected.verify()
        with timed("compact"):
            protected.compact()


# ---- Lance ----


def compare(rows: int, dim: int) -> None:
    """Write, open, read at random, delete, compact, and flip one bit."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((rows, dim), dtype=np.float32).astype(np.float16)
    ten, thousand = (np.sort(rng.choice(rows, n, replace=False)) for n in (10, 1000))
    deleted = [f"image {n}" for n in (7, rows // 2)]
    with tempfile.TemporaryDirectory() as folder:
        for name, store in (("shards", Shards), ("Lance", Lance)):
            path, before = Path(folder) / name, private()
            start = time.perf_counter()
            store.write(path, latents)
            write = latents.nbytes / 2**20 / (time.perf_counter() - start)
            opening = median_ms(lambda s=store, p=path: s.open(p))
            opened = store.open(path)
            assert np.array_equal(store.take(opened, ten), latents[ten])
            reading = [median_ms(lambda s=store, o=opened, r=r: s.take(o, r)) for r in (ten, thousand)]
            delete = median_ms(lambda s=store, o=opened: s.delete(o, deleted), 1)
            disk = size(path)
            compact = median_ms(lambda s=store, o=opened: s.compact(o), 1)
            remains = latents[7].tobytes() in b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
            file = max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            try:
                store.check(path)
                outcome = "not detected"
            except Exception as error:
                outcome = f"detected ({type(error).__name__})"
            print(
                f"{name}: write {write:.0f} MiB/s, open {opening:.1f} ms, 10 rows {reading[0]:.2f} ms, 1,000 rows "
                f"{reading[1]:.1f} ms, delete 2 {delete:.0f} ms, compact {compact / 1e3:.2f} s "
                f"(vector erased: {not remains}), {disk:.0f} MiB on disk, {private() - before:+.0f} MiB private, "
                f"flipped bit {outcome}"
            )


class Shards:
    @staticmethod
    def write(path: Path, latents: np.ndarray) -> None:
        protected = ProtectedSet.create(path, LatentSpace(latents.shape[1:]), torch.float16)
        for first in range(0, len(latents), 4096):
            part = torch.from_numpy(latents[first : first + 4096])
            protected.add(part, [f"image {n}" for n in range(first, first + len(part))])

    open = staticmethod(ProtectedSet.open)

    @staticmethod
    def take(opened: ProtectedSet, rows: np.ndarray) -> np.ndarray:
        return opened.vectors(rows).numpy()

    @staticmethod
    def delete(opened: ProtectedSet, ids: list[str]) -> None:
        opened.remove(ids)

    @staticmethod
    def compact(opened: ProtectedSet) -> None:
        opened.compact()

    @staticmethod
    def check(path: Path) -> None:
        ProtectedSet.open(path).verify()


class Lance:
    @staticmethod
    def write(path: Path, latents: np.ndarray) -> None:
        import lance
        import pyarrow as pa

        for first in range(0, len(latents), 4096):
            part = latents[first : first + 4096]
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])
            table = pa.table({"id": [f"image {n}" for n in range(first, first + len(part))], "latents": column})
            lance.write_dataset(table, path, mode="append" if first else "create")

    @staticmethod
    def open(path: Path):
        import lance

        return lance.dataset(path)

    @staticmethod
    def take(opened, rows: np.ndarray) -> np.ndarray:
        column = opened.take(rows, columns=["latents"])["latents"].combine_chunks()
        return np.asarray(column.flatten()).reshape(len(rows), -1)

    @staticmethod
    def delete(opened, ids: list[str]) -> None:
        opened.delete(f"id in ({', '.join(map(repr, ids))})")

    @staticmethod
    def compact(opened) -> None:
        opened.optimize.compact_files()
        opened.cleanup_old_versions(timedelta(0))

    @staticmethod
    def check(path: Path) -> None:
        opened = Lance.open(path)
        opened.validate()
        opened.to_table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["protect", "large", "compare"])
    parser.add_argument("--images", help="images to protect; default: synthetic files")
    parser.add_argument(
        "--model", default="emoji", help="as for `shielded protect`; sd: Stable Diffusion's size, random weights"
    )
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, help="default: 1,200,000 for large, 20,000 for compare")
    parser.add_argument("--dim", type=int, help="default: 64 for large, 4,096 for compare")
    args = parser.parse_args()
    if args.what == "protect":
        protect(args.images, args.model, args.count, args.device, args.repeats)
    elif args.what == "large":
        large(args.rows or 1_200_000, args.dim or 64, 600)
    else:
        compare(args.rows or 20_000, args.dim or 4096)


if __name__ == "__main__":
    main()
