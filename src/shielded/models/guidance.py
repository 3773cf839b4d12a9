"""The keyword by which a pipeline takes its guidance scale."""

from __future__ import annotations

import inspect
from typing import Any

GUIDANCE_OPTIONS = ("guidance_scale", "true_cfg_scale")


def guidance_option(pipe: Any) -> str:
    """Name the keyword of a pipeline's call that sets the scale of its guidance.

    Qwen-Image takes `guidance_scale` too, for distilled weights alone, and leaves it at None (at 1 before diffusers
    0.36); its classifier-free guidance is `true_cfg_scale`. FLUX.1 takes both, and runs with `guidance_scale`.

    Args:
        pipe: a diffusers pipeline.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    used = [name for name in GUIDANCE_OPTIONS if name in parameters and parameters[name].default not in (None, 1, 1.0)]
    return used[0] if used else GUIDANCE_OPTIONS[0]
