"""The models that can be named on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

EMOJI = Path(__file__).parent / "emoji"
EMBEDDED = {"emoji": EMOJI}


def load(model: str = "emoji", device: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline: an embedded model by name, a folder, or a name on the Hugging Face hub.

    Args:
        model: "emoji", the path of a saved pipeline, or "owner/name".
        device: where to run; None: CUDA if there is one, else the processor.
        dtype: of the weights.

    Raises:
        ValueError: neither a known name nor a folder with a saved pipeline nor of the form owner/name.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    folder = EMBEDDED.get(model, Path(model))
    known = (folder / "model_index.json").is_file()
    if not known and (folder.exists() or str(model).count("/") != 1 or os.path.isabs(model)):
        raise ValueError(
            f"unknown model {str(model)!r}; known names: {', '.join(EMBEDDED)}. "
            "A folder with a saved diffusers pipeline (model_index.json) and owner/name on the hub work too."
        )
    if model in EMBEDDED:
        # The missing safety checker is no oversight here, and the hint about it would come with every command.
        logging.set_verbosity_error()
    pipe = DiffusionPipeline.from_pretrained(folder if known else model, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
