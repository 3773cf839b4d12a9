"""Add low-rank adapters (LoRA: Hu et al., 2021) to the weights of a pipeline, W + scale · (α / rank) · B A."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shielded._extras import RequestError

# Names of the two factors in files of different origin: A is applied first, then B.
_FACTORS = re.compile(
    r"^(?P<part>\w+)\.(?P<module>.+?)(?:_lora|\.lora|\.lora_linear_layer)?[._](?P<factor>lora_A|lora_B|down|up)\.weight$"
)


def add_lora(pipe: Any, path: Path, scale: float = 1.0) -> None:
    """Add an adapter to a pipeline's weights; calls add up.

    Args:
        pipe: a diffusers pipeline.
        path: safetensors file, in the layout of diffusers, PEFT or kohya.
        scale: factor of what it adds.

    Raises:
        FileNotFoundError: there is no such file.
        RequestError: it is no safetensors file, or its parts are not those of the pipeline.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no LoRA at {path}.")
    name = type(pipe).__name__
    if not hasattr(pipe, "lora_state_dict"):
        raise RequestError(f"{name} takes no LoRA.")
    try:
        weights = load_file(path)
    except SafetensorError:
        raise RequestError(
            f"{path} is no safetensors file; convert the LoRA, since other files can hold code."
        ) from None
    try:
        read = type(pipe).lora_state_dict(weights)
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} is no LoRA that {name} can read: {error}") from None
    weights, alphas = read if isinstance(read, tuple) else (read, None)
    alphas = {key: float(value) for key, value in (alphas or {}).items()}
    alphas |= {key: float(weights.pop(key)) for key in list(weights) if key.endswith(".alpha")}
    factors: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        found = _FACTORS.match(key)
        if found is None:
            raise RequestError(f"{path} has a part that is no pair of low-rank factors: {key}.")
        module = re.sub(r"\.processor\b", "", found["module"])
        which = "A" if found["factor"] in ("lora_A", "down") else "B"
        factors.setdefault((found["part"], module), {})[which] = tensor
    if not factors:
        raise RequestError(f"{path} holds no LoRA.")
    changes = []
    for (part, module), pair in factors.items():
        weight = _weight(pipe, part, module)
        if weight is None or set(pair) != {"A", "B"}:
            raise RequestError(f"{path} does not fit {name}, which has no {part}.{module} to change.")
        given = [value for key, value in alphas.items() if _is_alpha_of(key, part, module)]
        change = _change(pair["A"], pair["B"], weight.shape, given[0] if given else None)
        if change is None:
            raise RequestError(f"{path} does not fit {name}: {part}.{module} has another size.")
        changes.append((weight, scale * change))
    for weight, change in changes:  # all of it fits
        weight.data = (weight.data.float() + change.to(weight.device)).to(weight.dtype)


def _weight(pipe: Any, part: str, module: str) -> torch.nn.Parameter | None:
    model = getattr(pipe, part, None)
    for name in (module, module.removeprefix("text_model."), f"{module}.0"):  # to_out is a list with the layer
        try:
            weight = getattr(model.get_submodule(name), "weight", None) if model is not None else None
        except AttributeError:
            continue
        if isinstance(weight, torch.nn.Parameter):
            return weight
    return None


def _is_alpha_of(key: str, part: str, module: str) -> bool:
    return re.sub(r"\.processor\b", "", key).startswith((f"{part}.{module}.", f"{part}.{module}_lora", f"{module}."))


def _change(a: Tensor, b: Tensor, shape: torch.Size, alpha: float | None) -> Tensor | None:
    """Multiply the factors (rank, in, ...) and (out, rank, ...) into a change of a weight of this shape."""
    rank = a.shape[0]
    a, b = a.float().flatten(1), b.float().flatten(1)
    if b.shape[1] != rank or b.shape[0] * a.shape[1] != shape.numel() or b.shape[0] != shape[0]:
        return None
    return ((rank if alpha is None else alpha) / rank * (b @ a)).view(shape)
