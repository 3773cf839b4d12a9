"""Weights in pickles, which can run code, are not loaded."""

import pytest
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from shielded.models import load


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("pickled", [False, True])
def test_pickled_weights_are_refused(tmp_path, scheduler, pickled):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks)
    DDPMPipeline(unet, scheduler()).save_pretrained(tmp_path, safe_serialization=not pickled)
    if pickled:
        with pytest.raises(OSError, match="safetensors"):
            load(str(tmp_path))
    else:
        assert load(str(tmp_path)).unet.config.sample_size == 8
