"""Load a pipeline by its model's name, and the options of its calls."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from shielded._extras import missing, watched
from shielded.models import DEFAULT_MODEL
from shielded.models.guidance import guidance_option
from shielded.models.presets import PRESETS, preset_of
from shielded.models.versions import dtype_option


def names() -> list[str]:
    """List the names that `load` knows, the embedded model first."""
    return list(PRESETS)


def load(
    model: str = DEFAULT_MODEL, device: str | None = None, dtype: torch.dtype | None = None, progress: bool = True
) -> Any:
    """Load a diffusers pipeline by a model's name, from a folder, or from the Hugging Face hub.

    Args:
        model: one of `names()`, the path of a saved pipeline, or "owner/name".
        device: torch device; None: CUDA if there is one, else the CPU.
        dtype: of the weights; None: the preset's, but float32 on the CPU and for models without a preset.
        progress: whether the bars of a longer load are shown, on a terminal.

    Raises:
        ImportError: diffusers or transformers is not installed.
        ValueError: neither a known name nor a folder with a saved pipeline nor of the form owner/name.
    """
    _require_diffusers()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset, source = preset_of(model), locate(model)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else preset.dtype
    with quiet(not preset.embedded) if preset.embedded or not (progress and watched()) else nullcontext():
        from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # the documented path

        if isinstance(source, Path):
            _import(source)
        try:
            options = dtype_option(dtype) | _memory_option()
            pipe = DiffusionPipeline.from_pretrained(source, **options, use_safetensors=True)  # no pickle
        except OSError as error:
            if isinstance(source, Path):
                raise
            raise OSError(
                f"{source} is no folder here, and could not be loaded from the Hugging Face hub: check the name, the "
                "network, and whether you have accepted the model's licence."
            ) from error
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def locate(model: str) -> str | Path:
    """Return the folder of a model, or its name on the Hugging Face hub; the hub is not contacted.

    Raises:
        ValueError: neither a known name nor a folder with a saved pipeline nor of the form owner/name.
    """
    if model in PRESETS:
        return PRESETS[model].source
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() or str(model).count("/") != 1 or os.path.isabs(model):
        here = ", a folder without model_index.json" if folder.is_dir() else ""
        raise ValueError(
            f"unknown model {str(model)!r}{here}; known names: {', '.join(names())}. "
            "A folder with a saved diffusers pipeline (model_index.json) and owner/name on the hub work too."
        )
    return model


def call_options(pipe: Any, model: str, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
    """Return the options of a pipeline call besides prompt and seed.

    Args:
        pipe: the model's pipeline.
        model: as `load` takes it.
        steps: sampler steps; None: the preset's, or 25.
        guidance: guidance scale; None: the preset's, or the pipeline's default.
    """
    return {"steps": steps or preset_of(model).steps, **guidance_call(pipe, model, guidance)}


def guidance_call(pipe: Any, model: str, guidance: float | None = None) -> dict[str, Any]:
    """Return the guidance scale as a keyword argument of the pipeline; empty: the pipeline's default.

    Args:
        pipe: the model's pipeline.
        model: as `load` takes it.
        guidance: guidance scale; None: the preset's.
    """
    scale = preset_of(model).guidance if guidance is None else guidance
    return {} if scale is None else {guidance_option(pipe): scale}


def _require_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("diffusers", "transformers"):
            raise
        raise ImportError(missing("Pipelines of diffusers", "diffusers")) from None


def _memory_option() -> dict[str, bool]:
    """Ask diffusers for no more than it can do without accelerate, so that it recommends no package at each part."""
    return {} if importlib.util.find_spec("accelerate") else {"low_cpu_mem_usage": False}


def _import(folder: Path) -> None:
    """Import the class of a saved pipeline without printing its hints about torchvision."""
    import diffusers

    with quiet():
        getattr(diffusers, json.loads((folder / "model_index.json").read_text()).get("_class_name", ""), None)


@contextmanager
def quiet(warnings: bool = False) -> Iterator[None]:
    """Silence the libraries' hints about parts that the embedded model does not use, and their progress bars.

    Args:
        warnings: let the hints through.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        if not warnings:
            library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
