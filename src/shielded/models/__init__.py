"""The models that can be named on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

EMOJI = Path(__file__).parent / "emoji"
EMBEDDED = {"emoji": EMOJI}
GUIDANCE = {"emoji": 3.0}  # where the pipeline's own default is not the best for the model


def load(model: str = "emoji", device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline: an embedded model by name, a folder, or a name on the Hugging Face hub.

    Args:
        model: "emoji", the path of a saved pipeline, or "owner/name".
        device: where to run; None: CUDA if there is one, else the processor.
        dtype: of the weights.

    Raises:
        ValueError: neither a known name nor a folder with a saved pipeline nor of the form owner/name.
    """
    folder = EMBEDDED.get(model, Path(model))
    known = (folder / "model_index.json").is_file()
    if not known and (folder.exists() or str(model).count("/") != 1 or os.path.isabs(model)):
        raise ValueError(
            f"unknown model {str(model)!r}; known names: {', '.join(EMBEDDED)}. "
            "A folder with a saved diffusers pipeline (model_index.json) and owner/name on the hub work too."
        )
    with _quiet() if model in EMBEDDED else nullcontext():
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(folder if known else model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
