"""diffusers' own pipelines with small random models: protected images are avoided, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from helpers.pipelines import PIPELINES, SEEDS, dit, flux, hole, model, run, tiny
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.generation.sampling import Watch
from shielded.samplers import attach

# Their schedulers do not end on the x0 of the last step: PNDM extrapolates, and Stable Diffusion 2 comes with
# set_alpha_to_one=False, which leaves a little of the predicted noise. At λ = 1 they end up to 10 % inside.
NOT_ON_X0 = {"sd15", "sd2", "img2img", "inpaint", "controlnet"}


def sampled(made, spell=None, **options):
    """The latents (B, *S) that the pipeline ends with."""
    watch = Watch()
    with attach(made.pipe, watch) if spell is None else spell.attach(made.pipe):
        output = run(made, output_type="pil" if "class_labels" in made.options else "latent", **options)
    return (watch if spell is None else spell).finished if isinstance(output, list) else output


def closest(latents, references):
    return torch.cdist(latents.double().flatten(1), references.double().flatten(1)).min(dim=1).values


def closest_pair(latents):
    return torch.pdist(latents.double().flatten(1)).min().item()


@pytest.mark.parametrize("name", PIPELINES)
def test_images_of_the_same_seeds_are_avoided(name):
    made = tiny(name)
    plain = sampled(made)
    assert len(plain) == len(SEEDS)
    radius = 0.4 * closest_pair(plain)  # of shields that do not overlap
    strength = 1.6 if name in NOT_ON_X0 else 1.0
    spell = Spell(plain, radius, strength, batch=False, release=None)
    distances = closest(sampled(made, spell), plain)
    assert (distances >= 0.999 * radius).all()
    if strength == 1:  # to the shell and no farther
        assert (distances <= 1.001 * radius).all()
    assert {row["image"] for row in spell.trace} == set(range(len(SEEDS)))
    assert not any(row["unresolved"] for row in spell.trace)


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_active_nothing_changed(name):
    """Also the state of the generators is the same, and the pipeline is its own again afterwards."""
    made = tiny(name)
    output_type = "pt" if name == "dit" else "latent"
    plain = run(made, output_type=output_type)
    far = sampled(made)[:1] + 1e4
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    with Spell(far, radius=1.0, batch=False).attach(made.pipe) as spell:
        same = made.pipe(generator=generators, output_type=output_type, **made.options)[0]
    assert np.array_equal(same, plain)  # an array where diffusers 0.35 makes it
    assert {row["active"] for row in spell.trace} == {0}
    assert "step" not in vars(made.pipe.scheduler)
    untouched = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    assert np.array_equal(made.pipe(generator=untouched, output_type=output_type, **made.options)[0], plain)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, untouched, strict=True))


# What people do with them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sd3", "dit", "flux", "wan"])
def test_images_of_a_batch_keep_apart(name):
    """DiT's pipeline steps each image twice, in both halves of the guidance batch: none is its own neighbour."""
    made = tiny(name)
    plain = sampled(made)
    radius = 1.2 * closest_pair(plain)
    apart = sampled(made, Spell(radius=radius, overcompensation=1.0))
    assert len(apart) == len(plain)
    assert closest_pair(apart) >= 0.999 * radius


def test_dit_without_guidance():
    made = dit()
    options = {"guidance_scale": 1.0}
    plain = sampled(made, **options)
    radius = 0.4 * closest_pair(plain)
    assert (closest(sampled(made, Spell(plain, radius, 1.0, batch=False), **options), plain) >= 0.999 * radius).all()


def test_prompts_keep_to_themselves_with_groups():
    """Two prompts with two images each, ordered by prompt: only images of one prompt repel each other."""
    made = tiny("qwen-image")
    plain = sampled(made)
    radius = 1.2 * torch.pdist(plain.double().flatten(1)).max().item()
    spell = Spell(radius=radius, overcompensation=1.0, groups=torch.tensor([0, 0, 1, 1]))
    apart = sampled(made, spell)
    within = [closest_pair(apart[:2]), closest_pair(apart[2:])]
    assert min(within) >= 0.999 * radius
    assert {row["active"] for row in spell.trace if row["active"]} == {1}  # never more than the one other image
    alone = sampled(made, Spell(radius=radius, overcompensation=1.0), seeds=SEEDS[:2], **first_prompt(made))
    torch.testing.assert_close(apart[:2], alone, rtol=1e-3, atol=1e-3)


def first_prompt(made):
    return {key: value[:1] for key, value in made.options.items() if isinstance(value, torch.Tensor)}


def test_inpainting_counts_and_pushes_only_in_the_hole():
    made = tiny("inpaint")
    in_hole = hole()[..., ::2, ::2].bool()[0].expand(4, -1, -1)
    plain = sampled(made)
    radius = 0.4 * closest_pair(plain[:, in_hole])
    mask = in_hole[:1].float()
    shielded = sampled(made, Spell(plain, radius, batch=False, mask=mask))
    assert (closest(shielded[:, in_hole], plain[:, in_hole]) >= 0.999 * radius).all()
    assert torch.equal(shielded[:, ~in_hole], plain[:, ~in_hole])


@pytest.mark.parametrize("name", ["sd-turbo", "flux", "wan"])
def test_bfloat16(name):
    """What is not pushed is bit-identical; the radius is kept up to the rounding of the latents, 2⁻⁸ of their norm."""
    made = PIPELINES[name]()
    made.pipe.to(torch.bfloat16)
    half = {
        key: value.bfloat16() for key, value in made.options.items() if getattr(value, "dtype", None) == torch.float32
    }
    plain = sampled(made, **half)
    assert torch.equal(sampled(made, Spell(plain[:1] + 1e4, 1.0, batch=False), **half), plain)
    radius = 0.4 * closest_pair(plain)
    distances = closest(sampled(made, Spell(plain.float(), radius, 1.0, batch=False), **half), plain)
    assert (distances >= 0.98 * radius).all()


def test_compiled_denoiser_is_not_compiled_again():
    made = flux()
    plain = sampled(made)
    counter = CompileCounter()
    made.pipe.transformer = torch.compile(made.pipe.transformer, backend=counter, fullgraph=True)
    assert torch.equal(sampled(made), plain)
    graphs = counter.frame_count
    assert graphs > 0
    radius = 0.4 * closest_pair(plain)
    # One scale per image has other strides than the pipeline's one scale for all, so releasing compiles once more.
    for release, more in (None, 0), (0.5, 1), (0.5, 1):
        spell = Spell(plain, radius, 1.0, batch=False, release=release)
        assert (closest(sampled(made, spell), plain) >= 0.999 * radius).all()
        assert counter.frame_count == graphs + more


def test_model_offload(tmp_path):
    """diffusers' hooks, which move each model to the device when its turn comes; here both ends are the processor."""
    hooks = pytest.importorskip("accelerate.hooks")
    made = PIPELINES["sd3"]()
    plain = sampled(made)
    space = LatentSpace.of(made.pipe)
    made.pipe.enable_model_cpu_offload(device="cpu")
    assert isinstance(made.pipe.vae._hf_hook, hooks.CpuOffload)
    assert LatentSpace.of(made.pipe) == space
    assert torch.equal(sampled(made), plain)
    radius = 0.4 * closest_pair(plain)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace.of(made.pipe))
    protected.add(plain, list("abcd"), radius)
    assert (closest(sampled(made, Spell(protected, overcompensation=1.0, batch=False)), plain) >= 0.999 * radius).all()


@pytest.mark.parametrize("name", ["flux", "wan", "ltx"])
def test_protected_set_of_images(name, tmp_path):
    """From pictures (of videos) to a set on disk, to a pipeline whose own images are protected; and no other model."""
    made = tiny(name)
    size = {key: made.options[key] for key in ("height", "width", "num_frames") if key in made.options}
    space = LatentSpace.of(made.pipe, **size)
    plain = sampled(made)
    protected = ProtectedSet.create(tmp_path / "set", space)
    protected.add(space.encode(space.decode(plain[:1])), ["picture"], radius=1e-3)
    protected.add(plain, list("abcd"), 0.4 * closest_pair(plain))
    spell = Spell(ProtectedSet.open(tmp_path / "set"), overcompensation=1.0, batch=False)
    assert (closest(sampled(made, spell), plain) >= 0.999 * protected.radii[1]).all()
    other = PIPELINES[name]()
    other.pipe.vae = model(type(other.pipe.vae).__name__, seed=1, **dict(other.pipe.vae.config.items()))
    with pytest.raises(ValueError, match="These latent spaces differ"), spell.attach(other.pipe):
        pass
