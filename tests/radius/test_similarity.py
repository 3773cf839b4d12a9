"""The copy threshold: chosen by different pictures of the set, reported with what it catches beside the radius."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageOps

from helpers.descriptors import pictures, small_descriptor
from shielded import LatentSpace, ProtectedSet
from shielded.radius.evidence import Evidence, ProtectedPictures, draw_indices
from shielded.radius.similarity import (
    Similarities,
    copy_threshold,
    different_similarities,
    measure_similarities,
    smallest_threshold,
)

COUNT = 24


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity")
    space = LatentSpace(shape=(2, 3, 3), image_size=(32, 32))
    protected = ProtectedSet.create(folder / "set", space, descriptor=small_descriptor(folder))
    images = pictures(COUNT)
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    described = protected.describe(images)
    protected.add((torch.randn(COUNT, 2, 3, 3), described), [f"p{i}" for i in range(COUNT)])
    return protected


@given(
    st.lists(st.integers(-9990, 9990).map(lambda n: n / 1e4), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.5]),
)
def test_smallest_threshold_against_brute_force(values, rate):
    threshold = smallest_threshold(np.array(values), rate)
    allowed = rate * len(values)
    assert sum(value >= threshold for value in values) <= allowed
    assert sum(value >= threshold - 1.01e-4 for value in values) > allowed


def test_the_most_similar_different_picture_against_brute_force(protected):
    def motif(row):
        return row // 4

    vectors = protected.descriptors(range(COUNT)).double()
    expected = vectors @ vectors.T
    groups = torch.arange(COUNT) // 4
    expected[groups[:, None] == groups] = -2
    rows = [0, 7, 23, 11]
    similarities, others = different_similarities(protected, rows, motif)
    np.testing.assert_allclose(similarities, expected[rows].max(dim=1).values.numpy(), atol=1e-12)
    assert others.tolist() == expected[rows].argmax(dim=1).tolist()
    similarities, others = different_similarities(protected, rows, lambda row: 0)
    assert set(others.tolist()) == {-1}


def test_descriptors_are_read_in_the_order_of_the_rows(protected):
    expected = protected.describe(pictures(COUNT))
    torch.testing.assert_close(protected.descriptors([5, 2, 20, 2]), expected[[5, 2, 20, 2]])


def test_copies_are_measured_against_the_picture_or_its_mirror_image(protected, tmp_path):
    images = pictures(2)
    images[1].save(tmp_path / "1.png")
    shown = ProtectedPictures(protected, {})
    shown.open = lambda most, seed: {1: images[1]}
    evidence = Evidence(18, rows=draw_indices(COUNT, COUNT, 0))
    found = measure_similarities(shown, evidence, most=1)
    mirrored = protected.describe([ImageOps.mirror(images[1])]) @ protected.descriptors([1]).T
    assert found.copies["mirrored"] == pytest.approx(mirrored.item(), abs=1e-6)
    assert found.copies["JPEG 90"][0] > 0.98


def test_pictures_that_nearly_equal_each_other_are_listed_and_do_not_rule():
    different = np.array([0.5, 0.6, 0.995, 0.995, 0.55, 0.7, 0.7, 0.3, 0.2, 0.1])
    other = np.array([1, 0, 3, 2, 0, 6, 5, 0, 0, 0])
    copies = {"mirrored": np.array([0.99, 0.95]), "shift 3 %": np.array([0.6, 0.999])}
    similarities = Similarities(np.arange(10), other, different, copies)
    evidence = Evidence(4, copies={"mirrored": np.array([1.0, 9.0]), "shift 3 %": np.array([1.0, 9.0])})
    found = copy_threshold(similarities, evidence, 0.0, 2.0, list("abcdefghij"))
    assert found["nearly_equal"] == [["c", "d", 0.995]]
    assert found["threshold"] == pytest.approx(0.7001)
    assert (found["n"], found["false_alarms"]) == (8, 0)
    assert found["copies"] == {"mirrored": 1.0, "shift 3 %": 0.5}
    assert found["both"] == {"mirrored": 1.0, "shift 3 %": 1.0}
    assert found["deciding"][0] == ["f", "g", 0.7]
    tolerant = copy_threshold(similarities, evidence, 0.25, None, list("abcdefghij"))
    assert tolerant["threshold"] == pytest.approx(0.6001)
    assert (tolerant["false_alarms"], tolerant["both"]) == (0.25, {})


def test_without_different_pictures_there_is_no_threshold():
    similarities = Similarities(np.arange(2), np.full(2, -1), np.full(2, -1.0))
    assert copy_threshold(similarities, Evidence(4), 0.01, None, ["a", "b"]) is None
