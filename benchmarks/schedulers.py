"""Table of the schedulers of diffusers: how exactly x0 + Δ is reproduced, and which classes are refused and why.

python benchmarks/schedulers.py --out docs/schedulers.md
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from itertools import groupby
from pathlib import Path

import diffusers
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.scheduler_cases import BOUND, CASES, corrected_error, prediction_of, traces_left
from shielded.samplers.coefficients import REFUSED

FP32, BF16 = torch.float32, torch.bfloat16

TEXT = f"""\
# Schedulers of diffusers

diffusers {diffusers.__version__}, written by `python benchmarks/schedulers.py --out docs/schedulers.md`. The tests \
run the same cases and assert the bounds stated here; a class that diffusers exports and that is in neither table \
fails them.

A random linear model is sampled for 5 steps with a correction Δ of unit variance at each evaluation of the model, in \
two of three images. **Error** is max |x0' − (x0 + Δ)| / max |x0 + Δ|, the largest over all evaluations and over all \
option sets of the class (`tests/helpers/scheduler_cases.py`: noise schedules, solver orders and types, shifts), where \
x0 is what the Spell was given and x0' what the scheduler goes on with. x0' is read where the scheduler shows it, \
without use of this package's coefficients:

- *returned*: by the step, as `pred_original_sample` or `denoised`;
- *kept*: in the history of a multistep solver, `model_outputs`;
- *solved*: the same step is repeated in float64 without noise, from the model output that was handed to the \
scheduler, and x0 solved from its result by the solver's published formula. This undoes the combination with earlier \
model outputs of multistep solvers, of Heun's second half and of all four evaluations of Runge-Kutta.

The bound is {BOUND[FP32]:.0e} in float32 and {BOUND[BF16]:.0e} in bfloat16, which has 8 bits: there the scheduler's \
own x0 is rounded as coarsely. **Clipped** is the float32 error with `clip_sample` or `thresholding`: the correction \
has to make up for what is clipped off, which an epsilon model exaggerates by 1/α at the noisy end, so the bound \
is 4 ε max|x|/α on top (ε of the dtype; in bfloat16 such a correction is lost in the first steps). Distances are not \
guaranteed with clipping anyway. **Same**: a correction of zero leaves latents and generator bit-identical, \
in float32 and in bfloat16. **Restored**: after the context the scheduler's `step` is its own again and gives \
the plain latents, after a run with Δ.
"""


def row(name: str, prediction: str, cases: list) -> str:
    plain, clipped, coarse, traces, ways = [], [], [], [], set()
    for case in cases:
        landed = corrected_error(case)
        ways.add(landed.how)
        if landed.slack:
            clipped.append(landed.error)
        else:
            plain.append(landed.error)
            coarse.append(corrected_error(case, BF16).error)
        traces += [traces_left(case, dtype) for dtype in (FP32, BF16)]
    same, restored = ("yes" if all(found) else "no" for found in zip(*traces, strict=True))
    clip = f"{max(clipped):.0e}" if clipped else ""
    errors = f"{max(plain):.0e} | {max(coarse):.0e} | {clip}"
    how = ", ".join(sorted(ways))
    return f"| {name} | {prediction} | {how} | {len(cases)} | {errors} | {same} | {restored} |"


def supported() -> list[str]:
    lines = [
        "| scheduler | prediction | x0' | option sets | error fp32 | error bf16 | clipped | same | restored |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def key(case):
        return case[0], prediction_of(case)

    for (name, prediction), cases in groupby(sorted(CASES, key=key), key):
        lines.append(row(name, prediction, list(cases)))
        print(lines[-1], flush=True)
    return lines


def refused() -> list[str]:
    rows = [f"| {name} | {reason} | {instead} |" for name, (reason, instead) in sorted(REFUSED.items())]
    return ["| refused | because | instead |", "|---|---|---|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity(logging.ERROR)
    args.out.write_text("\n".join([TEXT, *supported(), "", *refused()]) + "\n")


if __name__ == "__main__":
    main()
