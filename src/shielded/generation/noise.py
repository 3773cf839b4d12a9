"""Initial noise that is negatively correlated between the images of one prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class CoupledNoise:
    """Turn independent noise into noise whose sum over a group of images is zero.

    Each image's noise stays exactly N(0, I), and any two of the group have the correlation −1/(G − 1), the smallest
    that G of them can have. Together this is the distribution of ε_i = √(G/(G − 1)) (g_i − mean g), drawn here one
    after another, each given the sum of those before it, so that it works for a batch and for one image at a time.
    The last of a group is minus the sum of the others and uses nothing of its own draw.

    Args:
        group: G, how many images belong together; with one alone nothing changes. The next G are another group.

    Raises:
        ValueError: no image in a group.
    """

    def __init__(self, group: int) -> None:
        if group < 1:
            raise ValueError(f"a group needs at least one image, not {group}.")
        self.group = group
        self._count = 0
        self._sum: Tensor | None = None

    def __call__(self, noise: Tensor) -> Tensor:
        """Couple the next rows of independent noise (B, *S); returns (B, *S) of the same dtype."""
        if self.group == 1:
            return noise
        return torch.stack([self._next(row) for row in noise])

    def _next(self, fresh: Tensor) -> Tensor:
        if self._count == self.group:
            self._count, self._sum = 0, None
        n, size = self._count, self.group
        self._count += 1
        if self._sum is None:
            self._sum = fresh.double()
            return fresh
        # Given n of them, with correlation −1/(G−1): mean −sum/(G−n), variance G(G−1−n)/((G−1)(G−n)).
        spread = math.sqrt(size * (size - 1 - n) / ((size - 1) * (size - n)))
        drawn = spread * fresh.double() - self._sum / (size - n)
        self._sum = self._sum + drawn
        return drawn.to(fresh.dtype)


@contextmanager
def coupling(pipe: Any, noises: Sequence[CoupledNoise]) -> Iterator[None]:
    """Couple the initial noise of the calls of `pipe` inside the context.

    Args:
        pipe: a diffusers text-to-image or text-to-video pipeline.
        noises: one per image of a call.

    Raises:
        TypeError: the pipeline does not start from noise that `prepare_latents` draws.
    """
    plain = getattr(pipe, "prepare_latents", None)
    if plain is None:
        raise TypeError(f"{type(pipe).__name__} has no prepare_latents, in which its initial noise could be coupled.")

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        latents, *rest = found if isinstance(found, tuple) else (found,)
        if len(latents) != len(noises):
            raise TypeError(
                f"{type(pipe).__name__} draws {len(latents)} noises for {len(noises)} images; couple=True needs one "
                "each."
            )
        coupled = torch.cat([noise(row[None]) for noise, row in zip(noises, latents, strict=True)])
        return (coupled, *rest) if isinstance(found, tuple) else coupled

    pipe.prepare_latents = prepare_latents
    try:
        yield
    finally:
        del pipe.prepare_latents
