"""k-diffusion: any of its samplers on the embedded model. Needs `pip install k-diffusion`.

A model that predicts noise or velocity at timesteps becomes a denoiser D(x; sigma) by rescaling; see `denoiser_of`.
"""

import torch
from k_diffusion.sampling import get_sigmas_karras, sample_dpmpp_2m

from shielded import LatentSpace, RepelledDenoiser, Spell
from shielded.models import load

RADIUS = 15.0


def denoiser_of(pipe, prompt, guidance):
    """Guided x0 of a variance-preserving v-prediction UNet at x = x0 + sigma · noise."""
    sigmas = (1 / pipe.scheduler.alphas_cumprod - 1).sqrt()
    text, empty = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=True)

    @torch.no_grad()
    def denoise(x, sigma):
        timestep = (sigmas - sigma[0]).abs().argmin()
        scale = (1 + sigma[0] ** 2).sqrt()
        both = torch.cat([empty, text]).repeat_interleave(len(x), dim=0)
        uncond, cond = pipe.unet(torch.cat([x, x]) / scale, timestep, both).sample.chunk(2)
        velocity = uncond.lerp(cond, guidance)
        return x / scale**2 - sigma[0] / scale * velocity

    return denoise, float(sigmas[0]), float(sigmas[-1])


pipe = load("emoji")
denoise, sigma_min, sigma_max = denoiser_of(pipe, "red heart", guidance=3.0)
sigmas = get_sigmas_karras(10, sigma_min, sigma_max)
noise = sigma_max * torch.randn(2, *LatentSpace.of(pipe).shape, generator=torch.Generator().manual_seed(0))

plain = sample_dpmpp_2m(denoise, noise, sigmas, disable=True)
spell = Spell(plain, RADIUS, batch=False)
spell.start()
kept = sample_dpmpp_2m(RepelledDenoiser(denoise, spell), noise, sigmas, disable=True)
kept = spell.finish(kept)
for name, latents in (("without SPELL", plain), ("with SPELL", kept)):
    nearest = torch.cdist(latents.double().flatten(1), plain.double().flatten(1)).min()
    print(f"{name}: nearest protected image {nearest:.2f}, radius {RADIUS}")
