"""Build large sets of latents of real images, and the queries of a sampler, for `search.py`.

The images are photos of 256×256 pixels, encoded by the tiny autoencoders of public models (`--photos`, `--taesd`). Four
fifths of the photos are protected; the sampler knows only the others, so that its images are new.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

SPACES = {"sd1": 4, "sd3": 16, "flux1": 16}  # channels
HELD_OUT = 5  # every fifth photo
SIDE = 32  # height and width of a latent
STEPS, BATCH = 30, 8


def photos(path: Path) -> list[Image.Image]:
    packed = np.load(path)
    data, offsets = packed["data"], packed["offsets"]
    return [Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB") for a, b in pairwise(offsets)]


def encode(images: list[Image.Image], taesd: Path, space: str, size: int) -> Tensor:
    """Encode images as (N, C, size/8, size/8) float16, in the sampler's space."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(latent_channels=SPACES[space]).eval()
    weights = load_file(taesd / f"taesd_{space}_fp8.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    vae.to(memory_format=torch.channels_last)
    found = []
    with torch.no_grad():
        for image in tqdm(images, f"{space}, {size} px"):
            pixels = torch.from_numpy(np.array(image.resize((size, size), Image.LANCZOS))).permute(2, 0, 1)
            found.append(vae.encode(pixels[None].float() / 127.5 - 1).latents.half())
    return torch.cat(found).contiguous()


def real_latents(folder: Path, archive: Path, taesd: Path, space: str, size: int, count: int | None = None) -> Tensor:
    """`encode` the first photos, cached in a file."""
    file = folder / f"{space}-{size}.safetensors"
    if not file.exists():
        save_file({"latents": encode(photos(archive)[:count], taesd, space, size)}, file)
    return load_file(file)["latents"]


def windows(latents: Tensor, side: int, step: int = 1) -> Tensor:
    """Crop latents (N, C, S, S) to (N · n², C, side, side)."""
    cut = latents.unfold(2, side, step).unfold(3, side, step)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def held_out(latents: Tensor) -> Tensor:
    return latents[::HELD_OUT]


def protected_part(latents: Tensor) -> Tensor:
    return latents[torch.arange(len(latents)) % HELD_OUT != 0]


def large_set(folder: Path, archive: Path, taesd: Path, rows: int, step: int = 8192) -> Iterator[Tensor]:
    """Yield `rows` latents (·, 4, 32, 32) of Stable Diffusion 1 in random order.

    They are the whole photos and all crops of 256×256 pixels from the photos at 384×384, plain and mirrored. The rest
    are mixtures a z_1 + b z_2 of two of these with a² + b² = 1, which keeps the energy of a latent, and b² up to ½.
    Latents are cropped and mirrored, not pixels.
    """
    generator = torch.Generator().manual_seed(0)
    parts = [protected_part(real_latents(folder, archive, taesd, "sd1", size)) for size in (256, 384)]
    counts = torch.tensor([len(p) * (p.shape[-1] - SIDE + 1) ** 2 for p in parts])
    ends = counts.cumsum(0)
    total = 2 * int(ends[-1])

    views = [part.unfold(2, SIDE, 1).unfold(3, SIDE, 1) for part in parts]

    def crop(numbers: Tensor) -> Tensor:
        result = torch.empty(len(numbers), 4, SIDE, SIDE)
        which = torch.searchsorted(ends, numbers // 2, right=True)
        for n, (view, start) in enumerate(zip(views, ends - counts, strict=True)):
            of_part = (which == n).nonzero().flatten()
            across = view.shape[2]
            position = numbers[of_part] // 2 - start
            result[of_part] = view[position // across**2, :, position // across % across, position % across].float()
        mirrored = numbers % 2 == 1
        result[mirrored] = result[mirrored].flip(3)
        return result

    order = torch.randperm(max(rows, total), generator=generator)[:rows]
    for numbers in order.split(step):
        latents = crop(numbers % total)
        mixed = (numbers >= total).nonzero().flatten()
        angle = math.pi / 4 * torch.rand(len(mixed), 1, 1, 1, generator=generator)
        others = crop(torch.randint(total, (len(mixed),), generator=generator))
        latents[mixed] = angle.cos() * latents[mixed] + angle.sin() * others
        yield latents.half()


class LocalDenoiser:
    """Compute E[X_0|x_t] where each pixel sees only a patch around it, for a data set of the given images.

    Kamb and Ganguli 2024, "An analytic theory of creativity in convolutional diffusion models", the local score
    machine: each latent pixel is a mean over the same pixel of the images, weighted by how well the patches around it
    agree with the noisy patch. The patch shrinks as the noise does, so that images are new mosaics of known patches and
    go from blurred to sharp as those of a network do.
    """

    def __init__(self, images: Tensor, widest: int = 31, narrowest: int = 7) -> None:
        self.images, self.widest, self.narrowest = images.float(), widest, narrowest

    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        t = sigma / (alpha + sigma)
        width = self.narrowest + round((self.widest - self.narrowest) * t / 2) * 2
        result = []
        for state in x:
            error = (state - alpha * self.images).square().sum(1, keepdim=True)  # (M, 1, H, W)
            for sides in ((width, 1), (1, width)):  # sums over the patch around each pixel
                error = F.avg_pool2d(error, sides, 1, (sides[0] // 2, sides[1] // 2), divisor_override=1)
            weight = (-error / (2 * max(sigma, 1e-3) ** 2)).softmax(0)
            result.append((weight * self.images).sum(0))
        return torch.stack(result)


def trajectories(images: Tensor, seeds: int) -> list[dict[str, list]]:
    """Compute x0 (8, 4, 32, 32) and noise level t at each of 30 DDIM steps with Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    denoise = LocalDenoiser(images)
    runs = []
    for seed in range(seeds):
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="sample",
        )
        scheduler.set_timesteps(STEPS)
        x = torch.randn(BATCH, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        x0s, levels = [], []
        for step in scheduler.timesteps:
            alpha = float(scheduler.alphas_cumprod[step]) ** 0.5
            sigma = (1 - alpha**2) ** 0.5
            x0 = denoise(x, alpha, sigma)
            x0s.append(x0)
            levels.append(sigma / (alpha + sigma))
            x = scheduler.step(x0, step, x).prev_sample
        runs.append({"x0": x0s, "levels": levels})
    return runs
