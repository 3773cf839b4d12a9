"""Find how many steps keep the scores: samplers and step counts on the embedded model, without SPELL.

python benchmarks/steps.py --reference emoji128.tar --out steps.md
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from shielded.evaluation.reproduce import Setting, Study, emoji_prompts
from shielded.evaluation.reproduce.measures import SettingMetrics
from shielded.evaluation.reproduce.reference import ReferenceImages

RUNS = {
    "DDIMScheduler": (50, 25, 10),
    "DPMSolverMultistepScheduler": (6, 8, 10, 12, 16),
    "UniPCMultistepScheduler": (8, 10, 12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="real images; without them plain ones of other seeds")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = ["| sampler | steps | caption score | Fréchet | Vendi | s per image |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for sampler, counts in RUNS.items():
            for steps in counts:
                prompts = emoji_prompts(args.prompts, args.reference)
                study = Study(Path(folder), prompts, images=args.images, seeds=1, steps=steps)
                study.sampler = sampler
                reference = ReferenceImages(study, args.reference).features()
                ((_, cells),) = study.cells([Setting(f"{sampler}, {steps}")])
                found = SettingMetrics(cells, [reference[prompt] for prompt in prompts]).estimates()
                value = {name: estimate["value"] for name, estimate in found.items()}
                lines.append(
                    f"| {sampler.removesuffix('Scheduler')} | {steps} | {value['caption']:.3f} "
                    f"| {value['frechet']:.4f} | {value['vendi']:.3f} | {value['seconds']:.2f} |"
                )
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
