"""The main job on the embedded model: protect what the plain model makes, then generate with the same seeds again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from shielded.generation import Generated
from shielded.generation.repair import OnLeak
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, PROTECTION, PROTECTION_RADIUS, VARIETY, VARIETY_RADIUS, guidance_call, load
from shielded.protected import ProtectedSet
from shielded.runs.folder import RunFolder
from shielded.runs.paired import calibration_of, make_pair, spell_arguments
from shielded.runs.report import Diversity
from shielded.runs.results import PairReport
from shielded.spell import Spell

PROMPTS = ("red heart", "pizza", "owl", "sunflower")
SEEDS = (0, 1, 2, 3)
DIVERSITY_PROMPT = "red heart"
DIVERSITY_SEEDS = (0, 1, 2, 3, 4, 5, 6, 7)


def demo(
    out: Path,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    seed: int = 0,
    steps: int = 25,
    radius: float | None = None,
    diversity_radius: float | None = None,
    overcompensation: float | None = None,
    device: str | None = None,
    progress: bool = True,
    on_leak: OnLeak = "restart",
    attempts: int = 3,
) -> dict[str, Any]:
    """Write grids, certificates, `report.html` and `report.json` to the folder `out` and return the report.

    Part one generates prompts × 4 seeds plainly, protects the pictures, and generates the same prompts and seeds with
    SPELL. Part two generates one prompt with 8 seeds without and with batch repellency.

    Args:
        out: folder; files of an earlier run are replaced.
        prompts: of part one.
        seed: added to all seeds.
        steps: of the sampler.
        radius: of the shields in part one, L2; None: `PROTECTION_RADIUS` √dim.
        diversity_radius: distance that the images of part two keep from each other, L2; None: `VARIETY_RADIUS` √dim.
        overcompensation: λ; None: that of `PROTECTION` and of `Spell`.
        device: None: CUDA if there is one.
        progress: whether progress bars are shown.
        on_leak: what to do with an image that still lies inside a shield; see `generate`.
        attempts: limit on how often such an image is sampled.
    """
    out.mkdir(parents=True, exist_ok=True)
    pipe = load(DEFAULT_MODEL, device)
    space = LatentSpace.of(pipe)
    radius = radius or PROTECTION_RADIUS * space.dim**0.5
    diversity_radius = diversity_radius or VARIETY_RADIUS * space.dim**0.5
    options: dict[str, Any] = {"steps": steps, **guidance_call(pipe, DEFAULT_MODEL)}
    given = {} if overcompensation is None else {"overcompensation": overcompensation}
    calibration = calibration_of(DEFAULT_MODEL)
    every_prompt = [prompt for prompt in prompts for _ in SEEDS]
    every_seed = [seed + s for _ in prompts for s in SEEDS]

    def protect(plain: Generated) -> Spell:
        protected = ProtectedSet.create(out / "protected", space, overwrite=True)
        names = [f"{p}, seed {s}" for p, s in zip(every_prompt, every_seed, strict=True)]
        plain.decoded = space.encode(plain.images)
        protected.add(plain.decoded, names, radius)
        return Spell(protected, radius, batch=False, calibration=calibration, **{**PROTECTION, **given})

    folder = RunFolder(out)
    protection = make_pair(
        pipe,
        every_prompt,
        every_seed,
        protect,
        model=DEFAULT_MODEL,
        options=options,
        on_leak=on_leak,
        attempts=attempts,
        folder=folder,
        progress=progress,
    )
    protection = cast(PairReport, protection)  # one process
    call = spell_arguments(protection.spell, "protected")
    if protection.stopped is not None:
        return folder.finish(protection, call)
    spread = make_pair(
        pipe,
        [DIVERSITY_PROMPT] * len(DIVERSITY_SEEDS),
        [seed + s for s in DIVERSITY_SEEDS],
        Spell(radius=diversity_radius, **{**VARIETY, **given}),
        model=DEFAULT_MODEL,
        options=options,
        labels=("one prompt, without SPELL", "one prompt, with SPELL"),
        progress=progress,
        score=True,
    )
    spread = cast(PairReport, spread)
    return folder.finish(protection, call, extra=_extra(spread), diversity=_diversity(spread))


def _diversity(spread: PairReport) -> Diversity:
    return Diversity(
        prompt=DIVERSITY_PROMPT,
        seeds=[row.seed for row in spread.rows],
        without=[row.without for row in spread.rows if row.without is not None],
        with_=[row.with_ for row in spread.rows if row.with_ is not None],
        vendi_without=cast(float, spread.plain.vendi),  # the embedded model comes with an encoder
        vendi_with=cast(float, spread.with_.vendi),
        radius=cast(float, spread.radius),
    )


def _extra(spread: PairReport) -> dict[str, Any]:
    """Content of `report.json` about part two."""
    return {
        "vendi_without": spread.plain.vendi,
        "vendi_with": spread.with_.vendi,
        "diversity": {
            "prompt": DIVERSITY_PROMPT,
            "radius": spread.radius,
            "min_pair_distance_without": spread.plain.min_pair_distance,
            "min_pair_distance_with": spread.with_.min_pair_distance,
            "seconds_without": spread.plain.seconds,
            "seconds_with": spread.with_.seconds,
        },
    }
