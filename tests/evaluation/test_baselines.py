"""The baselines: the sign of each, where it acts, and that strength 0 is the untouched pipeline."""

import math

import numpy as np
import pytest
import torch

from shielded import Spell
from shielded.evaluation.baselines import (
    CADS,
    METHODS,
    FarthestNoise,
    IntervalGuidance,
    ParticleGuidance,
    SafetyGuidedFlow,
    method,
)
from shielded.evaluation.baselines.noise import farthest_candidates
from shielded.models import load

STEPS = 4
ZERO = {
    "particle": ParticleGuidance(0.0),
    "cads": CADS(0.0),
    "interval": IntervalGuidance(0.0),
    "sgf": SafetyGuidedFlow(0.0),
    "noise": FarthestNoise(0),
}
STATE = {"noise": torch.zeros(1), "alpha": 0.1, "sigma": math.sqrt(1 - 0.01)}  # early: t = 0.91


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


def run(pipe, how=None, images=2, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "generator": generators}
    if how is None:
        return pipe(["cat face"] * images, **call | options).images
    with how.attach(pipe):
        return pipe(["cat face"] * images, **call | options).images


@pytest.fixture(scope="module")
def plain(pipe):
    return run(pipe)


def outputs_of(pipe, how=None):
    """What the denoiser is given as prompt and what the pipeline gets back, step by step."""
    prompts, outputs = [], []
    original = pipe.unet.forward

    def forward(*args, **kwargs):
        prompts.append(kwargs["encoder_hidden_states"].clone())
        return original(*args, **kwargs)

    step = pipe.scheduler.step

    def watched(model_output, *args, **kwargs):
        outputs.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    pipe.unet.forward, pipe.scheduler.step = forward, watched
    try:
        run(pipe, how)
    finally:
        del pipe.unet.forward, pipe.scheduler.step
    return prompts, outputs


# Strength 0 and restoring ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZERO)
def test_strength_zero_is_the_untouched_pipeline(pipe, plain, name):
    assert torch.equal(run(pipe, ZERO[name]), plain)
    assert torch.equal(run(pipe, method(name, 0.0)), plain)


ACTIVE = {"particle": 40.0, "cads": 0.5, "interval": 0.5, "sgf": 4.0, "noise": 3.0, "spell": 30.0}


@pytest.mark.parametrize("name", ACTIVE)
def test_each_method_acts_repeats_and_leaves_the_pipeline_as_it_was(pipe, plain, name):
    how = method(name, ACTIVE[name])
    state = torch.get_rng_state()
    changed = run(pipe, how)
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.isfinite(changed).all()
    assert torch.equal(how.finished, changed)
    assert torch.equal(run(pipe, method(name, ACTIVE[name])), changed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(pipe), plain)


def test_an_error_inside_leaves_the_pipeline_as_it_was(pipe, plain):
    for name, strength in ACTIVE.items():
        with pytest.raises(KeyError), method(name, strength).attach(pipe):
            raise KeyError
    assert torch.equal(run(pipe), plain)


def test_methods_by_name():
    assert set(METHODS) == {"plain", *ACTIVE}
    assert isinstance(method("spell", 20.0, window=(1.0, 0.6)), Spell)
    with pytest.raises(ValueError, match="use one of plain, spell"):
        method("nothing")
    with pytest.raises(ValueError, match="0 or more"):
        method("cads", -1.0)


# Particle Guidance and the kernel of SGF ---------------------------------------------------------------------------


def rows(n=5, seed=0, scale=2.0):
    return scale * torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def particle_by_hand(x, groups, strength, alpha, sigma):
    """The gradient of the kernels' sum by loops in float64; the bandwidth of a pair is the mean of its two medians."""
    x = x.double().flatten(1)
    grad = torch.zeros_like(x)
    for members in groups:
        own = x[members]
        squared = ((own[:, None] - own[None]) ** 2).sum(-1)
        n = len(members)
        medians = [float(torch.tensor([float(squared[i, j]) for j in range(n) if j != i]).median()) for i in range(n)]
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                h = (medians[i] + medians[j]) / 2 / math.log(n)
                k = math.exp(-float(squared[i, j]) / h)
                grad[members[i]] += 2 / h * k * (own[i] - own[j])
    return strength * sigma**2 / (alpha**2 + sigma**2) * grad


def test_particle_guidance_is_the_gradient_of_its_kernels():
    x = rows(6)
    groups = torch.tensor([0, 0, 0, 1, 1, 0])
    delta = ParticleGuidance(7.0, groups)(x, **STATE)
    expected = particle_by_hand(x, [[0, 1, 2, 5], [3, 4]], 7.0, STATE["alpha"], STATE["sigma"])
    torch.testing.assert_close(delta.flatten(1).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [ParticleGuidance(5.0), SafetyGuidedFlow(0.5)])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_kernel_forces_separate(how, count):
    x = rows(count, scale=0.5)
    moved = x + how(x, **STATE)
    before, after = torch.pdist(x.flatten(1)), torch.pdist(moved.flatten(1))
    assert after.mean() > 1.05 * before.mean()
    assert after.min() > before.min()
    # Equal and opposite: the mean stays.
    torch.testing.assert_close(moved.mean(dim=0), x.mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [ParticleGuidance(5.0), SafetyGuidedFlow(0.5)])
def test_identical_rows_and_single_rows_stay_finite(how):
    same = rows(1).expand(3, -1, -1, -1)
    assert torch.equal(how(same, **STATE), torch.zeros(3, 4, 4, 4))
    assert torch.equal(how(rows(1), **STATE), torch.zeros(1, 4, 4, 4))


def test_kernel_forces_keep_to_their_group():
    x = rows(4, scale=0.5)
    for kind in (ParticleGuidance, SafetyGuidedFlow):
        together = kind(1.0, groups=torch.tensor([0, 0, 1, 1]))(x, **STATE)
        torch.testing.assert_close(together[:2], kind(1.0)(x[:2], **STATE))


def test_particle_guidance_fades_with_the_noise():
    x, how = rows(4), ParticleGuidance(5.0)
    early = how(x, noise=x, alpha=0.1, sigma=1.0).norm()
    late = how(x, noise=x, alpha=1.0, sigma=0.1).norm()
    assert late / early == pytest.approx((0.01 / 1.01) / (1 / 1.01), rel=1e-4)


def test_sgf_acts_in_its_window_alone_and_is_the_kernel_gradient():
    x = rows(3, scale=0.5)
    how = SafetyGuidedFlow(2.0, bandwidth=0.5, window=(1.0, 0.78))
    assert torch.equal(how(x, noise=x, alpha=0.5, sigma=0.5), torch.zeros_like(x))
    # Autograd of −Σ_ij k/2 over the scale that the strength takes up.
    y = x.double().flatten(1).requires_grad_()
    width = 0.25 * y.shape[1]
    energy = (-((y[:, None] - y[None]) ** 2).sum(-1) / (2 * width)).exp().sum() / 2
    (gradient,) = torch.autograd.grad(energy, y)
    expected = -2.0 * gradient * width / 2
    torch.testing.assert_close(how(x, **STATE).flatten(1).double(), expected, rtol=1e-4, atol=1e-6)


def test_kernel_forces_separate_the_images_of_a_pipeline(pipe, plain):
    for name in ("particle", "sgf"):
        apart = torch.pdist(run(pipe, method(name, ACTIVE[name])).flatten(1))
        assert apart > 1.1 * torch.pdist(plain.flatten(1))


# CADS ---------------------------------------------------------------------------------------------------------------


def test_cads_schedule_is_the_papers():
    how = CADS(0.2, tau=(0.6, 0.9))
    assert [how.kept(t) for t in (1.0, 0.9, 0.6, 0.1)] == [0, 0, 1, 1]
    assert how.kept(0.7) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="rising"):
        CADS(0.2, tau=(0.9, 0.6))


def test_cads_changes_the_prompt_early_and_not_late(pipe):
    plain_prompts, _ = outputs_of(pipe)
    prompts, _ = outputs_of(pipe, CADS(0.3, tau=(0.6, 0.9)))
    times = (pipe.scheduler.timesteps / 1000).tolist()
    assert len(times) == len(prompts) == STEPS
    for t, own, changed in zip(times, plain_prompts, prompts, strict=True):
        negative, positive = own.chunk(2)
        assert torch.equal(changed.chunk(2)[0], negative)  # the negative prompt is never touched
        assert torch.equal(changed.chunk(2)[1], positive) == (t <= 0.6)
    assert max(times) > 0.9
    assert min(times) < 0.6


def test_cads_keeps_mean_and_spread_of_the_prompt():
    y = 3 + 2 * torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))
    noisy = CADS(0.5).anneal(y, 0.3)
    torch.testing.assert_close(noisy.mean(dim=(1, 2)), y.mean(dim=(1, 2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noisy.std(dim=(1, 2)), y.std(dim=(1, 2)), rtol=1e-4, atol=1e-4)
    raw = CADS(0.5, mixing=0.0).anneal(y, 0.3)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(raw, math.sqrt(0.3) * y + 0.5 * math.sqrt(0.7) * noise)


def test_cads_noise_differs_between_images_runs_and_seeds(pipe):
    how = CADS(0.5)
    first, second = run(pipe, how), run(pipe, how)
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(pipe, CADS(0.5, seed=1)))


# Interval Guidance --------------------------------------------------------------------------------------------------


def test_interval_guidance_is_the_prompts_own_prediction_outside_and_the_pipeline_inside(pipe):
    """Compared with a pipeline that runs at guidance 1, or 3, from the same state."""
    everywhere = run(pipe, IntervalGuidance(1.0))
    unguided = run(pipe, guidance_scale=1.0)
    torch.testing.assert_close(everywhere, unguided, rtol=1e-3, atol=1e-3)

    _, plain_outputs = outputs_of(pipe)
    # Off at the clean end alone: all steps before it are the pipeline's, bit for bit.
    _, outputs = outputs_of(pipe, IntervalGuidance(0.0, end=0.55))
    same = [torch.equal(a, b) for a, b in zip(plain_outputs, outputs, strict=True)]
    levels = [level(pipe, t) for t in pipe.scheduler.timesteps]
    assert same == [t > 0.55 for t in levels]
    assert True in same
    assert False in same


def level(pipe, timestep):
    """t = σ/(α + σ), from the noise schedule's own table."""
    kept = pipe.scheduler.alphas_cumprod[int(timestep)].item()
    return math.sqrt(1 - kept) / (math.sqrt(kept) + math.sqrt(1 - kept))


def test_interval_guidance_is_off_at_the_noisy_end(pipe):
    _, plain_outputs = outputs_of(pipe)
    _, outputs = outputs_of(pipe, IntervalGuidance(0.1))
    assert not torch.equal(plain_outputs[0], outputs[0])


def test_interval_guidance_without_guidance_is_an_error(pipe):
    with pytest.raises(TypeError, match="without classifier-free guidance"):
        run(pipe, IntervalGuidance(0.5), guidance_scale=1.0)
    with pytest.raises(ValueError, match="0 to 1"):
        IntervalGuidance(1.5)


# Initial noise ------------------------------------------------------------------------------------------------------


def test_the_farthest_noise_is_the_greedy_choice_of_brute_force():
    candidates = torch.randn(5, 6, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    coarse = candidates.numpy().reshape(5, 6, 2, 4, 2, 4, 2).mean(axis=(4, 6)).reshape(5, 6, -1)
    taken = [0]
    for i in range(1, 5):
        gaps = [min(np.linalg.norm(coarse[i, c] - coarse[j, taken[j]]) for j in range(i)) for c in range(6)]
        taken.append(int(np.argmax(gaps)))
    assert torch.equal(farthest_candidates(candidates), torch.stack([candidates[i, c] for i, c in enumerate(taken)]))
    assert set(taken) != {0}


def test_farther_noises_come_from_the_callers_generators(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    noises = []
    prepare = pipe.prepare_latents
    with FarthestNoise(4).attach(pipe):
        chosen = pipe.prepare_latents
        noises.append(chosen(3, 4, 128, 128, torch.float32, torch.device("cpu"), generators))
        pipe("cat face", num_inference_steps=1, output_type="latent")
    own = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn = torch.stack([prepare(3, 4, 128, 128, torch.float32, torch.device("cpu"), own) for _ in range(5)], dim=1)
    assert torch.equal(noises[0], farthest_candidates(drawn))
    assert torch.equal(noises[0][0], drawn[0, 0])
    with pytest.raises(ValueError, match="number of candidates"):
        FarthestNoise(1.5)


# Other pipelines ----------------------------------------------------------------------------------------------------


class NoPrompt:
    """A pipeline whose denoiser takes no prompt."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.unet = torch.nn.Identity()


def test_pipelines_without_the_part_are_refused(pipe):
    bare = NoPrompt(pipe.scheduler)
    with pytest.raises(TypeError, match="no prompt embeddings"), CADS(0.5).attach(bare):
        bare.unet(torch.zeros(2, 4), timestep=torch.tensor(900))
    with pytest.raises(TypeError, match="prepare_latents"), FarthestNoise(2).attach(bare):
        pass
    bare.unet = None
    with pytest.raises(TypeError, match="neither a unet nor a transformer"), CADS(0.5).attach(bare):
        pass
