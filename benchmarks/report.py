"""Measures how large the page of a run is, and how long a browser takes to open it.

python benchmarks/report.py                      # 1,000 images of 512 pixels; needs playwright and a Chromium
python benchmarks/report.py --images 100 --out report.html
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from shielded import Certificate
from shielded.runs.report import Row, write_report

OPENED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"  # two frames were drawn
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAYERS = 60  # rectangles of a picture
_DIFFERENT = 100  # pictures that are drawn; each is embedded wherever it occurs


def picture(seed: int, size: int) -> Image.Image:
    """A picture of noisy rectangles, which a codec finds as hard as a photo."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 128.0)
    for _ in range(LAYERS):
        (top, left), (height, width) = rng.integers(0, size, 2), rng.integers(size // 16, size // 2, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    return Image.fromarray((pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8))


def rows(count: int, size: int) -> list[Row]:
    """Images of ten prompts with certificates and the protected pictures beside them."""
    pictures, made = [picture(seed, size) for seed in range(_DIFFERENT)], []
    for i in range(count):
        distances = 2 + i % 9, 12 + i % 5
        before, after = (
            Certificate(f"{i}.png", "0" * 64, f"image-{i}", d, 11.0, d < 11, 1, "benchmark", 1) for d in distances
        )
        prompt = f"prompt {i * 10 // count}"
        plain, shielded, protected = (pictures[(3 * i + kind) % _DIFFERENT] for kind in range(3))
        made.append(Row(prompt, i, plain, shielded, before, after, protected, file=f"{i}.png"))
    return made


def trace(count: int, steps: int = 25) -> list[dict[str, object]]:
    """One row per step and image, the middle third with a push."""
    return [
        {
            "step": step,
            "image": image,
            "noise_level": 1 - step / steps,
            "active": int(8 < step < 17),
            "push": 3.0 if 8 < step < 17 else 0.0,
            "score_ratio": 0.01,
            "nearest_id": f"image-{image}",
            "released": 8 < step < 12,
        }
        for step in range(steps)
        for image in range(count)
    ]


def opened(path: Path, repeats: int) -> list[float]:
    """Seconds from the address to two drawn frames, each time in a fresh browser."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    seconds = []
    with sync_playwright() as driver:
        for _ in range(repeats):
            browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.evaluate(OPENED)
            seconds.append(time.perf_counter() - start)
            browser.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Size of a report and time to open it.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="keep the page in this file")
    args = parser.parse_args()
    made, steps = rows(args.images, args.size), trace(args.images)
    certificates = [vars(row.certificate_with) for row in made]
    report = {
        "prompt": "ten prompts",
        "n": args.images,
        "radius": 11.0,
        "leaks_without": args.images,
        "leaks_with": 0,
        "certificates": certificates,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = (args.out or Path(folder) / "report.html").resolve()
        start = time.perf_counter()
        write_report(path, report, made, None, steps, {"protected": "my-set", "radius": 11.0})
        print(f"{args.images} images of {args.size} pixels, three pictures each")
        print(f"written in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
        seconds = opened(path, args.repeats)
        print(f"opened in {statistics.median(seconds):.2f} s (median of {args.repeats}; slowest {max(seconds):.2f} s)")


if __name__ == "__main__":
    main()
