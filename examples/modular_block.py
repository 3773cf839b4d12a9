"""Modular diffusers: SPELL as a block of the denoising loop, to be shared like any other block.

Needed only for that: `with spell.attach(pipe)` works on modular pipelines as on all others. The network is made in
memory here, which takes diffusers 0.36.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from shielded import Spell, x0_coefficients


class SpellStep(ModularPipelineBlocks):
    """Block between `denoiser` and `after_denoiser`; pass spell=... to the pipeline."""

    model_name = "flux"
    description = "Pushes the predicted clean latents out of the shields of a Spell."

    @property
    def inputs(self):
        return [InputParam("spell", required=True), InputParam("latents", required=True)]

    def __call__(self, components, state, i, t):
        a, b = x0_coefficients(components.scheduler, t)
        x0 = a * state.latents.float() + b * state.noise_pred.float()
        # A flow model at time −b: noise = x0 + velocity.
        delta = state.spell(x0, noise=x0 + state.noise_pred.float(), alpha=1 + b, sigma=-b)
        state.noise_pred = (state.noise_pred + delta / b).to(state.noise_pred.dtype)
        return components, state


def run(blocks, spell=None):
    """Sample two images with a small random FLUX."""
    torch.manual_seed(0)  # models have no generator argument
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    blocks.set_progress_bar_config(disable=True)
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=scheduler)
    inputs = {
        "latents": torch.randn(2, 16, 16),  # 16 tokens
        "prompt_embeds": torch.randn(2, 4, 16),
        "pooled_prompt_embeds": torch.randn(2, 16),
        "txt_ids": torch.zeros(4, 3),
        "img_ids": torch.zeros(16, 3),
        "timesteps": scheduler.timesteps,
        "num_inference_steps": 8,
    }
    return pipe(**inputs, **({"spell": spell} if spell else {}), output="latents")


plain = run(FluxDenoiseStep())
blocks = FluxDenoiseStep()
blocks.sub_blocks.insert("spell", SpellStep(), 1)
kept = run(blocks, Spell(plain, radius=5.0, overcompensation=1.0, batch=False))
for name, latents in (("without SPELL", plain), ("with SPELL", kept)):
    nearest = torch.cdist(latents.flatten(1), plain.flatten(1)).min()
    print(f"{name}: nearest protected image {nearest:.2f}, radius 5.0")
