"""Checks of a Spell's options, and what their short forms stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shielded.core.correction import check_radius
from shielded.core.inputs import float_tensor
from shielded.protected import ProtectedSet
from shielded.spell.history import History
from shielded.spell.static import require_radii


def check_options(
    overcompensation: float,
    overlap: str,
    radius_schedule: str | None,
    nearest: int | None,
    window: tuple[float, float],
    release: float | None,
    release_scale: float,
    margin: float,
) -> None:
    """Refuse options of a Spell that are out of range.

    Raises:
        ValueError: names the option and what it may be.
    """
    if not overcompensation > 0 or overcompensation == float("inf"):
        raise ValueError(f"overcompensation must be positive and finite, not {overcompensation}.")
    if overlap not in ("sum", "project"):
        raise ValueError(f"overlap={overlap!r} is not known; use 'sum' or 'project'.")
    if radius_schedule not in (None, "constant", "posterior"):
        raise ValueError(f"radius_schedule={radius_schedule!r} is not known; use 'constant', 'posterior' or None.")
    if nearest is not None and nearest < 1:
        raise ValueError(f"nearest must be at least 1, not {nearest}; None means all protected references.")
    start, end = window
    if not 1 >= start > end >= 0:
        raise ValueError(f"window={window} must run from the noisy end to the clean one, like (1.0, 0.6).")
    if release is not None and not 0 <= release <= 1:
        raise ValueError(f"release must be a noise level from 0 to 1, not {release}; None never lets guidance go.")
    if not 1 <= release_scale < float("inf"):
        raise ValueError(f"release_scale must be a guidance scale of at least 1, not {release_scale}.")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be a share of the radius, 0 or more, not {margin}.")


def checked_radius(
    protected: ProtectedSet | Tensor | None, radius: float | Tensor | None, batch: bool, history: bool | int | History
) -> float | Tensor | None:
    """Refuse radii that do not fit the references; otherwise return them as a number or (K,) float64."""
    pushes_finished = batch or history is not False
    if protected is not None and len(protected) == 0:
        raise ValueError("the protected set is empty; add images to it, or pass protected=None.")
    if protected is None and not pushes_finished:
        raise ValueError("nothing to repel from: give a protected set, or batch=True, or history=True.")
    if radius is None and pushes_finished:
        raise ValueError(
            "radius is needed for batch and history references; pass radius=..., or batch=False and history=False "
            "to use the protected set's own radii."
        )
    if radius is not None:
        radius = check_radius(radius, -1 if protected is None else len(protected))
    if isinstance(radius, Tensor) and pushes_finished:
        raise ValueError("batch and history references need one radius; a radius per image works with batch=False.")
    if radius is None and isinstance(protected, Tensor):
        raise ValueError("a tensor of protected references has no radii of its own; pass radius=...")
    if radius is None and protected is not None and not isinstance(protected, Tensor):
        require_radii(protected.radii)
    return radius


def checked_protected(protected: Any) -> ProtectedSet | Tensor | None:
    """Return the references; an array becomes a tensor.

    Raises:
        TypeError: they are something else.
    """
    if protected is None or isinstance(protected, ProtectedSet):
        return protected
    return float_tensor(protected, "protected")


def checked_groups(groups: Any) -> Tensor | None:
    """Return the group of each image (B,) as integers; equal names become equal numbers.

    Raises:
        TypeError: it is no list, array or tensor with an id for each image.
    """
    if groups is None:
        return None
    ids = groups.tolist() if hasattr(groups, "tolist") else list(groups) if isinstance(groups, list | tuple) else None
    if ids is None or not isinstance(ids, list) or not all(isinstance(one, int | str) for one in ids):
        raise TypeError("groups must be a list of ids, numbers or names, one per image.")
    numbers = {one: number for number, one in enumerate(dict.fromkeys(ids))}
    return torch.tensor([numbers[one] for one in ids])


def require_finite(finite: Tensor, x: Tensor, step: int) -> None:
    """Refuse x0 (B, D) that is not finite.

    Raises:
        ValueError: names the images.
    """
    if not finite:
        rows = (~torch.isfinite(x).all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"x0 contains NaN or infinity at step {step}, images {rows}; the model overflowed, so try float32 or "
            "bfloat16."
        )


def energy_of(protected: ProtectedSet | Tensor) -> float:
    """Compute the mean ‖z‖² of the references."""
    if isinstance(protected, Tensor):
        return protected.float().flatten(1).square().sum(dim=1).mean().item()
    return protected.energy


def history_of(history: bool | int | History) -> History | None:
    """Return the history that an option stands for."""
    if isinstance(history, History):
        return history
    if history is False:
        return None
    return History() if history is True else History(history)
