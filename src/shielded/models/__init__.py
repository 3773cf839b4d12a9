"""Models by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from shielded.models.presets import EMOJI, PRESETS, Preset, table

__all__ = ["EMOJI", "GUIDANCE", "PRESETS", "Preset", "load", "names", "table"]

GUIDANCE = {name: preset.guidance for name, preset in PRESETS.items() if preset.guidance_option == "guidance_scale"}


def names() -> list[str]:
    """The names that `load` knows, the embedded model first."""
    return list(PRESETS)


def load(model: str = "emoji", device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A diffusers pipeline: a model by name, a folder, or a name on the Hugging Face hub.

    Args:
        model: one of `names()`, the path of a saved pipeline, or "owner/name".
        device: where to run; None: CUDA if there is one, else the processor.
        dtype: of the weights; None: the preset's, but float32 on the processor and for other models.

    Raises:
        ValueError: neither a known name nor a folder with a saved pipeline nor of the form owner/name.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = PRESETS.get(model)
    if dtype is None:
        dtype = torch.float32 if preset is None or torch.device(device).type == "cpu" else preset.dtype
    source = Path(model) if preset is None else preset.source
    if preset is None and not (source / "model_index.json").is_file():
        if source.exists() or str(model).count("/") != 1 or os.path.isabs(model):
            raise ValueError(
                f"unknown model {str(model)!r}; known names: {', '.join(names())}. "
                "A folder with a saved diffusers pipeline (model_index.json) and owner/name on the hub work too."
            )
        source = model
    with _quiet() if model == "emoji" else nullcontext():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' hints about parts that the embedded model has no use for, and bars for milliseconds."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
