"""The descriptor that comes along finds changed copies, also of pictures unlike those that it was trained on."""

import numpy as np
import pytest

from helpers.descriptors import pictures
from shielded.copies import Descriptor
from shielded.copies.descriptor import WEIGHTS
from shielded.radius.alterations import CHANGES

ORIGINALS = pictures(12, side=128, seed=3)


@pytest.fixture(scope="module")
def shipped():
    return Descriptor.load()


@pytest.fixture(scope="module")
def vectors(shipped):
    return shipped.of(ORIGINALS)


def test_it_is_small_and_has_a_threshold(shipped):
    assert WEIGHTS.stat().st_size < 6e6
    assert shipped.dim == 256
    assert 0.5 < shipped.threshold < 1


@pytest.mark.parametrize("kind", ["JPEG 50", "brightness -10 %", "mirrored", "shift 3 %", "crop 5 %"])
def test_changed_copies_are_found(shipped, vectors, kind):
    copies = shipped.of([CHANGES[kind](image, np.random.default_rng(0)) for image in ORIGINALS])
    similarities = copies @ vectors.T
    assert similarities.diagonal().min() > shipped.threshold
    assert similarities.argmax(dim=1).tolist() == list(range(12))


def test_other_pictures_are_no_copies(shipped, vectors):
    assert (vectors @ vectors.T).fill_diagonal_(0).max() < shipped.threshold
