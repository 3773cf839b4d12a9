"""Finished pictures that the descriptor calls copies are sampled again, or refused, also outside of every shield."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ImageOps

from helpers.descriptors import pictures, small_descriptor
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.generation.copies import GROWTH, find_copies
from shielded.generation.repair import WIDER, repair

RADIUS = 0.5


def encode(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    protected = ProtectedSet.create(folder / "set", LatentSpace(shape=(3, 32, 32)), descriptor=small_descriptor(folder))
    images = pictures(4)
    protected.add((encode(images), protected.describe(images)), ["a", "b", "c", "d"])
    return protected


def repaired(protected, images, outcomes, on_leak="restart", attempts=4):
    """Repair images; restarts give the outcomes one after the other. Returns what came of it, radii and the log."""
    radii, log, coming = [], [], iter(outcomes)

    def resample(through, rows, _):
        radii.append(torch.as_tensor(through.spell.radius).clone())
        again = [next(coming) for _ in rows]
        return again, encode(again)

    spell = Spell(protected, RADIUS, batch=False)
    space = SimpleNamespace(encode=encode)
    made = repair(
        spell, space, list(images), encode(images), resample, on_leak, attempts, lambda event, **more: log.append(more)
    )
    return made, radii, log


def test_a_mirrored_copy_is_sampled_again_until_it_is_none(protected):
    copy, other = ImageOps.mirror(pictures(4)[2]), pictures(9)[8]
    made, radii, log = repaired(protected, [other, copy], [copy, other])
    assert made.refused == [None, None]
    assert made.attempts == [1, 3]
    assert made.images[1] is other
    assert made.copied == [None, None]
    distance = (encode([copy]) - protected.vectors([2])).double().norm().item()
    assert distance > RADIUS
    for restart, found in enumerate(radii, 1):
        wider = 1 + WIDER * restart
        expected = torch.full((4,), wider * RADIUS, dtype=torch.float64)
        expected[2] = wider * distance * GROWTH**restart
        torch.testing.assert_close(found.double(), expected)
    assert [entry.get("copy_id") for entry in log] == [None, "c", "c", None]


def test_what_remains_a_copy_is_refused(protected):
    copy = ImageOps.mirror(pictures(4)[1])
    made, radii, _ = repaired(protected, [copy], [copy, copy, copy])
    assert len(radii) == 3
    assert "it is a copy of b" in made.refused[0]
    assert made.kept == []
    made, radii, _ = repaired(protected, [copy], [], on_leak="refuse")
    assert "sampled once, it is a copy of b" in made.refused[0]
    assert radii == []


def test_without_a_threshold_nothing_is_called_a_copy(protected):
    images = pictures(1)
    assert find_copies(images, protected)[0].id == "a"
    version = protected.version
    protected.set_copy_threshold(None)
    assert find_copies(images, protected) == [None]
    assert protected.at(version).copy_threshold == 0.9
