"""Coupled initial noise: each N(0, I), any two of a group with correlation −1/(G−1)."""

import pytest
import torch

from shielded.generation import generate
from shielded.generation.noise import CoupledNoise
from shielded.models import load


def gaussian(count, size=200_000, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("group", [2, 3, 5, 8])
def test_covariance_is_that_of_the_centred_noise(group):
    """Against the closed form: √(G/(G−1)) (g_i − mean g) has covariance (G δ_ij − 1)/(G − 1)."""
    found = CoupledNoise(group)(gaussian(group))
    expected = (group * torch.eye(group, dtype=torch.float64) - 1) / (group - 1)
    assert torch.cov(found) == pytest.approx(expected, abs=0.015)
    assert found.mean(dim=1).abs().max() < 0.01
    assert found.sum(dim=0).abs().max() < 1e-9


def test_a_row_keeps_its_distribution():
    """The fourth moment of a Gaussian is three."""
    found = CoupledNoise(4)(gaussian(4))
    assert found.square().mean(dim=1) == pytest.approx(torch.ones(4, dtype=torch.float64), abs=0.02)
    assert found.pow(4).mean(dim=1) == pytest.approx(3 * torch.ones(4, dtype=torch.float64), abs=0.1)


def test_one_at_a_time_is_the_same_as_a_batch():
    noise = gaussian(6, 100)
    batch, single = CoupledNoise(6)(noise), CoupledNoise(6)
    assert torch.equal(torch.cat([single(row[None]) for row in noise]), batch)


def test_groups_follow_each_other_independently():
    noise = gaussian(6, 50)
    both = CoupledNoise(3)(noise)
    assert torch.equal(both[3:], CoupledNoise(3)(noise[3:]))
    assert both[:3].sum(dim=0).abs().max() < 1e-12


def test_alone_nothing_changes():
    noise = gaussian(2, 10)
    assert CoupledNoise(1)(noise) is noise
    with pytest.raises(ValueError, match="at least one"):
        CoupledNoise(0)


def test_generate_couples_the_images_of_a_prompt(monkeypatch):
    """In one batch and one image at a time; the noise of one prompt sums to zero, the first image is the plain one."""
    pipe = load("emoji", "cpu")
    seen = []
    step = type(pipe.scheduler).step

    def watched(self, model_output, timestep, sample, *args, **kwargs):
        if timestep == self.timesteps[0]:
            seen.append(sample.clone())
        return step(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", watched)
    prompts, seeds = ["owl", "owl", "tiger", "owl"], [1, 2, 3, 4]
    plain = generate(pipe, prompts, seeds, steps=1, progress=False)
    batch = generate(pipe, prompts, seeds, steps=1, progress=False, couple=True)
    single = generate(pipe, prompts, seeds, steps=1, batch_size=1, progress=False, couple=True)
    first, coupled = seen[:2]
    assert torch.equal(torch.cat(seen[2:]), coupled)
    assert coupled[[0, 1, 3]].sum(dim=0).abs().max() < 1e-5
    assert torch.equal(coupled[[0, 2]], first[[0, 2]])
    assert torch.equal(batch.latents[[0, 2]], plain.latents[[0, 2]])
    assert torch.allclose(single.latents, batch.latents, atol=1e-4)
