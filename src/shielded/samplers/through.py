"""What wrappers of a Spell have in common: samplers call them in its place (`Spell.attach(pipe, through=...)`)."""

from __future__ import annotations

from typing import Any


class Through:
    """Hands on what does not depend on how a wrapper changes the latents.

    Args:
        spell: what is wrapped.
    """

    def __init__(self, spell: Any) -> None:
        self.spell = spell

    @property
    def release(self) -> float | None:
        """The noise level down to which guidance is let go; None: never."""
        return self.spell.release

    @property
    def release_scale(self) -> float:
        """The guidance scale of released rows."""
        return self.spell.release_scale

    @property
    def guidance(self) -> str | None:
        """How guidance was released; see `Spell`."""
        return self.spell.guidance

    @guidance.setter
    def guidance(self, way: str | None) -> None:
        self.spell.guidance = way

    def start(self) -> None:
        """Begin a new trajectory."""
        self.spell.start()

    def begin_call(self, one_image: bool = False) -> None:
        """Begin a call of the pipeline; see `Spell`."""
        self.spell.begin_call(one_image)
