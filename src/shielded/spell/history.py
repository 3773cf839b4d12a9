"""Remember finished images of earlier calls as references for the next."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shielded.files import replacing


class History:
    """The last `limit` finished latents, in main memory; the oldest are forgotten first.

    Args:
        limit: how many images are remembered at most.
    """

    def __init__(self, limit: int = 1024) -> None:
        if limit < 1:
            raise ValueError(f"a history needs room for at least one image, not {limit}.")
        self.limit = limit
        self.version = 0  # rises with each change, so that copies elsewhere can be renewed
        self._latents: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._latents is None else len(self._latents)

    @property
    def latents(self) -> Tensor:
        """(M, *S) float32, oldest first."""
        return torch.zeros(0) if self._latents is None else self._latents

    def add(self, latents: Tensor) -> None:
        """Remember finished latents (B, *S).

        Raises:
            ValueError: another shape than what is remembered already, or NaN.
        """
        new = latents.detach().float().cpu()
        if not torch.isfinite(new).all():
            raise ValueError("latents with NaN or infinity are not remembered; the model's output is broken.")
        if self._latents is not None and self._latents.shape[1:] != new.shape[1:]:
            raise ValueError(
                f"the history holds latents of shape {tuple(self._latents.shape[1:])}, these have "
                f"{tuple(new.shape[1:])}; use one history per image size, or forget() first."
            )
        old = new[:0] if self._latents is None else self._latents
        self._latents = torch.cat([old, new])[-self.limit :].contiguous()
        self.version += 1

    def amend(self, count: int, latents: Tensor) -> None:
        """Replace the `count` latents remembered last, which were repaired or refused, by latents (n, *S)."""
        if self._latents is not None:
            self._latents = self._latents[: max(0, len(self) - count)]
        self.add(latents)

    def forget(self) -> None:
        """Forget all images."""
        self._latents = None
        self.version += 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file."""
        with replacing(path) as draft:
            save_file({"latents": self.latents}, draft, metadata={"limit": str(self.limit)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], limit: int = 1024) -> History:
        """Read what `save` wrote."""
        history = cls(limit)
        latents = load_file(path)["latents"]
        if len(latents):
            history.add(latents)
        return history
