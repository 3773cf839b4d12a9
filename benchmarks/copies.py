"""Measure which changed copies the descriptor finds, at which rate of false alarms, and how fast the bank answers.

    python benchmarks/copies.py --photos photos1000.npz --emoji emoji128.tar --rows 1200000 \
        --out docs/copies_measured.md --sheet docs/images

A false alarm is a picture whose most similar other picture is as similar to it as the threshold says of a copy: for the
photos any other one, for the emoji one of another motif. Sections of --out are replaced.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from shielded.copies import Bank, Descriptor, Descriptors
from shielded.files import replace_section
from shielded.radius.alterations import CHANGES, LARGE_CHANGES

ALL_CHANGES = {**CHANGES, **LARGE_CHANGES}


def photos(path: Path) -> list[Image.Image]:
    """Read an .npz of encoded pictures: bytes `data`, cut at `offsets`."""
    stored = np.load(path)
    data, offsets = stored["data"].tobytes(), stored["offsets"]
    return [Image.open(io.BytesIO(data[a:b])).convert("RGB") for a, b in pairwise(offsets)]


def emoji(path: Path) -> tuple[list[Image.Image], list[str]]:
    """Read pictures and captions of a webdataset archive."""
    with tarfile.open(path) as tar:
        content = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    keys = sorted(name.removesuffix(".json") for name in content if name.endswith(".json"))
    pictures = [Image.open(io.BytesIO(content[f"{key}.webp"])).convert("RGB") for key in keys]
    return pictures, [json.loads(content[f"{key}.json"])["caption"] for key in keys]


def motif(caption: str) -> str:
    """Return a caption without the words for people, which several captions of one drawing differ in."""
    return " ".join(re.sub(r"\b(man|woman|men|women|people|person)\b", "", caption).split()) or caption


def nearest_other(vectors: torch.Tensor, groups: Sequence[object]) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the most similar picture of another group: similarities and rows (n,)."""
    number = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([number[g] for g in groups])
    values, rows = [], []
    for start in range(0, len(vectors), 1000):
        part = slice(start, start + 1000)
        similarities = (vectors[part] @ vectors.T).masked_fill(group[part, None] == group, -2)
        best = similarities.max(dim=1)
        values.append(best.values)
        rows.append(best.indices)
    return torch.cat(values), torch.cat(rows)


def threshold_at(nearest: torch.Tensor, rate: float) -> float:
    """Find the smallest threshold that at most this share of pictures exceeds beside another one."""
    ordered = nearest.sort(descending=True).values
    return float(ordered[int(rate * len(ordered))])


def caught(
    descriptor: Descriptor, images: list[Image.Image], vectors: torch.Tensor, rows: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Compute the similarity of each changed copy to its original, for each kind of change."""
    found = {}
    for name, change in ALL_CHANGES.items():
        rng = np.random.default_rng(0)
        described = descriptor.of([change(images[i], rng) for i in rows])
        found[name] = (described * vectors[list(rows)]).sum(dim=1)
        print(f"{name:32} least {found[name].min():.3f} median {found[name].median():.3f}", flush=True)
    return found


def table(found: dict[str, torch.Tensor], thresholds: dict[float, float]) -> str:
    """Format a Markdown table: kinds of changes by rates of false alarms."""
    head = ["change", *(f"{100 * rate:g} %" for rate in thresholds)]
    lines = [head, ["---", *["--:"] * len(thresholds)]]
    lines += [
        [name, *(f"{100 * (values > t).double().mean():.1f}" for t in thresholds.values())]
        for name, values in found.items()
    ]
    lines.append(["**threshold**", *(f"{t:.3f}" for t in thresholds.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured(
    descriptor: Descriptor,
    images: list[Image.Image],
    groups: Sequence[object],
    rates: Sequence[float],
    sample: int,
) -> tuple[str, torch.Tensor, torch.Tensor, dict[str, torch.Tensor], Sequence[int]]:
    vectors = descriptor.of(images)
    nearest, other = nearest_other(vectors, groups)
    rows = range(0, len(images), -(-len(images) // sample))
    found = caught(descriptor, images, vectors, rows)
    text = f"{len(images)} pictures, {len(rows)} copies of each kind.\n\n"
    return text + table(found, {rate: threshold_at(nearest, rate) for rate in rates}), nearest, other, found, rows


def pairs_sheet(pairs: list[tuple[str, Image.Image, Image.Image]], side: int = 112) -> Image.Image:
    """Draw pairs of pictures one above the other, with a line of text each."""
    sheet = Image.new("RGB", (side * len(pairs), 2 * side + 14), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, first, second) in enumerate(pairs):
        for j, picture in enumerate((first, second)):
            sheet.paste(picture.resize((side - 4, side - 4)), (i * side + 2, j * side + 14))
        draw.text((i * side + 2, 1), text, fill="black")
    return sheet


def closest_pairs(
    images: list[Image.Image], nearest: torch.Tensor, other: torch.Tensor, count: int
) -> list[tuple[str, Image.Image, Image.Image]]:
    """List the different pictures that are most similar to each other: the false alarms."""
    pairs: dict[tuple[int, int], float] = {}
    for i in nearest.argsort(descending=True).tolist():
        j = int(other[i])
        pairs.setdefault((min(i, j), max(i, j)), float(nearest[i]))
        if len(pairs) == count:
            break
    return [(f"{value:.3f}", images[i], images[j]) for (i, j), value in pairs.items()]


def missed(
    images: list[Image.Image], found: dict[str, torch.Tensor], rows: Sequence[int], threshold: float, count: int
) -> list[tuple[str, Image.Image, Image.Image]]:
    """List copies that the threshold misses, the least similar one of each kind of change first."""
    least = []
    for name, values in found.items():
        for place in values.argsort()[:3].tolist():
            if values[place] <= threshold:
                least.append((float(values[place]), name, rows[place]))
    changed = [
        (value, name, images[i], ALL_CHANGES[name](images[i], np.random.default_rng(0)))
        for value, name, i in sorted(least)[:count]
    ]
    return [(f"{value:.2f} {name}"[:19], original, copy) for value, name, original, copy in changed]


def seconds_per_search(rows: int, dim: int, rows_per_file: int, answer: Callable[[Bank, np.ndarray], object]) -> float:
    """Return the median time of 20 searches in random vectors that are mapped from files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        first = rng.standard_normal((rows_per_file, dim), np.float32)
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        blocks, query = [], first[:1]
        for number, start in enumerate(range(0, rows, rows_per_file)):
            vectors = first[: rows - start, rng.permutation(dim) if number else slice(None)]
            parts = []
            for name, part in vars(Descriptors.of(vectors)).items():
                np.save(Path(folder, f"{name}{number}.npy"), part)
                parts.append(np.load(Path(folder, f"{name}{number}.npy"), mmap_mode="r"))
            blocks.append(Descriptors(*parts))
        bank = Bank(blocks)
        times = []
        for attempt in range(23):
            noisy = query + 0.02 * rng.standard_normal(query.shape)
            noisy /= np.linalg.norm(noisy)
            start = time.perf_counter()
            answer(bank, noisy.astype(np.float32))
            times.append(time.perf_counter() - start if attempt > 2 else np.inf)
        return float(np.median(sorted(times)[:20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--emoji", type=Path)
    parser.add_argument("--rows", type=int, help="of a bank to time, such as 1200000; it needs 1.5 kB of disk a row")
    parser.add_argument("--sample", type=int, default=1000, help="copies of each kind")
    parser.add_argument("--weights", type=Path, help="of another descriptor of the package's kind")
    parser.add_argument("--out", type=Path, help="Markdown file whose sections are replaced")
    parser.add_argument("--sheet", type=Path, help="folder for pictures of emoji that are confused and missed")
    args = parser.parse_args()
    descriptor = Descriptor.load("shielded", args.weights)

    def show(section: str, text: str) -> None:
        print(f"\n{section}\n{text}", flush=True)
        if args.out:
            replace_section(args.out, section, text)

    if args.photos:
        images = photos(args.photos)
        text, *_ = measured(descriptor, images, range(len(images)), (0.01, 0.001), args.sample)
        show("photos", text)
    if args.emoji:
        images, captions = emoji(args.emoji)
        groups = [motif(caption) for caption in captions]
        rates = (0.01, 0.02, 0.05, 0.1)
        text, nearest, other, found, rows = measured(descriptor, images, groups, rates, args.sample)
        show("emoji", text)
        if args.sheet:
            pairs_sheet(closest_pairs(images, nearest, other, 10)).save(args.sheet / "copies-confused.png")
            misses = missed(images, found, rows, threshold_at(nearest, 0.05), 10)
            if misses:
                pairs_sheet(misses).save(args.sheet / "copies-missed.png")
    if args.rows:
        lines = ["| threads | one image |", "|--:|--:|"]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            value = seconds_per_search(args.rows, 256, 32768, lambda bank, query: bank.nearest(query, 1))
            lines.append(f"| {threads} | {1000 * value:.0f} ms |")
        show("bank", "\n".join(lines))


if __name__ == "__main__":
    main()
