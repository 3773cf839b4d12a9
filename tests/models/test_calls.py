"""Pipelines of every kind are called as they ask to be, and bad calls are refused in a sentence."""

import json
from typing import ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from helpers import pipelines
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.evaluation.reproduce import Setting, Study
from shielded.generation import generate
from shielded.models.calls import conditioning, images_of, needs_prompt
from shielded.radius.calibrate import calibrate
from shielded.spell.posterior import measure_calibration

SPACE = LatentSpace.pixels((3, 8, 8))


class Own:
    """Nothing but a scheduler and `__call__`."""

    def __init__(self, denoiser=lambda x, t: 0.1 * x, **options):
        self.denoiser = denoiser
        self.scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, **options)

    def __call__(self, batch_size, generator, steps=7):
        self.steps = steps
        x = randn_tensor((batch_size, 3, 8, 8), generator=generator)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.denoiser(x, t), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)


class WithClasses(Own):
    labels: ClassVar = {"cat": 3, "dog": 4}
    unet = type("Unet", (), {"config": type("Config", (), {"num_class_embeds": 10})})()

    def __call__(self, class_labels, generator):
        self.classes = class_labels
        images = super().__call__(len(class_labels), generator)
        return images.permute(0, 2, 3, 1).numpy(), "more"


def attracted(target):
    """A denoiser that draws one picture at every seed."""
    return lambda x, t: 0.02 * x + target


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddpm") / "model"
    unet = pipelines.model(
        "UNet2DModel",
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.save_pretrained(folder)
    return folder, pipe


def test_an_own_pipeline_makes_what_its_own_call_makes():
    pipe = Own()
    made = generate(pipe, ["", ""], [3, 4], steps=5, progress=False)
    assert pipe.steps == 5
    own = pipe(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)], 5)
    torch.testing.assert_close(SPACE.encode(made.images), 2 * own - 1, atol=0.5 / 127.5 + 1e-6, rtol=0)


def test_an_own_pipeline_is_kept_away_and_leaks_are_repaired(tmp_path):
    target = (0.5 * pipelines.randn(1, 3, 8, 8)).clamp(-0.9, 0.9)
    pipe = Own(attracted(target))
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(target, ["the picture"])
    plain = generate(pipe, ["", ""], [0, 1], Spell(protected, 3.0, batch=False, window=(1.0, 0.9)), progress=False)
    assert (protected.nearest(SPACE.encode(plain.images))[0] < 3).all()
    spell = Spell(protected, 3.0, batch=False)
    made = generate(pipe, ["", ""], [0, 1], spell, on_leak="restart", progress=False)
    assert made.kept == [0, 1]
    assert (protected.nearest(SPACE.encode(made.images))[0] >= 3).all()


def test_classes_by_name_and_number():
    pipe = WithClasses()
    made = generate(pipe, ["cat", "4", "9"], [0, 1, 2], batch_size=3, progress=False)
    assert pipe.classes == [3, 4, 9]
    assert len(made.images) == 3
    for unknown in ("10", "owl", "-1", ""):
        with pytest.raises(ValueError, match=r"no class .* from 0 to 9, or its name, such as 'cat'"):
            generate(pipe, [unknown], [0], progress=False)


def test_dit_takes_classes_everywhere(tmp_path):
    tiny = pipelines.PIPELINES["dit"]()
    pipe = tiny.pipe
    pipe.set_progress_bar_config(disable=True)
    made = generate(pipe, ["1", "2"], [0, 1], steps=2, progress=False, guidance_scale=2.0)
    own = pipe([1, 2], generator=[torch.Generator().manual_seed(s) for s in (0, 1)], num_inference_steps=2,
               guidance_scale=2.0).images  # fmt: skip
    assert [np.asarray(a).tolist() for a in made.images] == [np.asarray(b).tolist() for b in own]
    count = pipe.transformer.config.num_embeds_ada_norm
    assert conditioning(pipe, ["", "1"]) == {"class_labels": [count, 1]}
    found = calibrate(tmp_path, prompts=["1", "2"], seeds=2, steps=2, pipe=pipe, progress=False)
    assert found["model"] == "DiTPipeline"
    assert found["diversity"]["pairs_other_prompt"] == 4
    assert found["diversity"]["pairs_same_prompt"] == 2
    measured = measure_calibration(pipe, pipelines.randn(2, *LatentSpace.of(pipe).shape), ["", "1"], steps=3)
    assert len(measured.error) == 3


def test_the_denoising_error_of_a_pipeline_without_latents():
    # D = 0 leaves the whole energy as its error, at every noise level.
    clean = pipelines.randn(3, 3, 8, 8).clamp(-1, 1)
    pipe = Own(lambda x, t: torch.zeros_like(x))
    measured = measure_calibration(pipe, clean, steps=6)
    assert len(measured.levels) == 6
    assert measured.error == pytest.approx([measured.energy] * 6, rel=1e-5)


def test_calls_that_make_no_sense_are_refused_before_anything_is_sampled(ddpm, monkeypatch):
    _, pipe = ddpm
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", None)
    with pytest.raises(ValueError, match="DDPMPipeline takes no prompt"):
        generate(pipe, ["a cat"], [0], progress=False)
    with pytest.raises(ValueError, match="takes no `guidance_scale`"):
        generate(pipe, [""], [0], progress=False, guidance_scale=3.0)

    class Unseeded(Own):
        def __call__(self, batch_size):
            raise AssertionError

    class Untold(Own):
        def __call__(self, generator):
            raise AssertionError

    with pytest.raises(ValueError, match="takes no `generator`"):
        generate(Unseeded(), [""], [0], progress=False)
    with pytest.raises(TypeError, match="neither what to draw nor how many"):
        generate(Untold(), [""], [0], progress=False)


def test_images_of_every_form():
    array = np.random.default_rng(0).random((2, 8, 8, 3))
    expected = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in array]
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    output = type("Output", (), {"images": expected})()
    forms = [expected, (expected, 1), output, array, tensor, (array * 255).round().astype(np.uint8)]
    for form in forms:
        assert [np.asarray(i).tolist() for i in images_of(None, form)] == [np.asarray(i).tolist() for i in expected]
    assert images_of(None, array[..., :1])[0].mode == "L"
    for wrong in (None, [], {"a": 1}, array[0]):
        with pytest.raises(TypeError, match="holds no images"):
            images_of(Own(), wrong)
    for wrong in (2 * array - 1, 255 * array, array * np.nan):
        with pytest.raises(ValueError, match="values from"):
            images_of(Own(), wrong)


def test_models_that_need_no_prompt_are_known_by_their_folder(ddpm, tmp_path):
    folder, _ = ddpm
    assert not needs_prompt(str(folder))
    assert all(map(needs_prompt, ("emoji", "sd3", "someone/something")))
    for name, needs in [("DiTPipeline", True), ("DDIMPipeline", False), ("SomebodysPipeline", True)]:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        assert needs_prompt(str(tmp_path)) is needs


def test_experiments_take_classes(tmp_path):
    pipe = pipelines.PIPELINES["dit"]().pipe
    pipe.set_progress_bar_config(disable=True)
    study = Study(tmp_path, ["1", "2"], images=2, seeds=1, model="dit", steps=2, progress=False)
    vars(study).update(pipe=pipe, call={"guidance_scale": 2.0})  # in place of the one to be loaded
    made = [study.make(setting, "2", 0, None) for setting in (Setting("plain"), Setting("SPELL", "spell", 1e4))]
    assert made[0]["pair"].min() < 1e4 * (1 - 1e-4) <= made[1]["pair"].min()
    again = study.make(Setting("plain"), "1", 0, None)["latents"]
    assert not torch.equal(again, made[0]["latents"])
