"""Accept what people pass as tensors, and refuse everything else in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_HINTS = {  # by what a value has, what it probably is, and what to do
    "read_bytes": "read pictures with `shielded.protected.load_images`, sets with `ProtectedSet.open`",
    "getbands": "encode pictures with `LatentSpace.of(pipe).encode(images)`",
}


def float_tensor(value: Any, name: str) -> Float[Tensor, "..."]:
    """Return a tensor as it is and a NumPy array as a tensor that shares its memory, if it may.

    Args:
        value: what was passed.
        name: of the argument, for the message.

    Raises:
        TypeError: it is neither, or holds no floating-point numbers.
    """
    if not isinstance(value, Tensor) and hasattr(value, "dtype") and hasattr(value, "shape"):
        try:
            value = torch.as_tensor(value)
        except (TypeError, RuntimeError, ValueError):
            raise TypeError(f"{name} must be a float tensor; got an array of {value.dtype}.") from None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float tensor, not {_kind(value)}{_hint(value)}.")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float tensor; got {value.dtype}.")
    return value


def _kind(value: Any) -> str:
    inner = f" of {type(value[0]).__name__}" if isinstance(value, list | tuple) and len(value) else ""
    return f"{type(value).__name__}{inner}"


def _hint(value: Any) -> str:
    first = value[0] if isinstance(value, list | tuple) and len(value) else value
    if isinstance(first, str):
        return f"; {_HINTS['read_bytes']}"
    if isinstance(first, Tensor):
        return "; join tensors with torch.stack"
    return next((f"; {hint}" for attribute, hint in _HINTS.items() if hasattr(first, attribute)), "")
