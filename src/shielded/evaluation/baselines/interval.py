"""Interval Guidance: no guidance at high noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shielded.evaluation.baselines.plain import Plain, denoiser_of, timestep_of
from shielded.samplers.coefficients import step_state


class IntervalGuidance(Plain):
    """Apply classifier-free guidance only in an interval of noise levels; outside, the guidance scale is 1.

    Kynkäänniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
    Models", NeurIPS 2024. Guidance at high noise costs diversity. Where guidance is off, the prompt's
    prediction replaces that of the negative prompt, so that any guidance scale gives the former.

    Args:
        strength: width of the noisy end without guidance: it is off for t = σ/(α + σ) > 1 − strength; at 1 always.
        end: it is also off for t ≤ end.
    """

    def __init__(self, strength: float, end: float = 0.0) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(
                f"the strength of interval guidance is a share of the noise levels, 0 to 1, not {strength}."
            )
        self.interval = (1 - strength, end)

    @contextmanager
    def hooks(self, pipe: Any) -> Iterator[None]:
        """Replace the prediction of the negative prompt outside the interval."""

        def change(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not getattr(pipe, "do_classifier_free_guidance", False):
                raise TypeError(
                    f"{type(pipe).__name__} runs without classifier-free guidance, so there is none to limit; raise "
                    "guidance_scale above 1, or use another method."
                )
            index = getattr(pipe.scheduler, "step_index", None)
            state = step_state(pipe.scheduler, timestep_of(args, kwargs), index)
            high, low = self.interval
            if low < state.sigma / (state.alpha + state.sigma) <= high:
                return None
            first, *rest = output  # pipelines ask for a tuple
            return (torch.cat([first.chunk(2)[1]] * 2), *rest)

        handle = denoiser_of(pipe).register_forward_hook(change, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class WithInterval:
    """Another method, with the guidance limited to an interval as well.

    Args:
        method: with an `attach`.
        strength: of `IntervalGuidance`.
    """

    def __init__(self, method: Any, strength: float) -> None:
        self.method = method
        self.guidance = IntervalGuidance(strength)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[WithInterval]:
        """Act on every call of `pipe` until the context is left; see `Plain.attach`."""
        with self.guidance.hooks(pipe), self.method.attach(pipe):
            yield self
