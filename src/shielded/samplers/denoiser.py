"""Wrappers of denoisers D(x; sigma) -> x0, with which k-diffusion and EDM2 sample as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shielded.samplers.guidance import releases
from shielded.samplers.rows import select_rows


class _Wrapper:
    """Forwards what it does not know (sigma_min, round_sigma, img_channels) to the denoiser that it wraps."""

    denoiser: Any

    def __getattr__(self, name: str) -> Any:
        if name == "denoiser" or name.startswith("__"):  # copy and pickle ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.denoiser, name)


class RepelledDenoiser(_Wrapper):
    """A denoiser whose x0 is pushed out of the shields.

    Works wherever a denoiser with x = x0 + sigma · noise is called (Karras et al., EDM, 2022): `k_diffusion.sampling`,
    EDM2's `edm_sampler`. Every evaluation is corrected, so higher-order samplers need nothing else. Guidance must be
    inside the denoiser; see `Guided`. Samplers with adaptive step size see a field with kinks: prefer fixed steps.

    A denoiser cannot tell where a trajectory begins and ends. Call `spell.start()` before sampling and
    `samples = spell.finish(samples)` after it: that counts runs in the trace, moves out of the shields what the sampler
    brought back inside, and lets the history remember the samples.

    If the denoiser is a `Guided`, guidance is released for the images whose guided x0 lies in a shield
    (`Spell(release=...)`).

    Args:
        denoiser: called as denoiser(x, sigma, *args, **kwargs), gives x0 (B, *S), or a tuple that begins with it.
        spell: called as spell(x0, noise=, alpha=, sigma=) with float32 tensors (B, *S), gives the correction; a Spell.
    """

    def __init__(self, denoiser: Callable[..., Any], spell: Callable[..., Tensor]) -> None:
        self.denoiser = denoiser
        self.spell = spell

    def __call__(self, x: Tensor, sigma: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Predict x0 and correct it.

        Args:
            x: (B, *S) noisy samples.
            sigma: noise level, a number or a tensor of one element or (B,), the same for all rows.
            *args: passed on to the denoiser.
            **kwargs: passed on to the denoiser.

        Returns:
            x0 (B, *S) in the denoiser's dtype; rows without a correction are the denoiser's own, bit for bit. If the
            denoiser returns a tuple, x0 is its first part, and the others are returned with it.

        Raises:
            TypeError: the denoiser returns something else.
            ValueError: the rows have different noise levels.
        """
        level = _level(sigma)
        x0, more = _first(self.denoiser, self.denoiser(x, sigma, *args, **kwargs))
        seen, options = x0.float(), {}
        if releases(self.spell) and hasattr(self.denoiser, "at_scale"):
            rows = self.spell.colliding(seen, alpha=1.0, sigma=level)
            released = None if rows is None else self.denoiser.at_scale(self.spell.release_scale)
            if rows is not None and released is not None:
                self.spell.guidance = "denoiser"
                x0 = select_rows(rows, released, x0)
                seen, options["released"] = x0.float(), rows
        noise = (x.float() - seen) / level if level > 0 else torch.zeros_like(seen)
        delta = self.spell(seen, noise=noise, alpha=1.0, sigma=level, **options)
        moved = (delta != 0).flatten(1).any(1)
        corrected = select_rows(moved, (x0 + delta).to(x0.dtype), x0)
        return corrected if more is None else (corrected, *more)


class Guided(_Wrapper):
    """EDM2's guidance as a denoiser: gnet(x) + guidance · (net(x) − gnet(x)).

    EDM2 guides inside its sampler, where wrapping `net` alone would multiply the correction by the guidance weight and
    measure the unguided x0. Use `edm_sampler(RepelledDenoiser(Guided(net, gnet, guidance), spell), noise, guidance=1)`.

    Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", 2024, Equation 3.

    Args:
        net: the denoiser.
        gnet: the denoiser that guides: unconditional, or a weaker version of net. Called with the same arguments.
        guidance: weight; 1 is net alone, and gnet is not called.
    """

    def __init__(self, net: Callable[..., Any], gnet: Callable[..., Any], guidance: float) -> None:
        self.denoiser = net
        self.gnet = gnet
        self.guidance = guidance
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, sigma: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Predict the guided x0 (B, *S), in the dtype of net; with what net returns besides, if that is a tuple."""
        x0, more = _first(self.denoiser, self.denoiser(x, sigma, *args, **kwargs))
        self._last, guided = None, x0
        if self.guidance != 1:
            guide = _first(self.gnet, self.gnet(x, sigma, *args, **kwargs))[0].to(x0.dtype)
            self._last, guided = (guide, x0), guide.lerp(x0, self.guidance)
        return guided if more is None else (guided, *more)

    def at_scale(self, scale: float) -> Tensor | None:
        """Compute the last x0 (B, *S) again, at another guidance weight; None if it had no more than that."""
        if self._last is None or self.guidance <= scale:
            return None
        guide, x0 = self._last
        return x0 if scale == 1 else guide.lerp(x0, scale)


def _first(denoiser: Any, output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """Split what a denoiser returned into x0 and the rest of a tuple; None: it is no tuple."""
    x0, more = (output[0], tuple(output[1:])) if isinstance(output, tuple) and output else (output, None)
    if not isinstance(x0, Tensor):
        name = getattr(denoiser, "__name__", type(denoiser).__name__)
        raise TypeError(
            f"the denoiser {name} returned {type(output).__name__}; it has to return x0 as a tensor, or a tuple that "
            "begins with it. A wrapper `lambda x, sigma: net(x, sigma).sample` takes x0 out of an object."
        )
    return x0, more


def _level(sigma: Tensor | float) -> float:
    values = torch.as_tensor(sigma).flatten().tolist()  # the host waits for a GPU once
    if any(value != values[0] for value in values):
        raise ValueError("sigma must be the same for all rows of the batch; sample rows of other noise levels apart.")
    return float(values[0])
