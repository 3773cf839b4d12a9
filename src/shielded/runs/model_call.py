"""A model as it is to be called: its pipeline, changed as asked for, and the options of each call."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from shielded._extras import RequestError
from shielded.files import file_sha256
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, call_options, load
from shielded.models.calls import set_progress
from shielded.models.guidance import guidance_option
from shielded.models.loading import quiet
from shielded.models.lora import add_lora
from shielded.protected.ingest.pictures import decode_picture
from shielded.samplers.named import use_scheduler


@dataclass(frozen=True)
class ModelCall:
    """How images are sampled, whatever keeps them apart.

    Args:
        model: as `shielded.models.load` takes it.
        steps: of the sampler; None: the model's.
        guidance: scale; None: the model's.
        negative: what images should not show; None: nothing.
        size: (width, height) in pixels; None: the model's.
        scheduler: another one, as `use_scheduler` takes it; None: the model's.
        loras: low-rank adapters, (file, scale) each.
        image: picture to start from, for image to image; None: noise.
        strength: share of the steps that are taken from that picture; None: the pipeline's default.
    """

    model: str = DEFAULT_MODEL
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    image: Path | None = None
    strength: float | None = None

    def open(self, device: str | None = None, progress: bool = True) -> OpenModel:
        """Load the pipeline and prepare its call.

        Raises:
            FileNotFoundError: there is no picture or adapter at a path.
            RequestError: what is asked for does not fit the model.
        """
        source = None if self.image is None else _picture(self.image)
        pipe = load(self.model, device, progress=progress)
        if self.scheduler is not None:
            use_scheduler(pipe, self.scheduler)
        for path, scale in self.loras:
            add_lora(pipe, path, scale)
        options = call_options(pipe, self.model, self.steps, self.guidance)
        if self.negative is not None:
            _require_guidance(pipe, options)
            options["negative_prompt"] = self.negative
        width, height = self.size or (None, None)
        inputs: dict[str, Any] = {}
        if source is not None:
            pipe = _image_to_image(pipe)
            space = LatentSpace.of(pipe, height, width)
            assert space.image_size is not None  # read off a pipeline
            down, across = space.image_size
            inputs["image"] = ImageOps.fit(source, (across, down), Image.Resampling.LANCZOS)
            options |= {} if self.strength is None else {"strength": self.strength}
            if int(options["steps"] * options.get("strength", 1)) < 1:
                raise RequestError(
                    f"{options['steps']} steps at strength {self.strength:g} leave none to take; give more of either."
                )
        else:
            space = LatentSpace.of(pipe, height, width)
            options |= {} if self.size is None else {"height": height, "width": width}
        files = {"lora": [_file(path) | {"scale": scale} for path, scale in self.loras]} if self.loras else {}
        files |= {} if self.image is None else {"image": _file(self.image)}
        return OpenModel(pipe, space, options, inputs, files)


@dataclass(frozen=True)
class OpenModel:
    """A loaded pipeline and what each call passes to it.

    Args:
        pipe: the pipeline.
        space: of its latents.
        options: of a call, in JSON types.
        inputs: of a call, not in JSON types.
        files: what certificates say of files that went in: name and digest.
    """

    pipe: Any
    space: LatentSpace
    options: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


def _require_guidance(pipe: Any, options: dict[str, Any]) -> None:
    """Refuse a negative prompt where nothing reads it."""
    name = guidance_option(pipe)
    parameter = inspect.signature(pipe.__call__).parameters.get(name)
    scale = options.get(name, None if parameter is None else parameter.default)
    if isinstance(scale, int | float) and scale <= 1:
        raise RequestError(
            f"a negative prompt does nothing at a guidance scale of {scale:g}; leave it out, or guide by more than 1."
        )


def _picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture at {path}.")
    try:
        return decode_picture(path.read_bytes())
    except (OSError, ValueError):
        raise RequestError(f"{path} is not a picture that can be read.") from None


def _image_to_image(pipe: Any) -> Any:
    try:
        with quiet():
            from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image

            made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError:
        raise RequestError(f"{type(pipe).__name__} has no relative that starts from a picture.") from None
    set_progress(made, disable=True)
    return made


def _file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": file_sha256(path)}
