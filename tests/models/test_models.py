from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from helpers.pipelines import dit, of_diffusers
from shielded import LatentSpace
from shielded.models import EMOJI, PRESETS, guidance_call, guidance_option, load, names, table

DOCS = Path(__file__).parents[2] / "docs/models.md"


class Loaded:
    """What `DiffusionPipeline.from_pretrained` would give, with what it was asked for."""

    def __init__(self, source, use_safetensors, low_cpu_mem_usage=True, **dtype):
        assert use_safetensors
        self.low_cpu_mem_usage = low_cpu_mem_usage
        self.source, (self.dtype,) = source, dtype.values()

    def set_progress_bar_config(self, **options):
        pass

    def to(self, device):
        self.device = device
        return self


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", staticmethod(Loaded))


def test_names_lead_to_the_hub(hub):
    assert names()[0] == "emoji"
    for name in names():
        pipe = load(name, device="cuda")
        assert pipe.source == PRESETS[name].source
        assert pipe.dtype == PRESETS[name].dtype
        assert name == "emoji" or re.fullmatch(r"[\w.-]+/[\w.-]+", pipe.source)
        assert load(name, device="cpu").dtype == torch.float32
    assert load("sd3", device="cuda:1", dtype=torch.float32).dtype == torch.float32
    other = load("someone/something", device="cuda")
    assert (other.source, other.dtype, other.device) == ("someone/something", torch.float32, "cuda")


def test_diffusers_is_not_asked_for_what_needs_accelerate(hub, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not load("sd3", device="cpu").low_cpu_mem_usage  # or diffusers recommends it at each part


def test_device_is_the_processor_where_there_is_no_other(hub, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load("sd3").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load("sd3").device == "cuda"


@pytest.mark.parametrize("wrong", ["sd33", "a/b/c", "/nowhere/at-all", str(Path(__file__).parent)])
def test_unknown_names_list_the_known_ones(hub, wrong):
    with pytest.raises(ValueError, match=r"known names: emoji, sd1\.5, .*owner/name on the hub"):
        load(wrong)


def test_a_saved_pipeline(tmp_path):
    dit().pipe.save_pretrained(tmp_path)
    pipe = load(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert type(pipe) is diffusers.DiTPipeline
    assert pipe.transformer.dtype == torch.bfloat16


def test_weights_of_the_embedded_text_encoder_are_found():
    """transformers 4 names them otherwise than 5, and leaves what it does not find at random."""
    weights = load_file(EMOJI / "text_encoder" / "model.safetensors")
    loaded = {name.removeprefix("text_model."): value for name, value in load().text_encoder.state_dict().items()}
    for name, value in weights.items():
        assert torch.equal(loaded[name.removeprefix("text_model.")], value.float()), name


def test_embedded_preset_is_the_model_in_the_package():
    preset, space = PRESETS["emoji"], LatentSpace.of(load("emoji", device="cpu"))
    assert preset.source == EMOJI
    assert preset.image_size == space.image_size
    assert (
        guidance_call(load("emoji", "cpu"), "emoji") == {"guidance_scale": preset.guidance} == {"guidance_scale": 3.0}
    )


def test_radius_of_the_paper():
    """200 for Stable Diffusion 3 at 512 pixels, whose latents are 16×64×64."""
    assert PRESETS["sd3"].radius == pytest.approx(200 / (16 * 64 * 64) ** 0.5, abs=0.005)
    for preset in PRESETS.values():
        assert "untested" in preset.evidence or preset in (PRESETS["emoji"], PRESETS["sd3"])


def test_guidance_of_other_names():
    assert guidance_call(diffusers.QwenImagePipeline, "qwen-image") == {"true_cfg_scale": 4.0}
    assert guidance_call(diffusers.QwenImagePipeline, "someone/something") == {}
    assert guidance_call(diffusers.QwenImagePipeline, "someone/something", 2.0) == {"true_cfg_scale": 2.0}


@pytest.mark.parametrize(
    ("names", "pipeline"),
    [
        (("sd1.5", "sd2.1"), "StableDiffusionPipeline"),
        (("sdxl", "sdxl-turbo"), "StableDiffusionXLPipeline"),
        (("sd3", "sd3.5-medium", "sd3.5-large"), "StableDiffusion3Pipeline"),
        (("flux-dev", "flux-schnell"), "FluxPipeline"),
        (("flux2-dev",), "Flux2Pipeline"),
        (("flux2-klein",), "Flux2KleinPipeline"),
        (("pixart-sigma",), "PixArtSigmaPipeline"),
        (("sana",), "SanaPipeline"),
        (("qwen-image",), "QwenImagePipeline"),
        (("z-image-turbo",), "ZImagePipeline"),
        (("wan2.1", "wan2.2"), "WanPipeline"),
        (("ltx",), "LTXPipeline"),
        (("dit",), "DiTPipeline"),
    ],
)
def test_options_exist_in_the_pipelines(names, pipeline):
    """What a preset says can be passed to the pipeline that its model is made for."""
    parameters = inspect.signature(of_diffusers(pipeline).__call__).parameters
    option = guidance_option(of_diffusers(pipeline))
    for name in names:
        preset = PRESETS[name]
        assert {"num_inference_steps", option} <= parameters.keys()
        assert (preset.num_frames is not None) == ("num_frames" in parameters)
        default = parameters["height"].default if "height" in parameters else None
        assert default in (None, preset.image_size[0]) or "height" in preset.note


def test_table_in_the_docs_is_the_presets():
    """If not: print(shielded.models.table()) and put it there."""
    assert table() in DOCS.read_text()
