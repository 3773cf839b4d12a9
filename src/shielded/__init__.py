"""shielded: keep diffusion models away from protected images, and make their outputs differ (SPELL)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    if name in _MOVED:
        return _MOVED[name].module()
    raise AttributeError(f"module 'shielded' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# Old module paths ----------------------------------------------------------------------------------------------------

# Module paths of version 0.1 that documentation named, each standing for where its contents are now.
_NEW = {
    "audit": "shielded.certificates.audit",
    "certificate": "shielded.certificates.certificate",
    "distributed": "shielded.generation.distributed",
    "generate": "shielded.generation.sampling",
    "history": "shielded.spell.history",
    "calibration": "shielded.spell.posterior",
    "repellency": "shielded.core.correction",
    "verification": "shielded.certificates.verification",
}


class _Moved(ModuleType):
    """A module that looks its attributes up in another one, which is imported with the first of them."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to `{new}`.")
        self._new = new

    def module(self) -> ModuleType:
        return importlib.import_module(self._new)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or name == "_new":
            super().__setattr__(name, value)
        else:
            setattr(self.module(), name, value)


# Entered as loaded modules, so that the import system does not put them over functions of the same name.
_MOVED = {old: _Moved(f"shielded.{old}", new) for old, new in _NEW.items()}
sys.modules.update({module.__name__: module for module in _MOVED.values()})


def alias(old: str, new: str) -> None:
    """Let an old module path inside a package of `shielded` stand for a new one; called when that package is loaded."""
    sys.modules[old] = _Moved(old, new)
