"""How a pipeline is called: what it is told to draw, what its call takes, and the images that it returns.

Pipelines differ: most take a prompt, class-conditional ones a class, and unconditional ones a number of images. An own
pipeline needs no more than a scheduler and `__call__`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shielded._extras import RequestError
from shielded.models.loading import locate

_CLASSES = ("class_labels", "class_label", "labels")
_COUNTS = ("batch_size", "num_images", "num_samples")
_STEPS = ("num_inference_steps", "num_steps", "steps")


def conditioning(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a call that draws an image for each prompt.

    Args:
        pipe: a pipeline whose call takes `prompt`, or `class_labels`, or `batch_size`.
        prompts: texts; names or numbers of classes; "" for models without either.

    Raises:
        TypeError: the call takes none of these.
        RequestError: the model has no such class, or takes no prompt.
    """
    names, any_name = _parameters(type(pipe))
    classes = next((name for name in _CLASSES if name in names), None)
    count = next((name for name in _COUNTS if name in names), None)
    if "prompt" in names or (any_name and classes is None and count is None):
        return {"prompt": list(prompts)}
    told: dict[str, Any] = {} if count is None else {count: len(prompts)}
    if classes is not None and (count is None or any(prompts)):
        told[classes] = [_class_number(pipe, prompt) for prompt in prompts]
    elif count is None:
        raise TypeError(
            f"{type(pipe).__name__} can be told neither what to draw nor how many images: its call takes no "
            "`prompt`, `class_labels` or `batch_size`."
        )
    elif any(prompts):
        raise RequestError(f"{type(pipe).__name__} takes no prompt; leave it out.")
    return told


def takes_prompts(pipe: Any) -> bool:
    """Tell whether a pipeline, or a class of pipelines, is told what to draw, by a prompt or a class."""
    names, any_name = _parameters(pipe if isinstance(pipe, type) else type(pipe))
    labels = [names[name] for name in _CLASSES if name in names]
    return "prompt" in names or any(parameter.default is parameter.empty for parameter in labels) or any_name


def needs_prompt(model: str) -> bool:
    """Tell whether a model has to be told what to draw; one on the Hugging Face hub counts as such.

    Args:
        model: as `shielded.models.load` takes it.
    """
    source = locate(model)
    if not isinstance(source, Path):
        return True
    import diffusers

    name = json.loads((source / "model_index.json").read_text()).get("_class_name", "")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    return cls is None or takes_prompts(cls)


def accepted(pipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Keep those options that a pipeline's call takes."""
    names, any_name = _parameters(type(pipe))
    return {name: value for name, value in options.items() if any_name or name in names}


def step_option(pipe: Any, steps: int) -> dict[str, int]:
    """Return the number of sampler steps as a keyword argument; empty if the call takes none."""
    names, any_name = _parameters(type(pipe))
    found = next((name for name in _STEPS if name in names), _STEPS[0] if any_name else None)
    return {} if found is None else {found: steps}


def require_options(pipe: Any, options: Iterable[str]) -> None:
    """Refuse options that a pipeline's call does not take.

    Raises:
        RequestError: naming the first.
    """
    names, any_name = _parameters(type(pipe))
    unknown = [] if any_name else [name for name in options if name not in names]
    if unknown:
        raise RequestError(f"{type(pipe).__name__} takes no `{unknown[0]}`; leave it out.")


def set_progress(pipe: Any, **options: Any) -> None:
    """Configure the progress bar of a pipeline; one that has none keeps quiet."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(**options)


def images_of(pipe: Any, result: Any) -> list[Any]:
    """List the images that a call returned.

    Args:
        pipe: the pipeline, for messages.
        result: an object with `images`, or a tuple that begins with them, or the images: a list of PIL images, or
            (B, H, W, C) numpy or (B, C, H, W) tensor with values in [0, 1], or bytes from 0 to 255.

    Raises:
        TypeError: it holds no images.
        ValueError: their values have another range.
    """
    found = getattr(result, "images", result)
    if isinstance(found, tuple) and len(found):
        found = found[0]
    if isinstance(found, Tensor):
        found = found.detach().float().cpu().numpy() if found.is_floating_point() else found.cpu().numpy()
        found = found.transpose(0, 2, 3, 1) if found.ndim == 4 else found
    if isinstance(found, np.ndarray) and found.ndim == 4 and found.shape[-1] in (1, 3):
        return [_picture(pipe, image) for image in found]
    if isinstance(found, list) and found and isinstance(found[0], Image.Image | list):
        return found
    raise TypeError(
        f"{type(pipe).__name__} returned {type(found).__name__}, which holds no images; let its call return a list of "
        "PIL images, or an object with `images`."
    )


def _picture(pipe: Any, array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails too
            raise ValueError(
                f"{type(pipe).__name__} returned images with values from {low:g} to {high:g}; let it return PIL "
                "images, or values in [0, 1]."
            )
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)


def _class_number(pipe: Any, name: str) -> int:
    """Find the number of a class; "" is that of no class, where the model has one."""
    known = getattr(pipe, "labels", None)
    known = known if isinstance(known, dict) else {}
    count = _class_count(pipe)
    text = str(name).strip()
    if text in known:
        return int(known[text])
    if text.isdecimal() and (count is None or int(text) < count):
        return int(text)
    if not text and count is not None and type(pipe).__name__ == "DiTPipeline":
        return count  # DiT's own embedding of no class
    examples = f", such as {next(iter(known))!r}" if known else ""
    numbers = "its number" if count is None else f"a number from 0 to {count - 1}"
    raise RequestError(f"{type(pipe).__name__} has no class {text!r}; give {numbers}, or its name{examples}.")


def _class_count(pipe: Any) -> int | None:
    for part, field in (("transformer", "num_embeds_ada_norm"), ("unet", "num_class_embeds")):
        config = getattr(getattr(pipe, part, None), "config", None)
        found = None if config is None else getattr(config, field, None)
        if isinstance(found, int):
            return found
    return None


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return what a call of a pipeline takes by name, and whether it takes any other name."""
    found = dict(inspect.signature(cls.__call__).parameters)
    kinds = {parameter.kind for parameter in found.values()}
    named = {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return named, inspect.Parameter.VAR_KEYWORD in kinds
