"""The sampler of EDM2 with guidance: stochastic Heun, guidance inside it by linear interpolation."""

import pytest
import torch

from helpers.ideal import POINTS, Ideal, nearest
from shielded import Guided, RepelledDenoiser, Spell

RADIUS = 3.0
CLASS = POINTS[:8]


def edm_sampler(net, noise, labels=None, gnet=None, guidance=1.0, steps=18, churn=0.0, generator=None):
    """Karras et al., EDM, 2022, Algorithm 2 and Equation 5, guided as in EDM2 (2024)."""
    first, last, rho = 80.0, 0.002, 7

    def denoise(x, sigma):
        x0 = net(x, sigma, labels)
        return x0 if guidance == 1 else torch.lerp(gnet(x, sigma, labels), x0, guidance)

    ramp = torch.linspace(0, 1, steps, dtype=noise.dtype)
    sigmas = [*((1 - ramp) * first ** (1 / rho) + ramp * last ** (1 / rho)) ** rho, torch.zeros((), dtype=noise.dtype)]
    gamma = min(churn / steps, 2**0.5 - 1)
    x = first * noise
    for i in range(steps):
        sigma, after = sigmas[i] * (1 + gamma), sigmas[i + 1]
        if gamma > 0:
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + (sigma**2 - sigmas[i] ** 2).sqrt() * fresh
        slope = (x - denoise(x, sigma)) / sigma
        end = x + (after - sigma) * slope
        if after > 0:
            slope = (slope + (end - denoise(end, after)) / after) / 2
            end = x + (after - sigma) * slope
        x = end
    return x


def run(net, dtype=torch.float32, **options):
    noise = torch.randn(12, *POINTS.shape[1:], generator=torch.Generator().manual_seed(0))
    return edm_sampler(net, noise.to(dtype), generator=torch.Generator().manual_seed(1), **options)


def spell():
    return Spell(POINTS, RADIUS, overcompensation=1.0, batch=False)


@pytest.mark.parametrize("churn", [0, 10])
@pytest.mark.parametrize("guidance", [1.0, 1.4, 2.0])
def test_guided_is_the_samplers_own_guidance(guidance, churn):
    net, gnet = Ideal(CLASS), Ideal()
    inside = run(net, gnet=gnet, guidance=guidance, churn=churn)
    assert torch.equal(run(Guided(net, gnet, guidance), churn=churn), inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("churn", [0, 10])
@pytest.mark.parametrize("guidance", [1.0, 1.4, 2.0])
def test_shields(guidance, churn, dtype):
    """The guided model memorises too: where net and gnet agree, guidance changes nothing."""
    model = Guided(Ideal(CLASS), Ideal(), guidance)
    assert nearest(run(model, dtype, churn=churn)).max() <= 1e-3
    kept = run(RepelledDenoiser(model, spell()), dtype, churn=churn)
    assert kept.dtype == dtype
    assert nearest(kept).min() >= RADIUS * (1 - 1e-4)
    assert nearest(kept).max() <= RADIUS * (1 + 1e-4)  # on the shell, so Δ was not multiplied by the guidance


def test_wrapping_the_net_alone_multiplies_the_correction():
    """What `Guided` is for: inside the sampler's own guidance, a correction of r moves the sample by guidance · r."""
    wrong = run(RepelledDenoiser(Ideal(CLASS), spell()), gnet=Ideal(CLASS), guidance=2.0)
    assert nearest(wrong, CLASS).max() > 1.5 * RADIUS


def test_guided_x0_is_what_is_measured():
    """Net and guide are both outside the shield, their guided x0 is on its center."""
    center = POINTS[0]
    step = 4 * torch.ones_like(center) / center.numel() ** 0.5

    def net(x, sigma, labels):
        return (center - step).expand_as(x)

    def gnet(x, sigma, labels):
        return (center - 2 * step).expand_as(x)

    alone = RepelledDenoiser(net, Spell(center[None], RADIUS, overcompensation=1.0, batch=False))
    assert nearest(run(alone, gnet=gnet, guidance=2.0), center[None]).max() <= 1e-3
    guided = RepelledDenoiser(Guided(net, gnet, 2.0), Spell(center[None], RADIUS, overcompensation=1.0, batch=False))
    assert nearest(run(guided), center[None]).min() >= RADIUS * (1 - 1e-4)


def test_labels_reach_both_nets():
    seen = []

    def net(x, sigma, labels):
        seen.append(labels)
        return Ideal()(x, sigma)

    labels = torch.eye(12)
    run(RepelledDenoiser(Guided(net, net, 1.5), spell()), labels=labels, steps=2)
    assert len(seen) == 6
    assert all(given is labels for given in seen)
