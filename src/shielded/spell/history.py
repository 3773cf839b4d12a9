"""Remember finished images of earlier calls as references for the next."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shielded.files import replacing, sha256


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
        """Write to a safetensors file, with a checksum."""
        metadata = {"limit": str(self.limit), "sha256": _digest(self.latents)}
        with replacing(path) as draft:
            save_file({"latents": self.latents}, draft, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], limit: int = 1024) -> History:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged.
        """
        history = cls(limit)
        try:
            with safe_open(path, "pt") as file:
                latents, metadata = file.get_tensor("latents"), file.metadata() or {}
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: it is no history of finished images ({error}).") from None
        if metadata.get("sha256", _digest(latents)) != _digest(latents):  # version 0.1 wrote none
            raise ValueError(f"{path} is damaged: its checksum does not hold.")
        if not latents.is_floating_point() or not latents.isfinite().all():
            raise ValueError(f"{path} is damaged: its latents are not finite numbers.")
        if len(latents):
            history.add(latents)
        return history


def _digest(latents: Tensor) -> str:
    """Compute the SHA-256 of latents with their shape and type."""
    return sha256(f"{latents.dtype} {tuple(latents.shape)} ".encode() + latents.contiguous().numpy().tobytes())
