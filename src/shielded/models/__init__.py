"""Models by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shielded.models.loading import GUIDANCE, call_options, load, locate, names
    from shielded.models.presets import EMOJI, PRESETS, VARIETY, VARIETY_RADIUS, Preset, preset_of, table

DEFAULT_MODEL: Final = "emoji"  # the embedded model; the features of its encoder have the same name

# Imported on first access (PEP 562): the command line needs DEFAULT_MODEL and not torch.
_PUBLIC = {
    "EMOJI": "shielded.models.presets",
    "GUIDANCE": "shielded.models.loading",
    "PRESETS": "shielded.models.presets",
    "VARIETY": "shielded.models.presets",
    "VARIETY_RADIUS": "shielded.models.presets",
    "Preset": "shielded.models.presets",
    "call_options": "shielded.models.loading",
    "load": "shielded.models.loading",
    "locate": "shielded.models.loading",
    "names": "shielded.models.loading",
    "preset_of": "shielded.models.presets",
    "table": "shielded.models.presets",
}
__all__ = [
    "DEFAULT_MODEL",
    "EMOJI",
    "GUIDANCE",
    "PRESETS",
    "VARIETY",
    "VARIETY_RADIUS",
    "Preset",
    "call_options",
    "load",
    "locate",
    "names",
    "preset_of",
    "table",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'shielded.models' has no attribute {name!r}")
