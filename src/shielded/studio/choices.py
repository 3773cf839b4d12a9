"""The models and protected sets that the visitors of a studio may choose from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shielded._extras import RequestError
from shielded.models import guidance_call, load, preset_of
from shielded.models.presets import Preset
from shielded.protected import ProtectedSet


@dataclass(frozen=True)
class Opened:
    """A model that is loaded.

    Args:
        name: as `shielded.models.load` takes it.
        pipe: the pipeline.
        options: of a call, besides the number of steps.
        preset: of the model.
    """

    name: str
    pipe: Any
    options: dict[str, Any]
    preset: Preset


class Choices:
    """What visitors choose by name; a request cannot name anything else.

    Args:
        models: at least one; the first is loaded at once, the others when they are chosen first.
        sets: folders of protected sets.
        device: of the models.

    Raises:
        RequestError: a set is empty, or two have the same name.
        FileNotFoundError: there is no set at a path.
    """

    def __init__(self, models: Sequence[str], sets: Sequence[Path] = (), device: str | None = None) -> None:
        self.models = list(dict.fromkeys(models))
        self.sets = {path.resolve().name: path for path in sets}
        if len(self.sets) < len(sets):
            raise RequestError("two protected sets have the same name; rename the folder of one.")
        for path in sets:
            if not len(ProtectedSet.open(path)):
                raise RequestError(f"the protected set at {path} is empty; add images to it, or leave it out.")
        self._device = device
        self._opened: dict[str, Opened] = {}
        self._lock = threading.Lock()
        self.open(self.models[0])

    def open(self, model: str) -> Opened:
        """Load a model, once.

        Raises:
            ValueError: it is none of the choices.
        """
        if model not in self.models:
            raise ValueError("this studio does not offer that model.")
        with self._lock:
            if model not in self._opened:
                pipe = load(model, self._device)
                self._opened[model] = Opened(model, pipe, guidance_call(pipe, model), preset_of(model))
            return self._opened[model]

    def paths(self, names: Sequence[str]) -> list[Path]:
        """Return the folders of chosen sets.

        Raises:
            ValueError: a name is none of the choices.
        """
        if any(name not in self.sets for name in names):
            raise ValueError("this studio does not offer that protected set.")
        return [self.sets[name] for name in names]

    def describe(self, names: Sequence[str]) -> str:
        """Say what chosen sets hold; "" for none."""
        lines = []
        for name, path in zip(names, self.paths(names), strict=True):
            protected = ProtectedSet.open(path)
            record, threshold = protected.descriptor, protected.copy_threshold
            copies = "no descriptor: changed copies are not looked for"
            if record is not None:
                copies = "a descriptor" if threshold is None else f"copies from a similarity of {threshold:.3f}"
            lines.append(f"**{name}**: {len(protected)} images, {copies}.")
        return " ".join(lines)

    def radius(self, names: Sequence[str]) -> float | None:
        """Return the median radius of chosen sets, latent L2; None if they have none."""
        radii = [r for path in self.paths(names) for r in ProtectedSet.open(path).radii.tolist() if r == r]
        return sorted(radii)[len(radii) // 2] if radii else None
