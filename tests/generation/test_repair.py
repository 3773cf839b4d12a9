"""The promise at the end of a trajectory, and what is done where it was not kept; distances in float64, one by one."""

import types

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionInpaintPipeline
from PIL import Image

from helpers.leaking import inside_at_first
from helpers.scheduler_cases import ONE_SCHEDULE, case_id, make, sample
from shielded import History, LatentSpace, ProtectedSet, RepelledDenoiser, Spell
from shielded.generation import generate
from shielded.generation.repair import farthest
from shielded.models import load
from shielded.samplers import attach


def pipeline(scheduler):
    return types.SimpleNamespace(scheduler=scheduler)


def nearest(latents, references):
    return torch.cdist(latents.double().flatten(1), references.double().flatten(1)).min(dim=1).values


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The last step -------------------------------------------------------------------------------------------------------


def ends(case, spell, dtype=torch.float32):
    scheduler = make(case)
    with attach(pipeline(scheduler), spell):
        return sample(scheduler, dtype=dtype)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ONE_SCHEDULE, ids=case_id)
def test_no_sampler_ends_inside_a_shield(case, dtype):
    """Overlapping shields around the very images that the plain sampler ends on."""
    plain = sample(make(case), dtype=dtype)[0]
    references = torch.cat([plain.float() + 0.3 * k * normal(*plain.shape, seed=k) for k in range(3)])
    spell = Spell(references, 4.0, overcompensation=1.0, batch=False)
    assert nearest(plain, references).max() < 4
    if plain.abs().max() > 1e6:
        pytest.skip("this form diverges on the small model; its latents are farther apart in bfloat16 than the radius")
    latents = ends(case, spell, dtype)
    assert latents.dtype == plain.dtype
    assert nearest(latents, references).min() >= 4
    assert torch.equal(spell.finished, latents)


@pytest.mark.parametrize("case", ONE_SCHEDULE, ids=case_id)
def test_nothing_inside_nothing_changed(case):
    plain = sample(make(case))[0]
    far = plain.max() + 1e3 + normal(2, *plain.shape[1:])
    assert torch.equal(ends(case, Spell(far, 1.0, batch=False)), plain)


LEAKING = ("DDIMScheduler", {"clip_sample": False}, {"num_inference_steps": 6})  # ends one timestep before x0


@pytest.mark.parametrize("options", [{"overlap": "sum"}, {"window": (1.0, 0.5)}])
def test_the_paper_s_formula_and_a_closed_window_are_left_alone(options):
    plain = sample(make(LEAKING))[0]
    spell = Spell(plain.clone(), 4.0, overcompensation=0.1, batch=False, **options)
    assert nearest(ends(LEAKING, spell), plain).min() < 4
    assert nearest(ends(LEAKING, Spell(plain.clone(), 4.0, overcompensation=0.1, batch=False)), plain).min() >= 4


@pytest.mark.parametrize("return_dict", [True, False])
def test_lcm_pipelines_decode_what_was_moved(return_dict):
    """Latent consistency pipelines decode the second output, which is the same tensor at the last step."""
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    x = normal(3, 4, 4, 4)
    spell = Spell(torch.zeros(1, 4, 4, 4), 50.0, batch=False)
    with attach(pipeline(scheduler), spell):
        for t in scheduler.timesteps:
            output = scheduler.step(0.1 * x, t, x, generator=torch.Generator().manual_seed(0), return_dict=return_dict)
    assert isinstance(output, tuple) != return_dict
    assert torch.equal(output[0], spell.finished)
    assert torch.equal(output[1], spell.finished)
    if return_dict:
        assert torch.equal(output.prev_sample, output["denoised"])


def test_nested_opposing_and_equal_shields_are_left():
    z = normal(1, 32)
    references = torch.cat([z, z, z + 0.1, z - 0.1, z + 0.5 * normal(20, 32, seed=1)])
    radius = torch.linspace(1, 6, len(references))  # the last shields hold the first ones
    spell = Spell(references, radius, batch=False)
    x = torch.cat([z, references[-1:], z + 100, z + 3 * normal(40, 32, seed=2)])
    left = spell.leave(x)
    depth = torch.cdist(left.double(), references.double()) - radius.double()
    assert (torch.cdist(x.double(), references.double()) - radius.double()).min() < -5
    assert depth.min() >= 0
    assert torch.equal(left[2], x[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_does_not_lead_back_inside(dtype):
    z = (10 * normal(50, 256)).to(dtype)
    x = (z.float() + 0.01 * normal(50, 256, seed=1)).to(dtype)
    left = Spell(z, 3.0, batch=False).leave(x)
    assert left.dtype == dtype
    assert nearest(left, z).min() >= 3


def test_a_batch_is_apart_at_the_end():
    x = normal(6, 64) * 0.01
    spell = Spell(radius=2.0)
    assert torch.pdist(spell.leave(x).double()).min() >= 2 * (1 - 1e-5)


def test_only_the_hole_of_a_mask_moves():
    x = normal(2, 4, 8, 8)
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    left = Spell(x.clone(), 3.0, batch=False, mask=mask).finish(x)
    assert nearest(left, x).min() >= 3
    assert torch.equal(left * (1 - mask), x * (1 - mask))


def test_samples_of_a_denoiser_are_finished_too():
    z = normal(1, 16)
    spell = Spell(z, 2.0, batch=False)
    spell.start()
    RepelledDenoiser(lambda x, sigma: x, spell)(z.clone(), 1.0)
    assert nearest(spell.finish(z.clone()), z).min() >= 2


# Repair, on the embedded model ---------------------------------------------------------------------------------------

PROMPTS, SEEDS = ["red heart", "pizza", "owl"], [0, 1, 2]
RADIUS = 7.0


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


@pytest.fixture(scope="module")
def plain(pipe):
    return run(pipe)


@pytest.fixture(scope="module")
def protected(pipe, plain, tmp_path_factory):
    """The pictures of the plain model."""
    space = LatentSpace.of(pipe)
    protected = ProtectedSet.create(tmp_path_factory.mktemp("set"), space)
    protected.add(space.encode(plain.images), PROMPTS)
    return protected


def run(pipe, spell=None, **options):
    options = {"steps": 5, "guidance_scale": 3.0, "progress": False, **options}
    return generate(pipe, PROMPTS, SEEDS, spell, **options)


def measured(pipe, made, protected):
    """Distances of latents and of the pictures encoded again."""
    z = protected.vectors(range(len(protected)))
    return nearest(made.latents, z), nearest(LatentSpace.of(pipe).encode(made.images), z)


@pytest.fixture(scope="module")
def modes(pipe, protected):
    spell = Spell(protected, RADIUS, batch=False)
    return {mode: run(pipe, spell, on_leak=mode) for mode in ("report", "refuse", "push", "restart")}


def test_decoding_brings_images_back_inside(pipe, modes, protected):
    latents, pictures = measured(pipe, modes["report"], protected)
    assert latents.min() >= RADIUS
    assert pictures.min() < RADIUS
    assert modes["report"].decoded is None


def test_leaks_are_refused_with_a_reason(pipe, modes, protected):
    _, pictures = measured(pipe, modes["report"], protected)
    assert [reason is not None for reason in modes["refuse"].refused] == (pictures < RADIUS).tolist()
    reason = next(filter(None, modes["refuse"].refused))
    assert "inside the radius 7" in reason
    assert torch.equal(modes["refuse"].latents, modes["report"].latents)


@pytest.mark.parametrize("mode", ["refuse", "restart"])
def test_history_remembers_what_became_of_the_images(pipe, protected, mode):
    history = History(limit=4)
    history.add(torch.full((2, *protected.space.shape), 1e3))
    made = run(pipe, Spell(protected, RADIUS, batch=False, history=history), on_leak=mode)
    kept = [i for i, reason in enumerate(made.refused) if reason is None]
    assert len(kept) < 3 if mode == "refuse" else "restart" in made.repair
    assert torch.equal(history.latents[1:], made.latents[kept])  # of the older ones there was room for one
    assert history.latents[0].eq(1e3).all()


@pytest.mark.parametrize("mode", ["push", "restart"])
def test_leaks_are_repaired(pipe, modes, protected, mode):
    made = modes[mode]
    assert made.refused == [None] * 3
    assert torch.cat(measured(pipe, made, protected)).min() >= RADIUS
    assert mode in made.repair
    assert set(made.attempts) <= ({1} if mode == "push" else {1, 2, 3})
    outside = [how is None for how in made.repair]
    assert torch.equal(made.latents[outside], modes["report"].latents[outside])


def test_the_same_seeds_take_the_same_attempts(pipe, modes, protected):
    before = torch.get_rng_state()
    again = run(pipe, Spell(protected, RADIUS, batch=False), on_leak="restart")
    assert torch.equal(again.latents, modes["restart"].latents)
    assert again.attempts == modes["restart"].attempts
    assert torch.equal(torch.get_rng_state(), before)
    alone = generate(
        pipe,
        PROMPTS[1:2],
        SEEDS[1:2],
        Spell(protected, RADIUS, batch=False),
        on_leak="restart",
        steps=5,
        guidance_scale=3.0,
        progress=False,
    )
    assert (alone.latents[0] - modes["restart"].latents[1]).abs().max() < 1e-3
    assert alone.attempts == modes["restart"].attempts[1:2]


def test_each_attempt_is_logged(pipe, protected):
    events = []
    spell = Spell(protected, RADIUS, batch=False)
    made = run(pipe, spell, on_leak="restart", log=lambda event, **content: events.append((event, content)))
    first = [content for event, content in events if event == "sampled"]
    assert [(c["prompt"], c["seed"]) for c in first] == list(zip(PROMPTS, SEEDS, strict=True))
    repeated = [content for event, content in events if event == "restarted"]
    assert len(repeated) == sum(made.attempts) - 3 > 0
    assert not any(content["inside"] for _, content in events[-1:])


def test_few_steps(pipe, protected):
    """A sampler of three steps, the last two of which a restart takes again."""
    before = pipe.scheduler
    pipe.scheduler = LCMScheduler.from_config(before.config)
    try:
        made = run(pipe, Spell(protected, RADIUS, batch=False), on_leak="restart", steps=3)
    finally:
        pipe.scheduler = before
    kept = [reason is None for reason in made.refused]
    assert any(kept)
    assert min(x[kept].min() for x in measured(pipe, made, protected)) >= RADIUS


@pytest.fixture
def four_channels(pipe):
    """The inpainting pipeline refuses models of other than 4 or 9 channels, and asks the config alone."""
    before = pipe.unet.config.in_channels
    pipe.unet.register_to_config(in_channels=4)
    yield
    pipe.unet.register_to_config(in_channels=before)


def test_inpainting(pipe, plain, protected, four_channels, monkeypatch):
    """The known part is pasted over the sampler's latents; what is measured is what was decoded."""
    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    hole = Image.new("L", (128, 128))
    hole.paste(255, (32, 32, 96, 96))
    mask = torch.zeros(16, 16)
    mask[4:12, 4:12] = 1
    spell = Spell(protected, 4.0, batch=False, mask=mask)
    options = {"image": plain.images[0], "mask_image": hole, "strength": 1.0}
    made = run(inpaint, spell, on_leak="push", **options)
    kept = [reason is None for reason in made.refused]
    assert any(kept)
    assert min(x[kept].min() for x in measured(pipe, made, protected)) >= 4
    known = protected.vectors([0])[0]
    assert (made.latents - known)[..., mask == 0].abs().max() < 1e-3
    inside_at_first(monkeypatch, lambda: protected.vectors(range(3)))
    again = run(inpaint, spell, on_leak="restart", attempts=2, **{**options, "steps": 2})
    assert max(again.attempts) == 2
    assert again.images[0].size == (128, 128)


@pytest.mark.parametrize("mode", ["restart", "push", "refuse"])
def test_a_radius_that_nothing_can_keep_is_refused_with_a_reason(pipe, protected, mode):
    with pytest.raises(ValueError, match="cannot be kept"):
        run(pipe, Spell(protected, 200.0, batch=False), on_leak=mode)


def test_a_radius_larger_than_the_diameter_ends(pipe, protected):
    """Larger than the distance of any two of the pictures: each image is outside or refused, after so many attempts."""
    diameter = torch.pdist(protected.vectors(range(3)).flatten(1).double()).max().item()
    radius = 0.5 * (diameter + farthest(protected))
    made = run(pipe, Spell(protected, radius, batch=False), on_leak="restart", attempts=2, steps=2)
    latents, pictures = measured(pipe, made, protected)
    assert [reason is None for reason in made.refused] == ((latents >= radius) & (pictures >= radius)).tolist()
    assert any(made.refused)
    assert max(made.attempts) == 2


@pytest.mark.parametrize("count", [1, 5, 40])
def test_farthest_is_a_bound(tmp_path, count):
    protected = ProtectedSet.create(tmp_path, LatentSpace((3, 2, 2)))
    z = normal(count, 3, 2, 2)
    protected.add(z, list(range(count)))
    x = normal(20000, 12, seed=1)
    x = x / x.norm(dim=1, keepdim=True) * z.flatten(1).norm(dim=1).max()
    best = nearest(torch.cat([x, -z.flatten(1)]), z).max().item()
    assert best <= farthest(protected) <= 3 * best


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_leak": "pray"}, "not known"), ({"on_leak": "push"}, "ProtectedSet"), ({"attempts": 0}, "at least 1")],
)
def test_settings_that_make_no_sense(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        run(pipe, Spell(radius=1.0), **options)
