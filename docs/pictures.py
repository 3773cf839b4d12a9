"""Draws the pictures of the documentation with the package's own code.

python docs/pictures.py                  # shields.svg and overlap.svg; needs matplotlib
python docs/pictures.py --demo demo      # overview.webp
python docs/pictures.py --report hearts  # report.png, from `shielded generate "red heart" -n 8 --out hearts`
python docs/pictures.py --studio         # studio.png; the last two need playwright and a Chromium
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.patches import Circle
from PIL import Image
from torch import Tensor

from shielded import Certificate, RepelledDenoiser, Spell, repellency
from shielded.files import replacing
from shielded.runs.report import Row, protection_grid, stack

BLUE, ORANGE, GREY = "#2563a8", "#c2410c", "#6b7280"
matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "shielded", "svg.fonttype": "path", "font.size": 10, "axes.titlesize": 11}


def shields() -> pyplot.Figure:
    """x0 step by step in a plane of eight memorised images, three of them protected."""
    angle = torch.arange(8) * torch.pi / 4
    images = torch.stack([angle.cos(), angle.sin()], dim=1) * torch.tensor([2.0, 1.6])
    protected, radius = images[[0, 3, 6]], 0.55
    noise = torch.randn(24, 2, generator=torch.Generator().manual_seed(3))

    def memory(x: Tensor, sigma: Tensor) -> Tensor:
        """The ideal denoiser of the images: E[x0 | x] for x = x0 + sigma · noise."""
        return torch.softmax(-(torch.cdist(x, images) ** 2) / (2 * sigma**2), dim=1) @ images

    def path(spell: Spell | None) -> Tensor:
        """(steps, B, 2): x0 at each step of Euler's method, after the correction."""
        denoiser = memory if spell is None else RepelledDenoiser(memory, spell)
        sigmas = torch.cat([torch.logspace(1.2, -1.5, 60), torch.zeros(1)])
        x, seen = sigmas[0] * noise, []
        for sigma, after in pairwise(sigmas):
            x0 = denoiser(x, sigma)
            x = x + (after - sigma) / sigma * (x - x0)
            seen.append(x0)
        return torch.stack(seen)

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    spell = Spell(protected, radius, overcompensation=1.0, batch=False)
    for ax, title, x0 in zip(axes, ("without SPELL", "with SPELL, λ = 1"), (path(None), path(spell)), strict=True):
        for center in protected.tolist():
            ax.add_patch(Circle(center, radius, facecolor=ORANGE, alpha=0.15))
        for i in range(x0.shape[1]):
            ax.plot(*x0[:, i].T, color=BLUE, linewidth=0.8, alpha=0.7)
        ax.plot(*x0[-1].T, "o", color=BLUE, markersize=5)
        ax.plot(*images.T, "x", color=GREY, markersize=6)
        ax.plot(*protected.T, "x", color=ORANGE, markersize=6, markeredgewidth=2)
        _plain(ax, title)
    return figure


def overlap() -> pyplot.Figure:
    """The correction of points between two overlapping shields, by the paper's sum and by the smallest move."""
    centers, radius = torch.tensor([[-0.6, 0.0], [0.6, 0.0]]), 1.0
    across = torch.linspace(-1.35, 1.35, 10)
    x0 = torch.cartesian_prod(across, torch.tensor([-0.55, -0.2, 0.2, 0.55]))
    x0 = x0[(torch.cdist(x0, centers) < radius).any(dim=1)]
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.1), layout="constrained")
    for ax, how, title in zip(axes, ("sum", "project"), ("the paper's sum", "the smallest move"), strict=True):
        end = x0 + repellency(x0, centers, radius, overlap=how)
        inside = (torch.cdist(end, centers) < radius - 1e-4).any(dim=1)
        for center in centers.tolist():
            ax.add_patch(Circle(center, radius, facecolor=ORANGE, edgecolor=ORANGE, alpha=0.15))
        for start, stop, failed in zip(x0.tolist(), end.tolist(), inside.tolist(), strict=True):
            color = ORANGE if failed else BLUE
            ax.annotate("", stop, start, arrowprops={"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0})
            ax.plot(*stop, "o", color=color, markersize=4)
        _plain(ax, f"{title}: {int(inside.sum())} of {len(x0)} still inside")
        ax.set(xlim=(-2.2, 2.2), ylim=(-1.35, 1.35))
    return figure


def overview(demo: Path) -> Image.Image:
    """Two seeds of each prompt of the demo without and with protection, above its images of one prompt."""
    report = json.loads((demo / "report.json").read_text())
    before = {entry["image"]: entry for entry in report["certificates_without"]}
    chosen = [entry for entry in report["certificates"] if entry["image"].endswith(("-0.png", "-1.png"))]
    rows = [
        Row(
            "the upper pictures are protected, and the same seeds run again",
            entry["seed"],
            Image.open(demo / "without" / entry["image"]),
            Image.open(demo / "with" / entry["image"]),
            Certificate(**before[entry["image"]]),
            Certificate(**entry),
        )
        for entry in chosen
    ]
    return stack([protection_grid(rows, report["radius"]), Image.open(demo / "diversity.png")])


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def browser_page(height: int) -> Iterator[Any]:
    """A page in a headless Chromium."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
        browser.close()


def report(run: Path, file: Path) -> None:
    """The report of a run, down to its first pictures."""
    with browser_page(1240) as page:
        page.goto((run / "report.html").resolve().as_uri())
        page.screenshot(path=file)


def studio(file: Path) -> None:
    """The studio after two runs: the second keeps away from the pictures of the first."""
    from shielded.studio.page import LAUNCH, build

    app = build().queue()
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    with browser_page(1300) as page:
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_label("number input for Steps").fill("25")
        generate = page.get_by_role("button", name="Generate", exact=True)
        generate.click()
        page.locator("#summary").get_by_text("apart without").wait_for()
        page.get_by_role("button", name="Protect the images made without SPELL").click()
        page.locator("#status").get_by_text("4 of your pictures").wait_for()
        generate.click()
        page.locator("#summary").get_by_text("to a protected image").wait_for()
        page.wait_for_timeout(1000)  # until the pictures have come
        page.screenshot(path=file, full_page=True)
    app.close()


def _plain(ax: pyplot.Axes, title: str) -> None:
    ax.set(title=title, xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_color("#d1d5db")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--demo", type=Path, help="what `shielded demo` wrote; without it, the drawings")
    parser.add_argument("--report", type=Path, help="what `shielded generate` wrote")
    parser.add_argument("--studio", action="store_true", help="start a studio and use it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.demo:
        with replacing(args.out / "overview.webp") as draft:
            overview(args.demo).save(draft, format="WebP", quality=90)
        return
    if args.report:
        report(args.report, args.out / "report.png")
    if args.studio:
        studio(args.out / "studio.png")
    if args.report or args.studio:
        return
    for draw in (shields, overlap):
        with replacing(args.out / f"{draw.__name__}.svg") as draft:
            draw().savefig(draft, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
