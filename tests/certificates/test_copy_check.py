"""Certificates say which protected picture an image is most similar to, and `verify` measures it again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.descriptors import pictures, small_descriptor
from shielded import Certificate, LatentSpace, ProtectedSet
from shielded.certificates import verify_images
from shielded.certificates.certificate import attach_certificate, beside, certify

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def space(monkeypatch):
    def encode(self, images):
        return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])

    monkeypatch.setattr(LatentSpace, "encode", encode)
    return LatentSpace(shape=(3, 32, 32))


@pytest.fixture
def protected(tmp_path, space):
    protected = ProtectedSet.create(tmp_path / "set", space, descriptor=small_descriptor(tmp_path))
    protected.add(pictures(4), NAMES)
    return protected


def certified(folder, space, protected, image, radius=0.5):
    file = folder / "image.png"
    image.save(file)
    certificate = certify(space.encode([image]), [file], protected, radius, decoded=space.encode([image]))[0]
    return file, attach_certificate(file, certificate)


def verified(file, space, protected):
    with Image.open(file) as image:
        return verify_images([(file, image.convert("RGB"))], space, protected, 0.5)[0][0]


def test_a_mirrored_copy_is_outside_by_distance_and_a_copy_by_the_descriptor(tmp_path, space, protected):
    image = ImageOps.mirror(pictures(4)[2])
    file, certificate = certified(tmp_path, space, protected, image)
    assert not certificate.inside
    assert (certificate.copy_id, certificate.copy, certificate.copy_threshold) == ("c", True, 0.9)
    expected = protected.describe([image]).double() @ protected.describe(pictures(4)).double().T
    assert certificate.copy_similarity == pytest.approx(expected.max().item(), abs=1e-6)
    assert certificate.descriptor == {"name": "shielded", "sha256": protected.descriptor["sha256"]}
    assert Certificate.read(beside(file)) == certificate
    found = verified(file, space, protected)
    assert (found.copy_id, found.copy, found.problems) == ("c", True, [])
    assert found.copy_similarity == pytest.approx(certificate.copy_similarity)


def test_another_picture_is_no_copy(tmp_path, space, protected):
    file, certificate = certified(tmp_path, space, protected, pictures(9)[8])
    assert certificate.copy is False
    assert verified(file, space, protected).problems == []


def test_the_version_that_the_certificate_names_is_asked(tmp_path, space, protected):
    file, _ = certified(tmp_path, space, protected, ImageOps.mirror(pictures(4)[2]))
    protected.remove(["c"])
    found = verified(file, space, protected)
    assert found.problems == []
    assert found.copy_id != "c"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"copy_similarity": 0.2, "copy": False}, "is forged: it says that the picture is similar"),
        ({"copy": False}, "contradicts itself"),
        ({"descriptor": {"name": "shielded", "sha256": "0" * 64}}, "another descriptor"),
        ({"descriptor": None}, "does not say whether it is a copy"),
    ],
)
def test_what_does_not_hold_is_named(tmp_path, space, protected, changes, problem):
    file, certificate = certified(tmp_path, space, protected, ImageOps.mirror(pictures(4)[2]))
    attach_certificate(file, replace(certificate, **changes))
    assert any(problem in found for found in verified(file, space, protected).problems)


def test_a_set_without_a_descriptor_says_nothing_of_copies(tmp_path, space):
    protected = ProtectedSet.create(tmp_path / "set", space)
    protected.add(space.encode(pictures(4)), NAMES)
    file, certificate = certified(tmp_path, space, protected, pictures(9)[8])
    assert (certificate.copy_id, certificate.copy, certificate.descriptor) == (None, None, None)
    assert verified(file, space, protected).problems == []
    attach_certificate(file, replace(certificate, descriptor={"name": "shielded", "sha256": "0" * 64}))
    assert verified(file, space, protected).problems == ["its certificate names a descriptor, and the set has none"]
