"""diffusers: keep a pipeline away from given images, and the images of one call apart.

python examples/diffusers_pipeline.py
python examples/diffusers_pipeline.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --radius 100
"""

import argparse

import torch

from shielded import Spell
from shielded.models import load

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="emoji", help="the embedded model, a folder, or a name on the Hugging Face hub")
parser.add_argument("--prompt", default="red heart")
parser.add_argument("--radius", type=float, default=15.0, help="L2 in the latent space")
args = parser.parse_args()
pipe = load(args.model)


def generate():
    """Sample four images of the prompt with fixed seeds, and return their latents."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe(args.prompt, num_images_per_prompt=4, generator=generator, **options).images


plain = generate()
with Spell(protected=plain, radius=args.radius).attach(pipe):  # batch=True is the default
    kept = generate()

for name, latents in (("without SPELL", plain), ("with SPELL", kept)):
    points = latents.double().flatten(1)
    nearest = torch.cdist(points, plain.double().flatten(1)).min()
    print(f"{name}: nearest protected image {nearest:.2f}, closest pair {torch.pdist(points).min():.2f}")
