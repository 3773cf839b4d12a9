"""Encode a folder of images into a protected set on disk, and keep a pipeline away from all of them.

python examples/protected_folder.py --out out                    # protects two pictures that the model makes itself
python examples/protected_folder.py --out out --images my-folder
"""

import argparse
from pathlib import Path

import torch

from shielded import LatentSpace, ProtectedSet, Spell
from shielded.models import load
from shielded.protected import add_images

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--images", type=Path)
parser.add_argument("--model", default="emoji")
parser.add_argument("--prompt", default="red heart")
parser.add_argument("--radius", type=float, default=15.0, help="of the shields, L2 in the latent space")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
pipe = load(args.model)


def generate(**options):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe([args.prompt] * 2, num_inference_steps=15, guidance_scale=3.0, generator=generators, **options).images


folder = args.images
if folder is None:
    folder = args.out / "images"
    folder.mkdir(exist_ok=True)
    for seed, image in enumerate(generate()):
        image.save(folder / f"{seed}.png")

protected = ProtectedSet.create(args.out / "set", LatentSpace.of(pipe), overwrite=True)
add_images(protected, folder, radius=args.radius, progress=False)
print(f"protected images: {len(protected)}")

plain = generate(output_type="latent")
spell = Spell(ProtectedSet.open(args.out / "set"), batch=False)  # the radius of each image is stored with it
with spell.attach(pipe):
    for seed, image in enumerate(generate()):
        image.save(args.out / f"kept-{seed}.png")

for name, latents in (("without SPELL", plain), ("with SPELL", spell.finished)):
    distances, ids = protected.nearest(latents)
    for distance, (nearest,) in zip(distances[:, 0], ids, strict=True):
        print(f"{name}: {distance:.2f} from {nearest}")
