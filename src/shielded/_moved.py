"""Module paths of version 0.1 that documentation named, each standing for where its contents are now."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

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
MODULES = {old: _Moved(f"shielded.{old}", new) for old, new in _NEW.items()}
sys.modules.update({module.__name__: module for module in MODULES.values()})


def alias(old: str, new: str) -> None:
    """Let an old module path inside a package of `shielded` stand for a new one; called when that package is loaded."""
    sys.modules[old] = _Moved(old, new)
