"""Notice references of another range than the finished images: unscaled latents, pixels in [0, 1] or [0, 255]."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from shielded.protected import ProtectedSet

_ROWS = 16  # of the references that are looked at
_TIMES = 2.5  # by which the sizes of values may differ; latents of all models have about unit variance
_SOME_NEGATIVE = 0.05  # share of values below which none counts as negative by chance


class RangeWarning(UserWarning):
    """The references are probably not in the space of the sampler."""


def compare_ranges(protected: ProtectedSet | Tensor, latents: Tensor) -> None:
    """Warn if references and finished latents (B, *S) cannot both be in the sampler's space.

    Compared are the root mean square of their values, and whether there are negative ones at all.
    """
    rows = torch.arange(0, len(protected), -(-len(protected) // _ROWS))
    sample = protected[rows] if isinstance(protected, Tensor) else protected.vectors(rows)
    theirs, ours = _root_mean_square(sample), _root_mean_square(latents)
    hint = "encode images with LatentSpace.encode, or latents as the sampler sees them, scaled and shifted"
    if theirs > _TIMES * ours or ours > _TIMES * theirs:
        warnings.warn(
            f"the values of the protected references are {theirs / max(ours, 1e-30):.3g} times as large as those of "
            f"the finished images (root mean square {theirs:.3g} and {ours:.3g}), so they are probably of another "
            f"range: {hint}.",
            RangeWarning,
            stacklevel=2,
        )
        return
    negative = [(values < 0).float().mean().item() for values in (sample, latents)]
    if min(negative) == 0 and max(negative) > _SOME_NEGATIVE:
        which = ("protected references", "finished images") if negative[0] == 0 else ("finished images", "references")
        warnings.warn(
            f"no value of the {which[0]} is negative, as of pixels in [0, 1], but {max(negative):.0%} of the "
            f"{which[1]} are, so they are probably of another range: {hint}.",
            RangeWarning,
            stacklevel=2,
        )


def _root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
