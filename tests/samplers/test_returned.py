"""What pipelines return, where they paste or drop something after the last step, and which ones are refused."""

from __future__ import annotations

from contextlib import nullcontext

import diffusers
import pytest
import torch
from torch import Tensor

from helpers.pipelines import (
    _SD,
    SIZE,
    Tiny,
    hole,
    kl,
    model,
    pipeline,
    randn,
    run,
    sdxl,
    stable_diffusion,
    unet,
    wan,
    z_image,
)
from shielded import History, Spell

PICTURE = randn(1, 3, SIZE, SIZE, seed=3).clamp(-1, 1)


def sdxl_inpaint(strength=1.0):
    parts = sdxl()
    pipe = pipeline(
        "StableDiffusionXLInpaintPipeline",
        vae=parts.pipe.vae,
        unet=parts.pipe.unet,
        scheduler=parts.pipe.scheduler,
        add_watermarker=False,
    )
    size = {"height": SIZE, "width": SIZE, "strength": strength}
    return Tiny(pipe, {**parts.options, **size, "image": PICTURE, "mask_image": hole()})


def z_image_inpaint():
    parts = z_image()
    pipe = pipeline(
        "ZImageInpaintPipeline", vae=parts.pipe.vae, transformer=parts.pipe.transformer, scheduler=parts.pipe.scheduler
    )
    return Tiny(pipe, {**parts.options, "image": PICTURE, "mask_image": hole(), "strength": 1.0})


def sd_inpaint():
    tiny = stable_diffusion(
        "StableDiffusionInpaintPipeline", scheduler=diffusers.DDIMScheduler(**_SD, clip_sample=False)
    )
    options = {"image": PICTURE, "mask_image": hole(), "height": SIZE, "width": SIZE, "strength": 1.0}
    return Tiny(tiny.pipe, {**tiny.options, **options})


def wan_image_to_video():
    parts = wan()
    pipe = pipeline(
        "WanImageToVideoPipeline",
        vae=parts.pipe.vae,
        transformer=parts.pipe.transformer,
        scheduler=parts.pipe.scheduler,
        expand_timesteps=True,
    )
    return Tiny(pipe, {**parts.options, "image": PICTURE, "prompt_embeds": randn(4, 4, 8)})


def hunyuan_image_to_video(kind):
    """The first frame is made along and dropped at the end, or it is given and never stepped."""
    blocks = {side: (f"HunyuanVideo{side.title()}Block3D",) * 4 for side in ("down", "up")}
    vae = model(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        down_block_types=blocks["down"],
        up_block_types=blocks["up"],
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    transformer = model(
        "HunyuanVideoTransformer3DModel",
        in_channels=9 if kind == "latent_concat" else 4,  # latents, picture, mask
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        guidance_embeds=False,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
        image_condition_type=kind,
    )
    pipe = pipeline(
        "HunyuanVideoImageToVideoPipeline",
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    options = {
        "image": PICTURE.add(1).div(2).expand(4, -1, -1, -1),
        "prompt_embeds": randn(4, 3, 8),
        "pooled_prompt_embeds": randn(4, 8, seed=2),
        "prompt_attention_mask": torch.ones(4, 3),
        "num_frames": 9,
        "num_inference_steps": 4,
    }
    return Tiny(pipe, {**options, "height": SIZE, "width": SIZE})


def free_init(passes=2):
    adapter = model(
        "MotionAdapter",
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    pipe = pipeline(
        "AnimateDiffPipeline",
        vae=kl(),
        unet=unet(),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(**_SD, clip_sample=False),
    )
    pipe.enable_free_init(num_iters=passes, use_fast_sampling=False)
    options = {"prompt_embeds": randn(1, 4, 8), "negative_prompt_embeds": randn(1, 4, 8, seed=2)}
    size = {"height": SIZE, "width": SIZE, "num_frames": 3}
    return Tiny(pipe, {**options, **size, "num_inference_steps": 3, "guidance_scale": 3.0})


def distances(latents: Tensor, references: Tensor) -> Tensor:
    return (latents.double() - references.double()).flatten(1).norm(dim=1)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("make", [sdxl_inpaint, z_image_inpaint, sd_inpaint, wan_image_to_video])
def test_what_is_returned_is_outside(make, share):
    """Protect what the pipeline returns without SPELL, and measure what it returns with it."""
    made = make()
    plain = run(made)
    radius = share * plain[0].numel() ** 0.5
    spell = Spell(plain, radius, batch=False)
    with spell.attach(made.pipe):
        returned = run(made)
    nearest = torch.cdist(returned.double().flatten(1), plain.double().flatten(1)).amin(dim=1)
    told = torch.zeros(len(plain), dtype=torch.bool)
    told[[row["image"] for row in spell.trace if row["unresolved"] and row["noise_level"] == 0]] = True
    assert ((nearest >= radius * (1 - 1e-3)) | told).all()
    assert not told.any()
    assert torch.equal(spell.returned, returned)
    assert torch.equal(spell.finished, returned)
    assert torch.equal(run(made), plain)  # the pipeline is what it was


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_what_hunyuan_video_makes_of_a_picture_is_outside(kind, share):
    """Protect whole videos where the first frame is dropped, and the frames that are made where it is given."""
    made = hunyuan_image_to_video(kind)
    plain = run(made)
    radius = share * plain[0].numel() ** 0.5
    first = randn(4, 4, 1, 2, 2, seed=9)  # of a protected video; what it is does not count
    references = torch.cat([first, plain], dim=2) if kind == "latent_concat" else plain[:, :, 1:]
    with Spell(references, radius, batch=False).attach(made.pipe):
        returned = run(made)
    nearest = torch.cdist(returned.double().flatten(1), plain.double().flatten(1)).amin(dim=1)
    assert (nearest >= radius * (1 - 1e-3)).all()
    assert torch.equal(run(made), plain)
    whole = plain if kind == "token_replace" else plain[:, :, 1:]
    with pytest.raises(ValueError, match="the protected references have shape"), Spell(whole, 1.0).attach(made.pipe):
        run(made)


@pytest.mark.parametrize("make", [sdxl_inpaint, wan_image_to_video, free_init])
def test_nothing_active_nothing_changed(make):
    made = make()
    seeds = (0,) if make is free_init else (0, 1, 2, 3)
    plain = run(made, seeds)
    step, call = type(made.pipe.scheduler).step, type(made.pipe).__call__
    spell = Spell(plain + 1e4, 1.0, batch=False, history=True)
    with spell.attach(made.pipe):
        assert torch.equal(run(made, seeds), plain)
    assert type(made.pipe.scheduler).step is step
    assert type(made.pipe).__call__ is call


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_history_takes_one_video_of_free_init(passes):
    made = free_init(passes)
    plain = run(made, (0,))
    history = History()
    with Spell(radius=0.5 * plain[0].numel() ** 0.5, history=history, batch=False).attach(made.pipe):
        first = run(made, (0,))
        second = run(made, (0,))
    assert torch.equal(first, plain)  # no pass is pushed away from the pass before
    assert len(history) == 2
    assert distances(second, first).min() >= 0.499 * plain[0].numel() ** 0.5
    assert torch.equal(history.latents, torch.cat([first, second]).float())


def test_a_history_takes_each_of_several_trajectories_of_a_call():
    """Other pipelines sample one image after the other within a call."""
    spell = Spell(radius=1e-3, history=True)
    spell.begin_call()
    for i in range(3):
        spell.start()
        spell.finish(torch.full((1, 4), float(i)))
    spell.end_call(None)
    assert spell.history.latents.tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


@pytest.mark.parametrize("change", ["pasted", "shifted", "one row"])
def test_a_change_after_the_last_step_that_leads_inside_is_an_error(change):
    """Between the steps nothing shows; at the end the pipeline puts something back."""

    class Pasting(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **options):
            (latents,) = super().__call__(*args, **{**options, "return_dict": False})[:1]
            if change == "pasted":
                latents = self.own.clone()
            elif change == "shifted":
                latents = self.own + 1e-2
            else:
                latents = torch.cat([latents[:3], self.own[3:]])
            return (latents,)

    made = stable_diffusion()
    plain = run(made)
    pipe = Pasting(**{name: getattr(made.pipe, name) for name in made.pipe.components}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.own = plain
    radius = 0.2 * plain[0].numel() ** 0.5
    images = r"\[3\]" if change == "one row" else r"\[0, 1, 2, 3\]"
    with (
        pytest.raises(RuntimeError, match=f"changed its latents after the last step, and images {images}"),
        Spell(plain, radius, batch=False).attach(pipe),
    ):
        run(Tiny(pipe, made.options))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CosmosTextToWorldPipeline", "passes an x0 of its own"),
        ("CosmosVideoToWorldPipeline", "passes an x0 of its own"),
        ("TextToVideoSDPipeline", "each frame"),
        ("VideoToVideoSDPipeline", "each frame"),
        ("I2VGenXLPipeline", "each frame"),
        ("StableDiffusionPanoramaPipeline", "exchanges the state of its scheduler"),
        ("LTXConditionPipeline", "noise level of its own"),
        ("SkyReelsV2DiffusionForcingPipeline", "steps copies of its scheduler"),
        ("TextToVideoZeroPipeline", "steps copies of its scheduler"),
    ],
)
def test_what_cannot_be_answered_for_is_refused_before_sampling(name, reason):
    cls = getattr(diffusers, name)
    pipe = object.__new__(cls)  # what is known is known of the class
    vars(pipe)["scheduler"] = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match=reason), Spell(torch.zeros(1, 4), 1.0, batch=False).attach(pipe):
        raise AssertionError("it was attached to")


@pytest.mark.parametrize("name", ["pipeline of the same source", "subclass"])
def test_a_subclass_is_refused_as_well(name):
    cls = type("MyVideos", (diffusers.CosmosTextToWorldPipeline,), {})
    pipe = object.__new__(cls)
    vars(pipe)["scheduler"] = diffusers.DDIMScheduler()
    with (
        pytest.raises(TypeError, match="MyVideos passes an x0"),
        Spell(torch.zeros(1, 4), 1.0, batch=False).attach(pipe),
    ):
        raise AssertionError("it was attached to")


def test_the_margin_is_not_asked_of_what_is_returned():
    spell = Spell(torch.zeros(1, 2), 1.0, batch=False, margin=0.5)
    for distance, refused in ((1.1, False), (0.9, True)):
        spell.begin_call()
        spell.start()
        spell.finish(torch.tensor([[2.0, 0.0]]))
        with pytest.raises(RuntimeError, match="inside a shield again") if refused else nullcontext():
            spell.end_call(torch.tensor([[distance, 0.0]]))
