"""What is known of a pipeline before it samples: why it is refused, and which part of its latents it replaces.

The signs are read from the source of its `__call__`, so that a copy or a subclass of a pipeline is known as well.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor

_REFUSED = (  # a sign in the source, why it cannot be corrected, and what to do
    (
        r"\.step\((?:[^()]|\([^()]*\))*pred_original_sample\s*=",
        "passes an x0 of its own to its scheduler, which replaces the corrected one",
        "use another pipeline of this model",
    ),
    (
        r"\.step\((?:[^()]|\([^()]*\))*per_token_timesteps\s*=",
        "gives each token a noise level of its own",
        "use the model's text-to-video pipeline",
    ),
    (
        r"scheduler\.__dict__\.update|scheduler\.__dict__\s*=|vars\(self\.scheduler\)\.update",
        "exchanges the state of its scheduler between steps, and with it the correction",
        "use a pipeline that denoises the whole image at once",
    ),
    (
        r"reshape\(\s*\w+ \* \w*frames|reshape\(\s*\w*frames \* \w+|rearrange\([^)]*\(b f\)",
        "hands each frame to its scheduler as an image of its own, so that frames of one video repel each other",
        "use a pipeline that denoises all frames together",
    ),
)
_STEPS_COPIES = ("DiffusionForcing", "TextToVideoZero")  # part of the class name
_SECOND_TRACK = re.compile(r"(audio|sound|action)_scheduler\s*=\s*(copy\.)?deepcopy\(self\.scheduler\)")


def refuse_pipeline(pipe: Any) -> None:
    """Refuse a pipeline whose steps cannot all be corrected, or whose batch rows are not images.

    Raises:
        TypeError: says why, and what to do instead.
    """
    name = type(pipe).__name__
    if any(part in name for part in _STEPS_COPIES):
        raise TypeError(
            f"{name} steps copies of its scheduler, one per frame, uncorrected; use a pipeline that denoises all "
            "frames together, like SkyReelsV2Pipeline."
        )
    source = _source(type(pipe))
    for sign, why, instead in _REFUSED:
        if re.search(sign, source):
            raise TypeError(f"{name} {why}; {instead}.")


def has_second_track(pipe: Any) -> bool:
    """Tell whether the pipeline steps a copy of its scheduler for a track (sound) that has no shields."""
    return _SECOND_TRACK.search(_source(type(pipe))) is not None


def keeps_first_frame(pipe: Any) -> bool:
    """Tell whether a video pipeline replaces or drops the first frame of its latents after the last step."""
    config, model = getattr(pipe, "config", {}), getattr(getattr(pipe, "transformer", None), "config", {})
    source = _source(type(pipe))
    replaced = re.search(r"\(1 - first_frame_mask\) \* condition", source) and config.get("expand_timesteps")
    dropped = "latents[:, :, 1:" in source and _get(model, "image_condition_type") == "latent_concat"
    return bool(replaced or dropped)


def repeats_passes(pipe: Any) -> bool:
    """Tell whether the pipeline samples each video several times over in one call, as FreeInit does."""
    return bool(getattr(pipe, "free_init_enabled", False))


def without_first_frame(latents: Tensor) -> Tensor:
    """Make a mask (1, F, 1, 1) for videos (B, C, F, H, W) that is 0 in the first frame."""
    mask = torch.ones(1, latents.shape[2], 1, 1, device=latents.device)
    mask[:, 0] = 0
    return mask


def unchanged(before: Tensor, after: Tensor) -> Tensor | None:
    """Find the part of finished or intermediate latents (B, *S) that a pipeline leaves as its scheduler returned it.

    Returns:
        Mask (*S), 1 where no row was changed; None if nothing was changed, or hardly anything was left.
    """
    if before.shape != after.shape:
        return None
    narrow = before.dtype if before.element_size() <= after.element_size() else after.dtype
    same = (before.to(narrow) == after.to(device=before.device, dtype=narrow)).all(dim=0)
    share = same.float().mean().item()
    return None if share == 1 or share < _LEAST_SHARE else same.float()


_LEAST_SHARE = 0.02  # less is left by coincidence alone


def _get(config: Any, name: str) -> Any:
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)


@functools.lru_cache(maxsize=256)
def _source(cls: type) -> str:
    try:
        return inspect.getsource(inspect.unwrap(cls.__call__))
    except (OSError, TypeError, AttributeError):  # built in a session, or not callable
        return ""
