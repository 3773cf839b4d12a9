"""How guidance is released in each kind of pipeline: docs/guidance.md.

python benchmarks/guidance.py --out docs/guidance.md

Small random models in diffusers' own pipelines. Four images each: an idle Spell must change no bit; then guidance is
released in two of the four at every step, and these are compared with a run without guidance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.pipelines import PIPELINES, randn, run, tiny
from helpers.release import OFF, ROWS, Release
from shielded import Spell
from shielded.files import replace_section
from shielded.samplers import attach


def row(name: str) -> str:
    """Measure one pipeline and return its row of the table."""
    small = tiny(name)
    plain = torch.as_tensor(run(small))
    far = Spell(randn(1, *_latents(small).shape[1:], seed=9) * 1e4, radius=1.0, batch=False, release=0.5)
    with far.attach(small.pipe):
        idle = torch.equal(torch.as_tensor(run(small)), plain)
    correct = Release()
    with attach(small.pipe, correct):
        latents = torch.as_tensor(run(small))
    kept = torch.equal(latents[~ROWS], plain[~ROWS])
    error = "–"
    if not str(correct.guidance).startswith("not released"):
        without = torch.as_tensor(run(small, **OFF.get(name, {"guidance_scale": 1.0})))
        difference = float((latents[ROWS] - without[ROWS]).abs().max() / without.abs().max())
        error = f"{difference:.0e}" if difference else "0"
    cells = (name, type(small.pipe).__name__, str(correct.guidance), _yes(idle), _yes(kept), error)
    return f"| {' | '.join(cells)} |"


def _latents(small: object) -> torch.Tensor:
    """The sampler's latents of a run, whatever the pipeline returns."""
    correct = Release(rows=None)
    with attach(small.pipe, correct):
        run(small)
    return correct.finished


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page whose table is written anew")
    args = parser.parse_args()
    head = (
        "| model | pipeline | guidance released | idle: bit-identical | other rows: bit-identical | "
        "largest difference from a run without guidance |\n|---|---|---|---|---|---|"
    )
    table = "\n".join([head, *(row(name) for name in PIPELINES)])
    print(table)
    if args.out:
        replace_section(args.out, "guidance", table)


if __name__ == "__main__":
    main()
