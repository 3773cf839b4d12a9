"""Which protected picture a row shows: the one that an image copies, else the nearest one."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.descriptors import pictures, small_descriptor
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.generation import Generated
from shielded.runs.certified import certified_rows


class Pixels(LatentSpace):
    """A latent space whose latents are the pixels."""

    def encode(self, images):
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in images])

    def decode(self, latents, batch_size=16):
        pixels = ((latents.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        return [Image.fromarray(array) for array in pixels]


@pytest.fixture
def made(tmp_path):
    """Two pairs: the first copies a protected picture without SPELL alone, the second on neither side."""
    space = Pixels(shape=(3, 32, 32))
    protected = ProtectedSet.create(tmp_path / "set", space, descriptor=small_descriptor(tmp_path))
    images = pictures(4)
    protected.add((space.encode(images), protected.describe(images)), ["a", "b", "c", "d"])
    before, after = [ImageOps.mirror(images[2]), pictures(9)[7]], [pictures(9)[8], pictures(9)[7]]
    sides = [Generated(side, space.encode(side)) for side in (before, after)]
    sides[1].causes[0] = "it was a copy of c"
    return space, images, Spell(protected, 0.5, batch=False), sides


def rows_of(space, spell, sides, show):
    return certified_rows(space, *sides, spell, ["p", "p"], [0, 1], ["0.png", "1.png"], {"model": "m"}, show)


def test_what_an_image_copies_stands_beside_it(made):
    space, images, spell, sides = made
    copy, other = rows_of(space, spell, sides, show=True)
    assert copy.protected.tobytes() == images[2].tobytes()
    assert [figure.label for figure in copy.pictures][2] == "protected, copied"
    assert copy.pictures[2].caption == copy.certificate_without.copy_id == "c"
    assert [figure.inside for figure in copy.pictures] == [True, False, False]
    nearest = {"a": 0, "b": 1, "c": 2, "d": 3}[other.certificate_with.nearest_id]
    assert other.protected.tobytes() == images[nearest].tobytes()
    assert [figure.label for figure in other.pictures][2] == "nearest protected"
    assert (copy.file, copy.cause, other.cause) == ("0.png", "it was a copy of c", None)


def test_protected_pictures_are_shown_only_where_that_is_allowed(made):
    space, _, spell, sides = made
    assert [row.protected for row in rows_of(space, spell, sides, show=False)] == [None, None]
