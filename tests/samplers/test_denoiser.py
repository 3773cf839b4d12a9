import copy
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing

from helpers.ideal import POINTS, Ideal
from shielded import Spell
from shielded.samplers import Guided, RepelledDenoiser


class Shift:
    """A correction that is the same at every evaluation, and notes what it is told."""

    def __init__(self, delta=0.0):
        self.delta = delta
        self.calls = []

    def __call__(self, x0, *, noise, alpha, sigma):
        self.calls.append((x0, noise, alpha, sigma))
        return torch.zeros_like(x0) + self.delta


def schedule(steps=8):
    return torch.cat([torch.linspace(20**0.5, 0.01**0.5, steps) ** 2, torch.zeros(1)])


def sample_euler(model, x, sigmas):
    """k-diffusion's convention: sigma is a tensor (B,)."""
    ones = x.new_ones(len(x))
    for sigma, after in pairwise(sigmas):
        x = x + (x - model(x, sigma * ones)) / sigma * (after - sigma)
    return x


def sample_heun(model, x, sigmas):
    """EDM2's convention: sigma is a scalar tensor."""
    for sigma, after in pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        moved = x + (after - sigma) * slope
        if after > 0:
            slope = (slope + (moved - model(moved, after)) / after) / 2
        x = x + (after - sigma) * slope
    return x


def noise(rows=4, dtype=torch.float32):
    return (20 * torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_zero_correction_changes_nothing(sampler):
    plain = sampler(Ideal(), noise(), schedule())
    assert torch.equal(sampler(RepelledDenoiser(Ideal(), Shift()), noise(), schedule()), plain)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_sample_lands_on_the_corrected_x0(sampler):
    """The last evaluation alone decides the end, in Euler as in Heun."""
    delta = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    shift = Shift(delta)
    end = sampler(RepelledDenoiser(Ideal(), shift), noise(), schedule())
    expected = shift.calls[-1][0] + delta
    assert (end - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(shift.calls) == (8 if sampler is sample_euler else 15)  # every evaluation


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_shield_keeps_a_memorising_model_away(sampler):
    """One ball around the target that the plain run returns, left along the line to its center."""

    def leave(x0, *, noise, alpha, sigma):
        offset = x0 - center
        distance = offset.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        direction = torch.where(distance > 1e-4, offset / distance.clamp(min=1e-4), noise / noise.norm())
        return (radius - distance).clamp(min=0) * direction

    x, radius = noise(1), 2.0
    plain = sampler(Ideal(), x, schedule())
    gaps = (POINTS - plain).flatten(1).norm(dim=1)
    center = POINTS[gaps.argmin()]
    assert gaps.min() < 1e-3
    kept = sampler(RepelledDenoiser(Ideal(), leave), x, schedule())
    assert (kept - center).norm() >= radius - 1e-4


@pytest.mark.parametrize("sigma", [2.5, torch.tensor(2.5), torch.full((4,), 2.5), torch.full((4,), 2.5).double()])
def test_what_the_spell_is_told(sigma):
    shift, x = Shift(), noise()
    x0 = RepelledDenoiser(Ideal(), shift)(x, sigma)
    ((seen, predicted, alpha, level),) = shift.calls
    assert torch.equal(seen, x0)
    assert (alpha, level) == (1.0, 2.5)
    assert isinstance(level, float)
    assert torch.allclose(predicted * 2.5 + seen, x, rtol=1e-5, atol=1e-5)


def test_no_noise_at_sigma_zero():
    shift = Shift()
    RepelledDenoiser(lambda x, sigma: x, shift)(noise(), 0.0)
    assert torch.equal(shift.calls[0][1], torch.zeros_like(noise()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_untouched_rows(dtype):
    delta = torch.zeros(4, 3, 4, 4)
    delta[1] = 1.0
    own = Ideal()(noise(dtype=dtype), 1.0)
    shift = Shift(delta)
    x0 = RepelledDenoiser(Ideal(), shift)(noise(dtype=dtype), 1.0)
    assert x0.dtype == dtype
    assert shift.calls[0][0].dtype == shift.calls[0][1].dtype == torch.float32
    assert torch.equal(x0[[0, 2, 3]], own[[0, 2, 3]])
    assert torch.allclose(x0[1].double(), own[1].double() + 1, rtol=2 * torch.finfo(dtype).eps)


def test_zero_correction_hands_on_the_same_bits():
    own = noise()
    assert torch.equal(RepelledDenoiser(lambda x, sigma: own, Shift())(noise(), 1.0), own)


def test_arguments_are_passed_on():
    def denoiser(x, sigma, labels, *, scale):
        return labels * scale

    assert torch.equal(RepelledDenoiser(denoiser, Shift())(noise(), 1.0, noise(), scale=2), 2 * noise())


def test_attributes_are_the_denoisers():
    model = RepelledDenoiser(Guided(Ideal(), Ideal(), 2.0), Shift())
    assert (model.sigma_min, model.sigma_max, model.img_channels) == (0.01, 20.0, 3)
    assert copy.deepcopy(model).sigma_min == 0.01
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_rows_of_different_noise():
    with pytest.raises(ValueError, match="sigma must be the same for all rows"):
        RepelledDenoiser(Ideal(), Shift())(noise(), torch.tensor([1.0, 1.0, 2.0, 1.0]))


def test_x0_must_be_finite():
    model = RepelledDenoiser(lambda x, sigma: x * float("nan"), Spell(radius=1.0))
    with pytest.raises(ValueError, match="NaN"):
        model(noise(), 3.0)


@pytest.mark.parametrize("guidance", [1, 0.5, 2.0])
def test_guidance_is_inside(guidance):
    """The spell sees the guided x0, and its correction is not multiplied by the guidance weight."""
    net, weak, x = Ideal(POINTS[:3]), Ideal(POINTS[3:]), noise()
    expected = weak(x, 5.0) + guidance * (net(x, 5.0) - weak(x, 5.0))
    shift = Shift(1.0)
    x0 = RepelledDenoiser(Guided(net, weak, guidance), shift)(x, 5.0)
    assert torch.allclose(shift.calls[0][0], expected, atol=1e-5)
    assert torch.allclose(x0, expected + 1, atol=1e-5)


def test_guidance_of_one_does_not_call_the_guide():
    assert torch.equal(Guided(Ideal(), None, 1)(noise(), 1.0), Ideal()(noise(), 1.0))


def test_guide_of_another_dtype():
    def half(x, sigma):
        return Ideal()(x, sigma).half()

    assert Guided(Ideal(), half, 2.0)(noise(), 1.0).dtype == torch.float32


def test_compiled_model():
    """The correction stays outside the compiled graph, which is neither broken nor compiled again by it."""
    net = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    references = net(noise())
    for radius in (0.01, 5.0):
        spell, other = (Spell(references, radius, batch=False, radius_schedule="constant") for _ in range(2))
        x0 = RepelledDenoiser(lambda x, sigma: compiled(x), spell)(noise() + 0.1, 2.0)
        plain = RepelledDenoiser(lambda x, sigma: net(x), other)(noise() + 0.1, 2.0)
        assert torch.equal(x0, plain)
    assert spell.trace[0]["active"] == 1
    assert counter.frame_count == 1
