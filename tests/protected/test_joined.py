"""Several sets searched as one answer like one set of all their rows."""

import numpy as np
import pytest
import torch

from shielded import LatentSpace, ProtectedSet, Spell
from shielded._extras import RequestError
from shielded.protected import open_sets, parts_of

SPACE = LatentSpace((2, 3, 4))


def latents(n, seed):
    return torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sets(tmp_path):
    """Three sets, of which one has removed rows, and one set of all their rows."""
    whole = ProtectedSet.create(tmp_path / "whole", SPACE)
    paths = []
    for number, size in enumerate((5, 1, 7)):
        path = tmp_path / f"part-{number}"
        part = ProtectedSet.create(path, SPACE)
        radii = torch.rand(size, generator=torch.Generator().manual_seed(number)) + 6
        part.add(latents(size, number), [f"{i}" for i in range(size)], radii)
        if size == 5:
            part.remove(["2"])
        rows = torch.arange(len(part))
        whole.add(part.vectors(rows), [f"part-{number}/{name}" for name in part.ids], part.radii)
        paths.append(path)
    return open_sets(paths), whole


def test_it_reads_like_one_set(sets):
    joined, whole = sets
    assert joined.ids == whole.ids
    assert joined.ids[3:6] == whole.ids[3:6]
    assert torch.equal(joined.radii, whole.radii)
    assert joined.energy == pytest.approx(whole.energy)
    rows = torch.tensor([11, 0, 4, 5, 3])
    assert torch.equal(joined.vectors(rows), whole.vectors(rows))
    assert [len(part) for part in parts_of(joined)] == [4, 1, 7]
    assert parts_of(whole) == [whole]


@pytest.mark.parametrize("nearest", [None, 1, 3])
@pytest.mark.parametrize("radius", ["own", "one", "each", "every pair"])
@pytest.mark.parametrize("shrink", [False, True])
def test_it_finds_what_one_set_finds(sets, nearest, radius, shrink):
    joined, whole = sets
    x = latents(6, 9)
    k = len(whole)
    generator = torch.Generator().manual_seed(3)
    radii = {"own": None, "one": 6.5, "each": 8 * torch.rand(k, generator=generator, dtype=torch.float64)}
    given = radii.get(radius, 9 * torch.rand(6, k, generator=generator, dtype=torch.float64))
    less = torch.rand(6, generator=generator, dtype=torch.float64) if shrink else None
    found, expected = (one.within(x, given, less, nearest) for one in (joined, whole))
    assert len(expected) > 3
    for name in ("query", "row", "distance", "radius"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("k", [1, 4, 12])
def test_it_finds_the_nearest(sets, k):
    joined, whole = sets
    (found, names), (expected, others) = (one.nearest(latents(6, 9), k) for one in (joined, whole))
    assert torch.equal(found, expected)
    assert names == others


def test_a_spell_corrects_alike(sets):
    x = latents(4, 10)
    joined, whole = (Spell(one, batch=False, radius_schedule="constant")(x) for one in sets)
    assert joined.abs().max() > 0
    assert torch.equal(joined, whole)


def test_what_cannot_be_joined_is_refused(tmp_path, sets):
    ProtectedSet.create(tmp_path / "empty", SPACE)
    ProtectedSet.create(tmp_path / "other", LatentSpace((2, 4, 3))).add(torch.zeros(1, 2, 4, 3), ["a"])
    first = tmp_path / "part-0"
    for second, message in (("part-0", "given twice"), ("empty", "is empty"), ("other", "another latent space")):
        with pytest.raises(RequestError, match=message):
            open_sets([first, tmp_path / second])
    with pytest.raises(FileNotFoundError):
        open_sets([first, tmp_path / "nowhere"])
    with pytest.raises(RuntimeError, match="no descriptor in common"):
        sets[0]._reader.similar(np.zeros((1, 4)), 1)
