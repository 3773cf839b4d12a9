"""All samplers of k-diffusion as it is on PyPI, on a model that memorises 64 points."""

import inspect

import pytest
import torch

from helpers.ideal import POINTS, Ideal, closest_pair, nearest
from helpers.k_diffusion import sampling
from shielded import RepelledDenoiser, Spell

# torchsde finds that its caller asks for times a rounding outside its interval.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")

RADIUS = 3.0
SIGMA_MIN, SIGMA_MAX = 0.002, 40.0
# These stop at sigma_min, and LMS extrapolates into the last step, so some of the last noise is left.
LEFT = {"sample_dpm_adaptive", "sample_dpm_fast", "sample_lms"}


SAMPLERS = [name for name, _ in inspect.getmembers(sampling, inspect.isfunction) if name.startswith("sample_")]


def sample(name, model, batch, seed=0):
    """The package draws from the global generator; it is put back afterwards."""
    sampler = getattr(sampling, name)
    parameters = inspect.signature(sampler).parameters
    if "sigmas" in parameters:
        schedule = {"sigmas": sampling.get_sigmas_karras(20, SIGMA_MIN, SIGMA_MAX)}
    else:
        schedule = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
    if "n" in parameters:
        schedule["n"] = 60
    x = SIGMA_MAX * torch.randn(batch, *POINTS.shape[1:], generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sampler(model, x, disable=True, **schedule)


def tolerance(name):
    """What the sampler itself leaves: noise of sigma_min, at both ends of a distance."""
    return 2 * SIGMA_MIN * POINTS[0].numel() ** 0.5 if name in LEFT else 1e-4 * RADIUS


def test_all_samplers_are_run():
    assert len(SAMPLERS) == 13
    assert set(SAMPLERS) >= LEFT


@pytest.mark.parametrize("name", SAMPLERS)
def test_shields(name):
    plain = sample(name, Ideal(), batch=16)
    assert nearest(plain).max() <= tolerance(name)
    spell = Spell(POINTS, RADIUS, overcompensation=1.0, batch=False)
    samples = sample(name, RepelledDenoiser(Ideal(), spell), batch=16)
    kept = nearest(samples)
    assert kept.min() >= RADIUS - tolerance(name)
    assert kept.max() <= RADIUS + 2 * tolerance(name)  # with λ = 1, on the shell
    assert not any(row["unresolved"] for row in spell.trace)
    assert nearest(spell.finish(samples)).min() >= RADIUS * (1 - 1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_shields_with_overcompensation(name):
    spell = Spell(POINTS, RADIUS, batch=False)
    kept = nearest(sample(name, RepelledDenoiser(Ideal(), spell), batch=16))
    assert kept.min() >= RADIUS - tolerance(name)
    assert kept.min() > RADIUS + 0.1 or name in LEFT


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch(name):
    """Six samples of a model that knows three points have to share them."""
    model = Ideal(POINTS[:3])
    assert closest_pair(sample(name, model, batch=6)) <= tolerance(name)
    spell = Spell(radius=RADIUS, overcompensation=1.0)
    assert closest_pair(sample(name, RepelledDenoiser(model, spell), batch=6)) >= RADIUS - tolerance(name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_correction_changes_nothing(name):
    spell = Spell(POINTS + 100, RADIUS, batch=False)
    assert torch.equal(sample(name, RepelledDenoiser(Ideal(), spell), batch=4), sample(name, Ideal(), batch=4))
