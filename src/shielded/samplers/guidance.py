"""Release guidance: the prediction of a step at another guidance scale, from what the denoiser has just returned.

A pipeline evaluates its denoiser with and without the prompt and combines the two as

    m = γ (u + s (c − u)),

with the guidance scale s and, where the pipeline rescales the result, γ ≠ 1 per row or per token. `scheduler.step` only
gets m. Forward hooks on the denoiser keep its outputs, and a least-squares fit per row recovers s and γ. The fit is
checked: if its residual exceeds the rounding error of the dtype, the pipeline combines in another way, and nothing is
released. So no pipeline is special, and no wrong prediction can come out.

Models with embedded guidance (FLUX.1-dev) take the scale as an argument; they are evaluated again with another one.

Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; Lin et al., "Common Diffusion Noise Schedules and Sample
Steps are Flawed", 2024, Equation 16 (rescaling per row).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shielded.samplers.rows import select_rows

_DENOISERS = ("unet", "transformer", "transformer_2", "prior")
_TOLERANCE = 8.0  # of the fit's residual, in rounding errors of the dtype


@dataclass
class _Call:
    """One evaluation of the denoiser."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def releases(correct: Any) -> bool:
    """Tell whether a correction lets guidance go at all; only then is there anything to watch or to ask for."""
    return getattr(correct, "release", None) is not None


class Guidance:
    """The guidance of one pipeline, watched while it samples.

    Args:
        pipe: a diffusers pipeline.
        twice: whether it steps each image twice, as DiT's does: the second half of the batch repeats the first.

    Attributes:
        way: how guidance was released, or could be: "batched" (both halves in one evaluation), "separate" (two
            evaluations), "embedded" (an argument of the model); or a sentence that says why it was not. None before
            the first try.
    """

    def __init__(self, pipe: Any, twice: bool = False) -> None:
        self._pipe, self._twice = pipe, twice
        self._calls: list[_Call] = []
        self._recording = True
        self.way: str | None = None

    @contextmanager
    def watch(self) -> Iterator[Guidance]:
        """Keep the denoiser's outputs inside the context."""
        modules = {id(m): m for m in (getattr(self._pipe, name, None) for name in _DENOISERS) if m is not None}
        handles = [
            module.register_forward_hook(self._record, with_kwargs=True)
            for module in modules.values()
            if isinstance(module, nn.Module)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.forget()

    def forget(self) -> None:
        """Drop the outputs of a step that has been taken."""
        self._calls.clear()

    def at_scale(self, model_output: Tensor, rows: Tensor, scale: float) -> Tensor | None:
        """Compute the model output that the pipeline would have made at another guidance scale.

        Args:
            model_output: (B, *S), what the pipeline passed to `scheduler.step`.
            rows: (B,) bool, rows that need it.
            scale: guidance scale, at least 1; rows with less keep theirs.

        Returns:
            (B, *S) in the dtype of `model_output`; rows outside `rows` keep their bits. None: not known, see `way`.
        """
        if not self._calls:
            return self._refuse("the denoiser was not evaluated through a module of the pipeline")
        half = len(model_output) // 2
        if self._twice and torch.equal(model_output[:half], model_output[half:]):
            released = self._combined(model_output[:half], rows[:half], scale)
            return None if released is None else torch.cat([released, released])
        return self._combined(model_output, rows, scale)

    def _combined(self, model_output: Tensor, rows: Tensor, scale: float) -> Tensor | None:
        outputs = [call.output for call in self._calls]
        batch, counts = len(model_output), [len(output) for output in outputs]
        if counts == [2 * batch]:
            way, released = "batched", _released(outputs[0][:batch], outputs[0][batch:], model_output, scale)
        elif counts == [batch, batch]:
            way, released = "separate", _released(outputs[0], outputs[1], model_output, scale)
        elif counts == [batch]:
            way, released = "embedded", self._embedded(self._calls[0], model_output, rows, scale)
        else:
            return self._refuse(
                f"{type(self._pipe).__name__} evaluates its denoiser with {counts} rows for {batch} images, which is "
                "no form of guidance known here"
            )
        if released is None:
            if way != "embedded":  # which says itself why
                self._refuse(f"{type(self._pipe).__name__} combines its predictions in a way that is not known here")
            return None
        self.way = way
        return select_rows(rows, released, model_output)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._recording:
            return
        tensor = _tensor(output)
        if tensor is not None:
            self._calls.append(_Call(module, args, kwargs, tensor))

    def _refuse(self, reason: str) -> None:
        self.way = f"not released: {reason}"

    def _embedded(self, call: _Call, model_output: Tensor, rows: Tensor, scale: float) -> Tensor | None:
        """Evaluate a model with embedded guidance again, with `scale` in `rows` and its own scale in the others."""
        name = type(self._pipe).__name__
        current = getattr(self._pipe, "guidance_scale", None)
        changed = None
        if isinstance(current, (int, float)) and current > 0:
            changed = self._at_embedded_scale(call.kwargs, rows, float(current), scale)
        if changed is None or current is None:
            return self._refuse(f"{name} ran without guidance")
        if getattr(call.module, "is_cache_enabled", False):
            return self._refuse(f"{name} caches its denoiser's blocks, so it cannot be evaluated twice in a step")
        sign = _sign(call.output, model_output)
        if sign is None:
            return self._refuse(f"{name} changes its denoiser's output in a way that is not known here")
        if current <= scale:
            return model_output
        self._recording = False
        try:
            again = _tensor(call.module(*call.args, **{**call.kwargs, **changed}))
        finally:
            self._recording = True
        shaped = None if again is None else _shaped(again, model_output)
        return None if shaped is None else (sign * shaped).to(model_output.dtype)

    def _at_embedded_scale(
        self, given: dict[str, Any], rows: Tensor, current: float, scale: float
    ) -> dict[str, Tensor] | None:
        """Change the arguments that hold the guidance scale, in the given rows; None if there are none."""
        guidance, condition = given.get("guidance"), given.get("timestep_cond")
        if isinstance(guidance, Tensor):
            return {"guidance": torch.where(rows.to(guidance.device), guidance * (scale / current), guidance)}
        if isinstance(condition, Tensor) and hasattr(self._pipe, "get_guidance_scale_embedding"):
            scales = torch.full((len(condition),), scale - 1.0)  # latent consistency models embed w = s − 1
            embedding = self._pipe.get_guidance_scale_embedding(scales, embedding_dim=condition.shape[1])
            return {
                "timestep_cond": torch.where(rows.to(condition.device)[:, None], embedding.to(condition), condition)
            }
        return None


def _tensor(output: Any) -> Tensor | None:
    """Take the prediction out of a denoiser's output: a tensor, or the first entry of a tuple or dataclass."""
    if isinstance(output, Tensor):
        return output
    try:
        first = output[0]
    except (KeyError, IndexError, TypeError):
        return None
    if isinstance(first, (list, tuple)) and first and all(isinstance(part, Tensor) for part in first):
        return torch.stack(list(first))  # Z-Image returns one tensor per image
    return first if isinstance(first, Tensor) else None


def _shaped(output: Tensor, model_output: Tensor) -> Tensor | None:
    """Drop what the model output (B, *S) does not hold: a learned variance, a single frame's axis, reference tokens."""
    shape = model_output.shape
    if output.shape == shape:
        return output
    if output.ndim == len(shape) + 1 and output.shape[2] == 1:
        return _shaped(output.squeeze(2), model_output)
    if output.ndim != len(shape) or output.shape[2:] != shape[2:] or output.shape[1] <= shape[1]:
        return None
    return output[:, : shape[1]]


def _sign(output: Tensor, model_output: Tensor) -> float | None:
    """Find the sign with which the model output equals the denoiser's output; None if it is something else."""
    shaped = _shaped(output, model_output)
    if shaped is None:
        return None
    x, m = shaped.double(), model_output.double()
    tolerance = _TOLERANCE * torch.finfo(output.dtype).eps * x.norm()
    return next((sign for sign in (1.0, -1.0) if (m - sign * x).norm() <= tolerance), None)


def _released(first: Tensor, second: Tensor, model_output: Tensor, scale: float) -> Tensor | None:
    """Compute the model output at `scale`, where the given one is a guided combination of the two predictions.

    Args:
        first: (B, ...) one of the predictions with and without prompt, in any order.
        second: (B, ...) the other one.
        model_output: (B, *S).
        scale: guidance scale.

    Returns:
        (B, *S) in the dtype of `model_output`; None if it is no such combination.
    """
    a, b = _shaped(first, model_output), _shaped(second, model_output)
    if a is None or b is None:
        return None
    eps = max(torch.finfo(t.dtype).eps for t in (first, model_output))
    per_token = False
    fitted = _fit(a, b, model_output, per_token, eps)
    if fitted is None and model_output.ndim == 3:
        per_token = True
        fitted = _fit(a, b, model_output, per_token, eps)
    if fitted is None:
        return None
    s, gain = fitted
    if ((s > -1e-3) & (s < 1 - 1e-3)).any():
        return None  # between the two predictions: a scale below 1 does not tell which of them is which
    # s counts from a to b. Above 1, b has the prompt; below 0, a has it, and the scale is 1 − s.
    swapped = s < 0
    unconditional, conditional = select_rows(swapped, b, a), select_rows(swapped, a, b)
    current = torch.where(swapped, 1 - s, s)
    if scale == 1:
        released = conditional
    elif per_token or (gain.abs() - 1).abs().max() > 1e-3:
        return None  # how a rescaled combination depends on the scale is not known
    else:
        released = unconditional + scale * (conditional - unconditional)
    released = select_rows(gain < 0, -released, released).to(model_output.dtype)
    return select_rows(current <= scale, model_output, released)


def _fit(a: Tensor, b: Tensor, m: Tensor, per_token: bool, eps: float) -> tuple[Tensor, Tensor] | None:
    """Fit m = γ (a + s (b − a)) by least squares, with s per row and γ per row or per token.

    Returns:
        s and γ (B,), the mean one per row; None if the residual is larger than rounding.
    """
    start = 2 if per_token else 1
    a, d, m = (x.double().flatten(start) for x in (a, b.double() - a.double(), m))
    aa, ad, dd = (a * a).sum(-1), (a * d).sum(-1), (d * d).sum(-1)
    am, dm = (a * m).sum(-1), (d * m).sum(-1)
    determinant = aa * dd - ad * ad
    if not (determinant > 1e-12 * aa * dd).all():
        return None
    gain = (am * dd - dm * ad) / determinant
    s = (dm * aa - am * ad) / determinant / gain
    if per_token:  # one scale for all tokens of a row
        weight = dd
        s = ((s * weight).sum(-1) / weight.sum(-1))[:, None].expand_as(gain)
        combined = a + s[..., None] * d
        gain = (combined * m).sum(-1) / (combined * combined).sum(-1)
    residual = m - gain[..., None] * (a + s[..., None] * d)
    size = gain.abs()[..., None] * (a.abs() + s.abs()[..., None] * d.abs())
    if not (residual.flatten(1).norm(dim=1) <= _TOLERANCE * eps * size.flatten(1).norm(dim=1)).all():
        return None
    return (s[:, 0], gain.mean(-1)) if per_token else (s, gain)
