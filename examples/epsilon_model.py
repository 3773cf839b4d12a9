"""DiT, MDTv2 and pixel-space models: epsilon at a timestep, with a learned variance, as a denoiser D(x; sigma).

`as_denoiser` is all that such a model needs. In the sampling code of DiT and MDT (`p_sample_loop`, `ddim_sample_loop`)
the same place is an argument; their guided forward doubles the batch and reads the first n images alone:

    clip_denoised=False, denoised_fn=lambda x0: torch.cat([x0[:n] + spell(x0[:n]), x0[n:]])
"""

from itertools import pairwise

import torch

from shielded import RepelledDenoiser, Spell

RADIUS = 3.0
IMAGES = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1  # pixels from −1 to 1
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)


def model(x, timestep):
    """Stand-in for the trained network: predicts the noise of 16 memorised images and a variance, 2 · 3 channels."""
    alpha, sigma = ALPHAS_CUMPROD[timestep].sqrt(), (1 - ALPHAS_CUMPROD[timestep]).sqrt()
    gaps = torch.cdist(x.flatten(1) / alpha, IMAGES.flatten(1)) ** 2
    x0 = (torch.softmax(-gaps * alpha**2 / (2 * sigma**2), dim=1) @ IMAGES.flatten(1)).view_as(x)
    return torch.cat([(x - alpha * x0) / sigma, torch.zeros_like(x)], dim=1)


def as_denoiser(model, alphas_cumprod):
    """Return D(x; sigma) of a model that predicts epsilon of x / √(1 + σ²) at a timestep, without its variance."""
    sigmas = (1 / alphas_cumprod - 1).sqrt()

    def denoise(x, sigma):
        timestep = (sigmas - sigma).abs().argmin()
        epsilon = model(x / (1 + sigma**2).sqrt(), timestep)[:, : x.shape[1]]
        return x - sigma * epsilon

    return denoise, sigmas


def euler(denoiser, x, sigmas):
    for sigma, after in pairwise(sigmas):
        x = x + (after - sigma) / sigma * (x - denoiser(x, sigma))
    return x


denoiser, sigmas = as_denoiser(model, ALPHAS_CUMPROD)
steps = torch.cat([sigmas[torch.linspace(999, 0, 40).long()], torch.zeros(1)])
noise = steps[0] * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
spell = Spell(IMAGES, RADIUS, overcompensation=1.0, batch=False)
for name, model_x0 in (("without SPELL", denoiser), ("with SPELL", RepelledDenoiser(denoiser, spell))):
    distances = torch.cdist(euler(model_x0, noise, steps).flatten(1), IMAGES.flatten(1)).min(dim=1).values
    print(f"{name}: {distances.min():.2f} to {distances.max():.2f} from the training images, radius {RADIUS}")
