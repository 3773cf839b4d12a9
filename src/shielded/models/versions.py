"""What older versions of diffusers name or do otherwise; everything else in the package is written for the newest."""

from __future__ import annotations

from typing import Any

import torch

_TAKES_DTYPE = (0, 40)  # before, `from_pretrained` silently ignores `dtype` and takes `torch_dtype`


def dtype_option(dtype: torch.dtype | None) -> dict[str, Any]:
    """Return the dtype of the weights as the keyword argument that the installed diffusers' `from_pretrained` takes."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= _TAKES_DTYPE else "torch_dtype": dtype}
