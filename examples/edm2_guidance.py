"""EDM2: its sampler guides inside itself, where a correction would be multiplied. `Guided` moves guidance outside.

With the published code: edm_sampler(RepelledDenoiser(Guided(net, gnet, 1.4), spell), noise, labels, guidance=1)
"""

from itertools import pairwise

import torch

from shielded import Guided, RepelledDenoiser, Spell

RADIUS = 3.0
IMAGES = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.eye(2).repeat(16, 1)


def net(x, sigma, labels=None):
    """Stand-in for the trained network: the ideal denoiser of 32 memorised images in two classes."""
    gaps = torch.cdist(x.flatten(1), IMAGES.flatten(1)) ** 2
    if labels is not None:
        gaps = gaps.masked_fill(labels @ CLASSES.T == 0, float("inf"))
    return (torch.softmax(-gaps / (2 * sigma**2), dim=1) @ IMAGES.flatten(1)).view_as(x)


def gnet(x, sigma, labels=None):
    """Guiding network: the same denoiser without labels."""
    return net(x, sigma)


def heun(denoiser, noise, labels, steps=20):
    """Karras et al., EDM, 2022, Algorithm 1: deterministic, second order."""
    sigmas = torch.cat([torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7, torch.zeros(1)])
    x = sigmas[0] * noise
    for sigma, after in pairwise(sigmas):
        slope = (x - denoiser(x, sigma, labels)) / sigma
        end = x + (after - sigma) * slope
        if after > 0:
            slope = (slope + (end - denoiser(end, after, labels)) / after) / 2
            end = x + (after - sigma) * slope
        x = end
    return x


noise = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
labels = torch.eye(2).repeat(4, 1)
guided = Guided(net, gnet, guidance=1.4)
spell = Spell(IMAGES, RADIUS, overcompensation=1.0, batch=False)
for name, denoiser in (("without SPELL", guided), ("with SPELL", RepelledDenoiser(guided, spell))):
    distances = torch.cdist(heun(denoiser, noise, labels).flatten(1), IMAGES.flatten(1)).min(dim=1).values
    print(f"{name}: {distances.min():.2f} to {distances.max():.2f} from the training images, radius {RADIUS}")
