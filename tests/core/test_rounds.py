"""What one round of the smallest move hands on to the next."""

import pytest
import torch

from shielded.core import rounds
from shielded.core.distances import squared_gaps
from shielded.core.rounds import Gaps


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_distances_between_references_are_within_their_bounds(offset):
    z = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)) + offset
    z[7], z[8] = z[250], z[251] + 1e-3
    squared, error = squared_gaps(z)
    true = torch.stack([(z.double() - row.double()).square().sum(dim=1) for row in z])
    assert (squared - true).abs().max() <= error
    assert error < 1e-9 * true.max()
    assert torch.equal(squared, squared.T)


@pytest.mark.parametrize("few", [0, 8])
def test_kept_distances_are_those_of_their_references(monkeypatch, few):
    """Whether the next group has most references of the one before, all, few or none."""
    monkeypatch.setattr(rounds, "FEW_REFERENCES", few)
    z = torch.randn(60, 50, generator=torch.Generator().manual_seed(1))
    true, gaps = torch.cdist(z.double(), z.double()).square(), Gaps()
    for first, last, step in ((0, 40, 1), (5, 45, 1), (10, 40, 3), (10, 40, 3), (38, 60, 1), (0, 5, 1), (0, 30, 1)):
        rows = torch.arange(first, last, step)
        squared, error = gaps.of(rows, z[rows])
        torch.testing.assert_close(squared, true[rows[:, None], rows], rtol=1e-12, atol=1e-10)
        assert 0 < error < 1e-9
