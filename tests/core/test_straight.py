"""The straight way out, for rows that the smallest move leaves inside a shield, and what `repellency` says of rows."""

from __future__ import annotations

import pytest
import torch

from shielded import repellency
from shielded.core.directions import tie_break
from shielded.core.pairs import active_pairs, project_pairs, sum_pairs


def depth(x, delta, z, radius):
    """Largest share of its radius by which a row is inside a shield, in float64 by brute force."""
    moved = (x.double() + delta.double()).flatten(1)
    distance = (moved[:, None] - z.double().flatten(1)[None]).norm(dim=2)
    return (1 - distance / torch.as_tensor(radius, dtype=torch.float64)).amax().item()


def crowd(dim, count, seed, clusters=4):
    """References in clusters, and rows in their middle."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(clusters, dim, generator=generator)
    z = centres[torch.randint(0, clusters, (count,), generator=generator)]
    z = z + 0.4 * torch.randn(count, dim, generator=generator)
    x = z[torch.randint(0, count, (12,), generator=generator)] + 0.05 * torch.randn(12, dim, generator=generator)
    return x, z


@pytest.mark.parametrize(("dim", "count"), [(1, 200), (2, 150), (3, 300), (5, 60), (8, 40)])
def test_every_row_leaves_crowded_shields_in_few_dimensions(dim, count):
    x, z = crowd(dim, count, seed=dim)
    radius = 0.6 * dim**0.5
    assert depth(x, repellency(x, z, radius, overlap="project"), z, radius) <= 1e-5


def test_every_row_leaves_shields_of_different_radii():
    x, z = crowd(2, 80, seed=7)
    radius = torch.linspace(0.2, 1.5, len(z))
    assert depth(x, repellency(x, z, radius, overlap="project"), z, radius) <= 1e-5


def test_a_chain_longer_than_the_strides_is_left():
    """600 shields in a row, each reaching into the next, in one dimension; the start is in the middle."""
    z = torch.arange(600.0)[:, None]
    x = torch.tensor([[300.2], [0.3], [599.4]])
    delta = repellency(x, z, 1.0, overlap="project")
    assert depth(x, delta, z, 1.0) <= 1e-5
    assert delta[1:].abs().max() < 3  # the ends are near, and found


def test_equal_references_in_one_dimension_are_left():
    x, z = torch.zeros(3, 1), torch.zeros(5, 1)
    assert depth(x, repellency(x, z, 0.5, overlap="project"), z, 0.5) <= 1e-5


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_overcompensation_leads_into_no_other_shield(dim):
    """Beyond the shell of the first shield lies a second one."""
    x, z = torch.zeros(1, dim), torch.zeros(2, dim)
    x[0, 0], z[1, 0] = 0.5, 2.9
    delta = repellency(x, z, torch.tensor([1.0, 1.8]), overcompensation=2.0, overlap="project")
    assert depth(x, delta, z, torch.tensor([1.0, 1.8])) <= 1e-5
    free = repellency(x, z[:1], 1.0, overcompensation=2.0, overlap="project")
    assert (x + free).norm().item() == pytest.approx(1.5)  # with nothing behind, it goes on


@pytest.mark.parametrize("where", [1e10, -3e12, 1e20])
def test_a_row_that_rounding_keeps_inside_is_an_error(where):
    x = torch.full((2, 3), where)
    x[0] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] of x0 stay inside a shield"):
        repellency(x, x[1:] * 1, 1.0, overlap="project")


@pytest.mark.parametrize("name", ["x0", "references", "noise"])
def test_what_float32_cannot_hold_is_refused(name):
    values = {"x0": torch.zeros(1, 3), "references": torch.zeros(1, 3), "noise": torch.ones(1, 3)}
    values[name] = torch.full((1, 3), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{name} contains NaN or infinity, or numbers too large"):
        repellency(values["x0"], values["references"], 1.0, noise=values["noise"])


@pytest.mark.parametrize("count", [2, 7, 40])
def test_fixed_directions_differ_even_in_one_dimension(count):
    directions = tie_break(count, 1, torch.device("cpu"))
    assert len(directions.unique()) == count
    assert directions.abs().min() >= 1


@pytest.mark.parametrize("dim", [1, 2, 9])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_rows_of_a_batch_part(dim, offset):
    """Two clusters of equal rows, near each other or so far apart that the spectrum hides what is within a cluster."""
    x = torch.zeros(6, dim)
    x[3:] += offset
    radius, repels = torch.full((6, 6), 0.5), torch.ones(6, 6, dtype=torch.bool)
    assert torch.isfinite(sum_pairs(x, radius, active_pairs(x, radius, repels))).all()
    move, unresolved = project_pairs(x, radius, repels)
    assert torch.isfinite(move).all()
    distance = torch.cdist((x + move).double(), (x + move).double()) + torch.eye(6) * 9
    tolerance = 1e-4 + 1e-6 * offset  # of float32, where the rows are
    assert bool(unresolved.any()) == bool((distance < 0.5 * (1 - tolerance)).any())
