"""The ideal denoiser of a finite set: it memorises perfectly, so what a shield does to it is known beforehand."""

import torch

POINTS = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # the closest two are 6.6 apart


class Ideal:
    """E[x0 | x] for x = x0 + sigma · noise with x0 drawn from the points; every sample ends on one of them."""

    sigma_min, sigma_max, img_channels = 0.01, 20.0, 3

    def __init__(self, points=POINTS):
        self.points = points

    def __call__(self, x, sigma, labels=None):
        gaps = torch.cdist(x.double().flatten(1), self.points.double().flatten(1)).square()
        weights = torch.softmax(-gaps / (2 * torch.as_tensor(sigma).double().view(-1, 1) ** 2), dim=1)
        return (weights @ self.points.double().flatten(1)).view_as(x).to(x.dtype)


def nearest(samples, points=POINTS):
    """(B,) distances to the closest of the points."""
    return torch.cdist(samples.double().flatten(1), points.double().flatten(1)).min(dim=1).values


def closest_pair(samples):
    return torch.pdist(samples.double().flatten(1)).min().item()
