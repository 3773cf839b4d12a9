"""Pictures made from numbers: dead leaves with textures, clouds, fractals, waves, and mixtures of them.

    python training/procedural.py --count 12000 --out runs/pictures.npy

They stand in for photographs in the training of the copy descriptor: regions of all sizes with sharp and soft edges, a
falling spectrum, few colours to a picture.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 96
_DRAWN = 144  # side in pixels at which leaves are drawn before they are made smaller


def palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw `count` colours (count, 3) in 0..1 around one or two hues."""
    hue, spread, saturation = rng.random(), rng.choice([0.03, 0.1, 0.5]), rng.beta(1.3, 2.5)
    return np.array(
        [
            colorsys.hsv_to_rgb(
                (hue + spread * rng.normal()) % 1, np.clip(saturation + 0.15 * rng.normal(), 0, 1), rng.beta(1.2, 1.1)
            )
            for _ in range(count)
        ]
    )


def coloured(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Map values (h, w) in 0..1 through a random palette to (h, w, 3)."""
    colours = palette(rng, int(rng.integers(2, 6)))
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(values, stops, colours[:, i]) for i in range(3)], axis=-1)


def scaled(values: np.ndarray) -> np.ndarray:
    """Scale values to 0..1."""
    return (values - values.min()) / (np.ptp(values) + 1e-9)


def spectral(rng: np.random.Generator, side: int, power: float) -> np.ndarray:
    """Draw noise (side, side) in 0..1 whose amplitude falls as 1 / frequency^power, stretched along one direction."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    stretch = np.exp(0.5 * rng.normal())
    frequency = np.hypot(fy * stretch, fx / stretch)
    frequency[0, 0] = 1
    noise = np.fft.rfft2(rng.normal(size=(side, side))) / frequency**power
    noise[0, 0] = 0
    return scaled(np.fft.irfft2(noise, s=(side, side)))


def clouds(rng: np.random.Generator) -> np.ndarray:
    values = spectral(rng, SIDE, rng.uniform(0.8, 2.2))
    if rng.random() < 0.3:
        values = np.abs(2 * values - 1)
    if rng.random() < 0.3:
        values = scaled(1 / (1 + np.exp(-rng.uniform(5, 30) * (values - 0.5))))
    picture = coloured(values, rng)
    if rng.random() < 0.4:
        picture = 0.8 * picture + 0.2 * coloured(spectral(rng, SIDE, rng.uniform(0.5, 1.5)), rng)
    return picture


def landscape(rng: np.random.Generator) -> np.ndarray:
    """Draw layers of ground, each with its own texture, below a soft sky."""
    height = np.linspace(0, 1, SIDE)[:, None] + 0.15 * (spectral(rng, SIDE, 2.0) - 0.5)
    picture = coloured(np.clip(height, 0, 1), rng)
    for level in np.sort(rng.uniform(0.2, 1.0, int(rng.integers(1, 5)))):
        line = level + rng.uniform(0.02, 0.3) * (spectral(rng, SIDE, rng.uniform(1.2, 2.2))[0] - 0.5)
        ground = np.linspace(0, 1, SIDE)[:, None] > line[None]
        texture = clouds(rng)
        picture = np.where(ground[..., None], rng.uniform(0.4, 1) * texture + 0.3 * palette(rng, 1), picture)
    return picture


def waves(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    bend = spectral(rng, SIDE, 2.0)
    values = np.zeros((SIDE, SIDE))
    for _ in range(int(rng.integers(1, 4))):
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(2, 25)
        wave = np.sin(
            2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 0.3) * bend)
            + rng.uniform(0, 6)
        )
        values = values + (np.sign(wave) if rng.random() < 0.4 else wave)
    return coloured(scaled(values), rng)


def julia(rng: np.random.Generator) -> np.ndarray:
    angle, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.5)
    c = 0.7885 * np.exp(1j * angle) if rng.random() < 0.6 else complex(*rng.uniform(-0.9, 0.5, 2))
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j] * zoom
    z = (x + 1j * y) * np.exp(1j * rng.uniform(0, 6)) + complex(*rng.uniform(-0.5, 0.5, 2))
    count = np.zeros(z.shape)
    for _ in range(30):
        alive = np.abs(z) < 4
        z = np.where(alive, z * z + c, z)
        count += alive
    return coloured(scaled(count + rng.uniform(0, 1) * np.clip(np.abs(z), 0, 8)) ** rng.uniform(0.3, 1.5), rng)


def flame(rng: np.random.Generator) -> np.ndarray:
    """Draw the attractor of a random system of affine maps, by the chaos game with many points at once."""
    maps = rng.uniform(-1, 1, (int(rng.integers(2, 6)), 2, 3))
    maps[:, :, :2] *= 0.9 / np.linalg.svd(maps[:, :, :2], compute_uv=False)[:, :1, None].clip(0.9)
    points, total = rng.uniform(-1, 1, (1500, 2)), np.zeros((SIDE, SIDE))
    seen = []
    for step in range(24):
        chosen = maps[rng.integers(len(maps), size=len(points))]
        points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
        if step > 6:
            seen.append(points)
    seen = np.concatenate(seen)
    low, high = np.percentile(seen, [1, 99], axis=0)
    cells = ((seen - low) / (high - low + 1e-6) * SIDE).astype(int)
    cells = cells[((cells >= 0) & (cells < SIDE)).all(axis=1)]
    np.add.at(total, (cells[:, 0], cells[:, 1]), 1)
    density = scaled(np.log1p(total))[..., None]
    background = smooth(rng) if rng.random() < 0.7 else np.broadcast_to(palette(rng, 1), (SIDE, SIDE, 3))
    return background * (1 - density) + coloured(density[..., 0], rng) * density


def smooth(rng: np.random.Generator) -> np.ndarray:
    """Draw soft spots on a gradient, as what is out of focus."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle = rng.uniform(0, 2 * np.pi)
    picture = coloured(scaled(x * np.cos(angle) + y * np.sin(angle)), rng)
    for colour in palette(rng, int(rng.integers(0, 8))):
        cy, cx, size = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.4)
        spot = np.exp(-((((x - cx) ** 2 + (y - cy) ** 2) / size**2) ** rng.uniform(1, 4)))[..., None]
        picture = picture * (1 - spot) + colour * spot
    return picture


def shape(rng: np.random.Generator, size: float) -> Image.Image:
    """Draw a mask (_DRAWN, _DRAWN) of one ellipse, rectangle, polygon, star-like blob or line."""
    mask = Image.new("L", (_DRAWN, _DRAWN))
    draw = ImageDraw.Draw(mask)
    cx, cy = rng.uniform(-0.1, 1.1, 2) * _DRAWN
    kind = rng.random()
    if kind < 0.3:
        a, b = size, size * rng.uniform(0.3, 1)
        draw.ellipse((cx - a, cy - b, cx + a, cy + b), fill=255)
    elif kind < 0.9:
        corners = 4 if kind < 0.55 else int(rng.integers(3, 12))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners != 4 else np.array([0.6, 2.5, 3.7, 5.7])
        angles = angles + rng.uniform(0, 2 * np.pi)
        reach = size * (rng.uniform(0.4, 1, corners) if corners != 4 else 1)
        aspect = rng.uniform(0.4, 1)
        points = np.stack([cx + reach * np.cos(angles), cy + aspect * reach * np.sin(angles)], axis=1)
        draw.polygon([tuple(point) for point in points.tolist()], fill=255)
    else:
        ends = rng.uniform(-0.2, 1.2, 4) * _DRAWN
        draw.line(tuple(ends.tolist()), fill=255, width=max(1, int(size / 8)))
    return mask


def leaves(rng: np.random.Generator, textures: list[Image.Image]) -> np.ndarray:
    """Lay shapes over each other, their sizes by a power law, each plain, textured or shaded."""
    picture = textures[rng.integers(len(textures))].copy()
    smallest, largest = rng.uniform(2, 10), rng.uniform(20, 80)
    count = int(np.exp(rng.uniform(np.log(4), np.log(120))))
    sizes = np.sort(smallest / (1 - rng.random(count) * (1 - smallest / largest)))
    colours = (255 * palette(rng, 8)).astype(int)
    textured, soft = rng.random(), rng.random() < 0.25
    for size in sizes[::-1] if rng.random() < 0.7 else rng.permutation(sizes):
        mask = shape(rng, size)
        if soft:
            mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
        if rng.random() < textured:
            picture.paste(textures[rng.integers(len(textures))], (0, 0), mask)
        else:
            picture.paste(tuple(colours[rng.integers(8)].tolist()), (0, 0, _DRAWN, _DRAWN), mask)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5)))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)) / 255


def image_of(picture: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * np.clip(picture, 0, 1)).astype(np.uint8))


def mixed(rng: np.random.Generator, textures: list[Image.Image]) -> np.ndarray:
    """Draw one picture (SIDE, SIDE, 3) in 0..1."""

    def simple() -> np.ndarray:
        kinds = (clouds, landscape, waves, julia, flame, smooth)
        return kinds[rng.choice(len(kinds), p=[0.25, 0.25, 0.1, 0.1, 0.1, 0.2])](rng)

    picture = leaves(rng, textures) if rng.random() < 0.55 else simple()
    if rng.random() < 0.35:  # two pictures with a soft or a sharp border between them
        other = leaves(rng, textures) if rng.random() < 0.4 else simple()
        edge = np.clip(rng.uniform(2, 40) * (spectral(rng, SIDE, 2.2) - rng.uniform(0.35, 0.65)) + 0.5, 0, 1)
        picture = picture * edge[..., None] + other * (1 - edge[..., None])
    if rng.random() < 0.4:  # light and shade
        picture = picture * (0.4 + 0.9 * spectral(rng, SIDE, 2.2)[..., None])
    return np.clip(rng.uniform(0.5, 1.1) * picture ** rng.uniform(0.6, 1.5) + rng.uniform(0, 0.15), 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    textures = [Image.new("RGB", (_DRAWN, _DRAWN), tuple((255 * c).astype(int).tolist())) for c in palette(rng, 20)]
    kinds = (clouds, landscape, waves, julia, flame, smooth)
    pictures = np.empty((args.count, 3, SIDE, SIDE), np.uint8)
    for i in range(args.count):
        if i % 40 == 0:  # renew the textures now and then
            textures = textures[-160:] + [
                image_of(kinds[k](rng)).resize((_DRAWN, _DRAWN), Image.Resampling.BICUBIC)
                for k in rng.integers(len(kinds), size=20)
            ]
        pictures[i] = np.asarray(image_of(mixed(rng, textures))).transpose(2, 0, 1)
        if i % 1000 == 999:
            print(f"{i + 1} pictures", flush=True)
    np.save(args.out, pictures)


if __name__ == "__main__":
    main()
