"""Models by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shielded.models.calls import needs_prompt
    from shielded.models.guidance import GUIDANCE_OPTIONS, guidance_option
    from shielded.models.loading import call_options, guidance_call, load, locate, names
    from shielded.models.presets import (
        EMOJI,
        PRESETS,
        PROTECTION,
        PROTECTION_RADIUS,
        VARIETY,
        VARIETY_RADIUS,
        Preset,
        preset_of,
        table,
    )

DEFAULT_MODEL: Final = "emoji"  # the embedded model; the features of its encoder have the same name

# Imported on first access (PEP 562): the command line needs DEFAULT_MODEL and not torch.
_PUBLIC = {
    "EMOJI": "shielded.models.presets",
    "GUIDANCE_OPTIONS": "shielded.models.guidance",
    "PRESETS": "shielded.models.presets",
    "PROTECTION": "shielded.models.presets",
    "VARIETY": "shielded.models.presets",
    "PROTECTION_RADIUS": "shielded.models.presets",
    "VARIETY_RADIUS": "shielded.models.presets",
    "Preset": "shielded.models.presets",
    "call_options": "shielded.models.loading",
    "guidance_call": "shielded.models.loading",
    "guidance_option": "shielded.models.guidance",
    "load": "shielded.models.loading",
    "locate": "shielded.models.loading",
    "names": "shielded.models.loading",
    "needs_prompt": "shielded.models.calls",
    "preset_of": "shielded.models.presets",
    "table": "shielded.models.presets",
}
__all__ = [
    "DEFAULT_MODEL",
    "EMOJI",
    "GUIDANCE_OPTIONS",
    "PRESETS",
    "PROTECTION",
    "PROTECTION_RADIUS",
    "VARIETY",
    "VARIETY_RADIUS",
    "Preset",
    "call_options",
    "guidance_call",
    "guidance_option",
    "load",
    "locate",
    "names",
    "needs_prompt",
    "preset_of",
    "table",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'shielded.models' has no attribute {name!r}")
