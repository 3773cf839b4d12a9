"""Inpainting: distance and push count only inside the mask; the known part of the image does not change.

Pipelines of diffusers that inpaint paste the known part by themselves, for models of four or nine channels. Here a
callback does it, for any model.
"""

import torch

from shielded import LatentSpace, Spell
from shielded.models import load

RADIUS = 8.0  # of half an image

pipe = load("emoji")
space = LatentSpace.of(pipe)
picture = pipe("pizza", num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0]
known = space.encode([picture])
mask = torch.zeros(space.shape[1:])
mask[:, mask.shape[1] // 2 :] = 1  # the right half is generated


def generate():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(known.shape, generator=generator)

    def paste(pipe, step, timestep, tensors):
        """Put the known part, at the noise level that comes next, over what the model made."""
        later = pipe.scheduler.timesteps[step + 1 :]
        here = pipe.scheduler.add_noise(known, noise, later[:1]) if len(later) else known
        return {**tensors, "latents": mask * tensors["latents"] + (1 - mask) * here}

    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("pizza", latents=noise, callback_on_step_end=paste, **options).images


plain = generate()
with Spell(plain, RADIUS, batch=False, mask=mask).attach(pipe):
    kept = generate()
moved = (kept - plain)[0]
print(f"in the hole: {(moved * mask).norm():.2f} from the protected picture, radius {RADIUS}")
print(f"elsewhere: {(moved * (1 - mask)).norm():.2f}")
