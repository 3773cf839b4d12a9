"""Inpainting: distance and push count only inside the mask; the known part of the image does not change."""

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from shielded import Spell
from shielded.models import load

RADIUS = 8.0  # of half an image

pipe = load("emoji")
picture = pipe("pizza", num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images[0]
hole = Image.new("L", picture.size)
hole.paste(255, (picture.width // 2, 0, *picture.size))  # the right half is generated
mask = torch.zeros(1, 16, 16)  # the same in the latent space, broadcast over channels
mask[:, :, 8:] = 1

inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
inpaint.set_progress_bar_config(disable=True)


def generate():
    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "strength": 1.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(1)
    return inpaint("pizza", picture, hole, height=128, width=128, generator=generator, **options).images


plain = generate()
with Spell(plain, RADIUS, batch=False, mask=mask).attach(inpaint):
    kept = generate()
moved = (kept - plain)[0]
print(f"in the hole: {(moved * mask).norm():.2f} from the protected picture, radius {RADIUS}")
print(f"elsewhere: {(moved * (1 - mask)).norm():.2f}")
