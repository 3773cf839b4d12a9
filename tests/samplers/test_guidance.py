"""Guidance let go per row, in diffusers' own pipelines with small random models."""

import pytest
import torch

from helpers.pipelines import PIPELINES, randn, run, stable_diffusion, tiny
from helpers.release import OFF, ROWS, WAYS, Release
from shielded import Guided, RepelledDenoiser, Spell
from shielded.samplers import attach


def sampled(name, **options):
    return torch.as_tensor(run(tiny(name), **options))  # DiT's pipeline returns arrays


def released(name, correct, **options):
    with attach(tiny(name).pipe, correct):
        return sampled(name, **options)


def test_all_pipelines_are_listed():
    assert WAYS.keys() == PIPELINES.keys()


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way])
def test_released_rows_are_those_of_a_run_without_guidance(name):
    plain = sampled(name)
    without = sampled(name, **OFF.get(name, {"guidance_scale": 1.0}))
    correct = Release()
    latents = released(name, correct)
    assert correct.guidance == WAYS[name]
    assert torch.equal(latents[~ROWS], plain[~ROWS])
    assert not torch.allclose(latents[ROWS], plain[ROWS], rtol=1e-3)
    torch.testing.assert_close(latents[ROWS], without[ROWS], rtol=2e-3, atol=2e-4 * float(without.abs().max()))


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way])
def test_without_guidance_there_is_none_to_release(name):
    plain, correct = sampled(name), Release()
    assert torch.equal(released(name, correct), plain)
    assert correct.guidance.startswith("not released: ")
    assert correct.steps == [None] * len(correct.steps)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "wan", "ltx", "flux", "lcm"])
def test_release_to_another_scale(name):
    half = sampled(name, guidance_scale=2.0)
    latents = released(name, Release(scale=2.0))
    torch.testing.assert_close(latents[ROWS], half[ROWS], rtol=2e-3, atol=2e-4 * float(half.abs().max()))


@pytest.mark.parametrize("name", ["sd15", "wan", "flux"])
def test_release_never_adds_guidance(name):
    assert torch.equal(released(name, Release(scale=5.0)), sampled(name))


def test_rescaled_guidance_is_released_to_none_only():
    off = sampled("sd15", guidance_scale=1.0)
    latents = released("sd15", Release(), guidance_rescale=0.7)
    torch.testing.assert_close(latents[ROWS], off[ROWS], rtol=2e-3, atol=2e-4 * float(off.abs().max()))
    correct = Release(scale=2.0)
    plain = sampled("sd15", guidance_rescale=0.7)
    assert torch.equal(released("sd15", correct, guidance_rescale=0.7), plain)
    assert "not known" in correct.guidance


def test_an_unknown_combination_is_left_alone():
    pipe = stable_diffusion().pipe
    plain_step = pipe.scheduler.step
    options = {**tiny("sd15").options, "output_type": "latent"}
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]

    def bent(model_output, *args, **kwargs):
        return plain_step(model_output + 0.05 * model_output.roll(1, -1), *args, **kwargs)

    correct = Release()
    with attach(pipe, correct):
        attached = pipe.scheduler.step
        pipe.scheduler.step = lambda m, *a, **k: attached(m + 0.05 * m.roll(1, -1), *a, **k)
        latents = pipe(generator=seeds, **options).images
        pipe.scheduler.step = attached
    pipe.scheduler.step = bent
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    assert torch.equal(latents, pipe(generator=seeds, **options).images)
    assert "not known" in correct.guidance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pipe = stable_diffusion().pipe.to(dtype)
    options = {**tiny("sd15").options, "output_type": "latent", "num_inference_steps": 3}
    options |= {key: options[key].to(dtype) for key in ("prompt_embeds", "negative_prompt_embeds")}

    def sample(correct=None, **changes):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
        if correct is None:
            return pipe(generator=seeds, **{**options, **changes}).images
        with attach(pipe, correct):
            return pipe(generator=seeds, **options).images

    correct = Release()
    latents, plain, without = sample(correct), sample(), sample(guidance_scale=1.0)
    assert correct.guidance == "batched"
    assert torch.equal(latents[~ROWS], plain[~ROWS])
    torch.testing.assert_close(latents[ROWS], without[ROWS], rtol=0.1, atol=0.05 * float(without.abs().max()))


# Denoisers ----------------------------------------------------------------------------------------------------------


def net(x, sigma):
    return 0.5 * x


def guide(x, sigma):
    return 0.25 * x + 0.1


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.5), (2.0, None)])
def test_a_guided_denoiser_is_released_per_row(scale, expected):
    x = randn(4, 3, 2)
    out = RepelledDenoiser(Guided(net, guide, 3.0), Release(scale=scale))(x, 1.0)
    assert torch.equal(out[~ROWS], Guided(net, guide, 3.0)(x, 1.0)[~ROWS])
    torch.testing.assert_close(out[ROWS], Guided(net, guide, scale)(x, 1.0)[ROWS])
    if expected is not None:
        assert torch.equal(out[ROWS], expected * x[ROWS])


def test_a_denoiser_without_guidance_has_none_to_release():
    x = randn(4, 3, 2)
    correct = Release()
    assert torch.equal(RepelledDenoiser(net, correct)(x, 1.0), net(x, 1.0))
    assert torch.equal(RepelledDenoiser(Guided(net, guide, 1.0), correct)(x, 1.0), net(x, 1.0))
    assert correct.steps == [None, None]


def test_a_spell_releases_a_guided_denoiser():
    x = randn(4, 3, 2)
    guided = Guided(net, guide, 3.0)(x, 1.0)
    spell = Spell(guided[:1].clone(), radius=0.1, batch=False, release=0.5)
    out = RepelledDenoiser(Guided(net, guide, 3.0), spell)(x, 1.5)
    assert [row["released"] for row in spell.trace] == [True, False, False, False]
    assert torch.equal(out[1:], guided[1:])


# In a Spell ---------------------------------------------------------------------------------------------------------


def test_a_spell_releases_the_images_in_a_shield():
    plain = run(tiny("sd15"))
    spell = Spell(plain[1:2], radius=0.5 * float(plain[1].norm()), batch=False, release=0.3)
    with spell.attach(tiny("sd15").pipe):
        latents = run(tiny("sd15"))
    acted = {row["image"] for row in spell.trace if row["active"]}
    gone = {row["image"] for row in spell.trace if row["released"]}
    assert gone
    assert gone <= acted
    assert all(row["noise_level"] > 0.3 for row in spell.trace if row["released"])
    assert spell.guidance == "batched"
    idle = sorted(set(range(4)) - acted)
    assert torch.equal(latents[idle], plain[idle])


def test_nothing_active_nothing_released():
    plain = run(tiny("sd15"))
    spell = Spell(randn(1, *plain.shape[1:], seed=9) * 1e3, radius=1.0, batch=False, release=0.5)
    with spell.attach(tiny("sd15").pipe):
        assert torch.equal(run(tiny("sd15")), plain)
    assert spell.guidance is None
    assert not any(row["released"] for row in spell.trace)


def test_without_release_guidance_stays():
    plain = run(tiny("sd15"))
    spell = Spell(plain[1:2], radius=0.5 * float(plain[1].norm()), batch=False, release=None)
    with spell.attach(tiny("sd15").pipe):
        run(tiny("sd15"))
    assert any(row["active"] for row in spell.trace)
    assert not any(row["released"] for row in spell.trace)


@pytest.mark.parametrize("release", [None, 0.5])
def test_the_denoiser_is_watched_only_to_release(release):
    pipe = tiny("sd15").pipe
    with Spell(radius=1.0, release=release).attach(pipe):
        assert bool(pipe.unet._forward_hooks) == (release is not None)
        run(tiny("sd15"))
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("options", [{"release": 1.5}, {"release": -0.1}, {"release_scale": 0.5}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="release"):
        Spell(radius=1.0, **options)
