"""The keyword of the guidance scale, for the pipelines of all presets."""

import pytest

from helpers.pipelines import of_diffusers
from shielded.models import guidance_option, load


@pytest.mark.parametrize(
    ("pipeline", "option"),
    [
        ("StableDiffusionPipeline", "guidance_scale"),
        ("StableDiffusionXLPipeline", "guidance_scale"),
        ("StableDiffusion3Pipeline", "guidance_scale"),
        ("FluxPipeline", "guidance_scale"),
        ("Flux2Pipeline", "guidance_scale"),
        ("PixArtSigmaPipeline", "guidance_scale"),
        ("SanaPipeline", "guidance_scale"),
        ("QwenImagePipeline", "true_cfg_scale"),
        ("ZImagePipeline", "guidance_scale"),
        ("WanPipeline", "guidance_scale"),
        ("LTXPipeline", "guidance_scale"),
        ("DiTPipeline", "guidance_scale"),
    ],
)
def test_each_pipeline_takes_it_by_this_name(pipeline, option):
    assert guidance_option(of_diffusers(pipeline)) == option


def test_the_embedded_model():
    assert guidance_option(load("emoji", "cpu")) == "guidance_scale"
