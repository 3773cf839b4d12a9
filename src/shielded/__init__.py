"""shielded: keep diffusion models away from protected images, and make their outputs differ (SPELL)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shielded import _moved as _moved

if TYPE_CHECKING:
    from shielded.certificates.certificate import Certificate
    from shielded.core.correction import repellency
    from shielded.latent_space.space import LatentSpace
    from shielded.protected.protected_set import ProtectedSet
    from shielded.samplers.coefficients import x0_coefficients
    from shielded.samplers.denoiser import Guided, RepelledDenoiser
    from shielded.spell.history import History
    from shielded.spell.posterior import Calibration
    from shielded.spell.spell import Spell

# Imported when first asked for (PEP 562), so that a part of the package costs what that part needs.
_PUBLIC = {
    "Calibration": "shielded.spell.posterior",
    "Certificate": "shielded.certificates.certificate",
    "Guided": "shielded.samplers.denoiser",
    "History": "shielded.spell.history",
    "LatentSpace": "shielded.latent_space.space",
    "ProtectedSet": "shielded.protected.protected_set",
    "RepelledDenoiser": "shielded.samplers.denoiser",
    "Spell": "shielded.spell.spell",
    "repellency": "shielded.core.correction",
    "x0_coefficients": "shielded.samplers.coefficients",
}
__all__ = [
    "Calibration",
    "Certificate",
    "Guided",
    "History",
    "LatentSpace",
    "ProtectedSet",
    "RepelledDenoiser",
    "Spell",
    "repellency",
    "x0_coefficients",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _moved.MODULES:
        return _moved.MODULES[name].module()
    raise AttributeError(f"module 'shielded' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
