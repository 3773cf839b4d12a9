"""One image at a time, each away from all that were made before: the history lives in a folder between runs.

python examples/history.py --history seen --seed 0    # run it again with another seed
"""

import argparse
from pathlib import Path

import torch

from shielded import History, LatentSpace, Spell
from shielded.models import load

parser = argparse.ArgumentParser()
parser.add_argument("--history", type=Path, required=True)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--model", default="emoji")
parser.add_argument("--prompt", default="red heart")
parser.add_argument("--radius", type=float, default=26.0, help="L2 in the latent space")
args = parser.parse_args()

pipe = load(args.model)
history = History.open(args.history, LatentSpace.of(pipe))
earlier = history.latents
spell = Spell(radius=args.radius, batch=False, history=history)
with spell.attach(pipe):
    generator = torch.Generator().manual_seed(args.seed)
    pipe(args.prompt, num_inference_steps=10, guidance_scale=3.0, generator=generator)

if len(earlier):
    nearest = torch.cdist(spell.finished.double().flatten(1), earlier.double().flatten(1)).min()
    print(f"image {len(history)}: {nearest:.2f} from the nearest of the {len(earlier)} before")
else:
    print("image 1: nothing to keep away from yet")
