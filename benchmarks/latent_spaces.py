"""Which pipelines of diffusers `LatentSpace.of` understands: the table of docs/latent_spaces.md.

Each one that it accepts is checked: latents go through the pipeline's own statements between sampler and decoder, and
have to arrive as `LatentSpace` says, in both directions. Takes about two minutes on one core.

    python benchmarks/latent_spaces.py --out docs/latent_spaces.md
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import diffusers

from helpers.decoding import classes, part, round_trip
from shielded.latent_space.families import PIXELS

START = "<!-- benchmarks/latent_spaces.py -->"


def table() -> str:
    accepted: dict[tuple[str, str], list[str]] = defaultdict(list)
    refused: dict[str, list[str]] = defaultdict(list)
    pixels: list[str] = []
    for name in classes():
        if name in PIXELS:
            pixels.append(name)
            continue
        try:
            order, _ = round_trip(name)
        except TypeError as error:
            why = str(error).split(f"of {name}: ")[-1].split(". LatentSpace(")[0]
            refused[why].append(name)
        else:
            accepted[part(name, "vae") or "", order].append(name)
    count = sum(map(len, accepted.values()))
    lines = [
        f"diffusers {diffusers.__version__}: {count} pipeline classes accepted, checked in both directions.",
        "",
    ]
    lines += ["| autoencoder | order of the sampler's latents | pipelines |", "|---|---|---|"]
    lines += [f"| {vae} | {order} | {', '.join(names)} |" for (vae, order), names in sorted(accepted.items())]
    lines += ["", f"Of pixels, as `LatentSpace.pixels`: {', '.join(pixels)}."]
    lines += ["", f"{sum(map(len, refused.values()))} classes refused:", "", "| reason | pipelines |", "|---|---|"]
    lines += [f"| {why} | {', '.join(names)} |" for why, names in sorted(refused.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page whose table is replaced")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    made = table()
    if out is None:
        print(made)
    else:
        out.write_text(out.read_text().split(START)[0] + START + "\n\n" + made)


if __name__ == "__main__":
    main()
