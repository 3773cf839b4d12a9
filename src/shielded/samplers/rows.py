"""Choose rows of a batch without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """Take `chosen` (B, *S) where `rows` (B,) is true, and `others` (B, *S), bit for bit, elsewhere.

    >>> select_rows(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
    tensor([[1., 1.],
            [0., 0.]])
    """
    return torch.where(rows.view(-1, *[1] * (others.ndim - 1)), chosen, others)
