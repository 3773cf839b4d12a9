"""A protected set finds changed copies by its descriptor, exactly, through all changes of the set."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.descriptors import pictures, small_descriptor
from shielded.copies import Descriptor
from shielded.latent_space import LatentSpace
from shielded.protected import ProtectedSet, add_images, store

SPACE = LatentSpace(shape=(2, 3, 3))
COUNT = 30


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory):
    return small_descriptor(tmp_path_factory.mktemp("descriptor"))


@pytest.fixture(scope="module")
def vectors(descriptor):
    return descriptor.of(pictures(COUNT))


def latents(count=COUNT):
    return torch.randn(count, *SPACE.shape, generator=torch.Generator().manual_seed(0))


def names(first, last):
    return [f"picture {i}" for i in range(first, last)]


@pytest.fixture
def protected(tmp_path, descriptor, vectors):
    protected = ProtectedSet.create(tmp_path / "set", SPACE, descriptor=descriptor)
    z = latents()
    protected.add((z[:20], vectors[:20]), names(0, 20))
    protected.add((z[20:], vectors[20:]), names(20, COUNT))
    return protected


def brute_force(vectors, queries, k):
    similarities = queries.double() @ vectors.double().T
    order = sorted(range(len(vectors)), key=lambda row: (-similarities[0, row].item(), row))[:k]
    return similarities[0, order], order


def test_copies_are_found_exactly_and_survive_removal_compaction_and_reopening(protected, descriptor, vectors):
    query = pictures(COUNT + 3)[17:18]
    described = descriptor.of(query)

    def check(protected, kept):
        similarities, ids = protected.copies(query, k=5)
        expected, order = brute_force(vectors[kept], described, 5)
        assert ids == [[f"picture {kept[row]}" for row in order]]
        torch.testing.assert_close(similarities[0], expected, atol=1e-12, rtol=0)
        assert torch.equal(protected.copies(described, k=5)[0], similarities)

    kept = list(range(COUNT))
    assert protected.copies(query)[1] == [["picture 17"]]
    check(protected, kept)
    version = protected.version
    protected.remove(names(17, 19))
    kept = [row for row in kept if row not in (17, 18)]
    check(protected, kept)
    check(ProtectedSet.open(protected.path, version, descriptor=descriptor), list(range(COUNT)))
    protected.compact()
    check(protected, kept)
    assert protected.verify()["rows"] == len(kept)
    opened = ProtectedSet.open(protected.path, descriptor=descriptor)
    check(opened, kept)
    assert opened.descriptor == descriptor.record


def test_equal_vectors_come_in_the_order_of_rows(tmp_path, descriptor, vectors):
    protected = ProtectedSet.create(tmp_path / "set", SPACE, descriptor=descriptor)
    protected.add((latents(4), vectors[[2, 5, 2, 2]]), ["a", "b", "c", "d"])
    assert protected.copies(vectors[2:3], k=4)[1] == [["a", "c", "d", "b"]]


def test_images_are_encoded_and_described(tmp_path, descriptor, monkeypatch):
    def encode(self, images):
        return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])

    monkeypatch.setattr(LatentSpace, "encode", encode)
    space = LatentSpace(shape=(3, 32, 32))
    protected = ProtectedSet.create(tmp_path / "set", space, descriptor=descriptor)
    images = pictures(3)
    protected.add(images, ["a", "b", "c"])
    similarities, ids = protected.copies(images)
    assert ids == [["a"], ["b"], ["c"]]
    torch.testing.assert_close(similarities, torch.ones(3, 1, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(protected.vectors([0, 1, 2]), space.encode(images))


def test_pictures_are_cut_to_the_shape_of_the_set(tmp_path, descriptor):
    space = LatentSpace(shape=(2, 3, 3), image_size=(20, 20))
    protected = ProtectedSet.create(tmp_path / "set", space, descriptor=descriptor)
    wide = pictures(1, side=40)[0].resize((60, 40))
    torch.testing.assert_close(protected.describe([wide]), descriptor.of([wide.crop((10, 0, 50, 40))]))


def test_the_threshold_can_be_changed(protected, descriptor):
    assert protected.copy_threshold == 0.9
    version = protected.version
    protected.set_copy_threshold(0.75)
    opened = ProtectedSet.open(protected.path, descriptor=descriptor)
    assert protected.copy_threshold == opened.copy_threshold == 0.75
    assert (opened.version, opened.history[-1]["action"]) == (version + 1, "threshold")
    assert protected.at(version).copy_threshold == 0.9
    assert len(protected.at(version)) == COUNT
    protected.remove(names(0, 1))
    assert protected.copy_threshold == 0.75
    for wrong in (1.5, float("nan")):
        with pytest.raises(ValueError, match="between -1 and 1"):
            protected.set_copy_threshold(wrong)


def test_a_damaged_descriptor_is_noticed(protected):
    file = min(protected.path.glob("*[0-9].safetensors"))
    content = bytearray(file.read_bytes())
    place = content.find(load_file(file)["descriptors"].tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        protected.verify()


def test_a_set_made_without_a_descriptor_works_by_distance(tmp_path, descriptor, vectors):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    protected.add(latents(3), ["a", "b", "c"])
    manifest = json.loads((tmp_path / "set" / "set.json").read_text())
    assert manifest["descriptor"] is None
    assert protected.descriptor is None
    assert protected.nearest(latents(3)[:1])[1] == [["a"]]
    with pytest.raises(ValueError, match="works by distance alone"):
        protected.copies(pictures(1))
    with pytest.raises(ValueError, match="takes latents alone"):
        protected.add((latents(1), vectors[:1]), ["d"])
    with pytest.raises(ValueError, match="has no descriptor"):
        ProtectedSet.open(tmp_path / "set", descriptor=descriptor)


def test_a_set_of_an_earlier_version_opens(tmp_path):
    ProtectedSet.create(tmp_path / "set", SPACE).add(latents(3), ["a", "b", "c"])
    manifest = store.read_manifest(tmp_path / "set")
    del manifest["descriptor"]
    store.write_manifest(tmp_path / "set", manifest)
    protected = ProtectedSet.open(tmp_path / "set")
    assert protected.descriptor is None
    assert protected.nearest(latents(3)[:1])[1] == [["a"]]
    protected.add(latents(1), ["d"])
    assert len(ProtectedSet.open(tmp_path / "set")) == 4


def test_other_weights_are_refused(protected, tmp_path, descriptor):
    other = small_descriptor(tmp_path, 1)
    with pytest.raises(ValueError, match="other weights cannot be compared"):
        ProtectedSet.open(protected.path, descriptor=other)
    path = tmp_path / "sscd"
    unknown = Descriptor("sscd", "0" * 64, 8, lambda pixels: pixels.mean(dim=(2, 3)) + torch.tensor([1.0, 2.0, 3.0]))
    ProtectedSet.create(path, SPACE, descriptor=unknown)
    with pytest.raises(ValueError, match="was made with the descriptor 'sscd'; load it"):
        ProtectedSet.open(path).copies(pictures(1))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, r"add images, or \(latents, descriptors\)"),
        (torch.ones(2, 5), r"float tensor \(2, 12\)"),
        (torch.ones(2, 12), "unit vectors"),
        (torch.full((2, 12), torch.nan), "unit vectors"),
    ],
)
def test_wrong_descriptors_are_refused(protected, described, message):
    given = latents(2) if described is None else (latents(2), described)
    with pytest.raises(ValueError, match=message):
        protected.add(given, ["x", "y"])
    assert len(protected) == COUNT


def test_wrong_questions_are_refused(protected, vectors):
    with pytest.raises(ValueError, match="k must be between 1 and the 30 rows"):
        protected.copies(vectors[:1], k=31)
    with pytest.raises(ValueError, match=r"descriptors must be \(B, 12\)"):
        protected.copies(torch.zeros(1, 5))


@pytest.mark.parametrize("mirror", [False, True])
def test_protected_files_are_described_as_they_are_encoded(tmp_path, descriptor, monkeypatch, mirror):
    def encode(self, images, batch_size=16):
        return images if isinstance(images, torch.Tensor) else torch.empty(0, 3, 32, 32)

    monkeypatch.setattr(LatentSpace, "encode", encode)
    space = LatentSpace(shape=(3, 32, 32), image_size=(32, 32))
    (tmp_path / "images").mkdir()
    images = pictures(5)
    for name, image in zip("abcde", images, strict=True):
        image.save(tmp_path / "images" / f"{name}.png")
    protected = ProtectedSet.create(tmp_path / "set", space, descriptor=descriptor)
    result = add_images(protected, tmp_path / "images", batch_size=2, mirror=mirror, progress=False)
    assert result.added == (10 if mirror else 5)
    similarities, ids = protected.copies(images, k=2 if mirror else 1)
    assert [set(names) for names in ids] == [{name, f"mirrored:{name}"} if mirror else {name} for name in "abcde"]
    torch.testing.assert_close(similarities, torch.ones_like(similarities), atol=1e-5, rtol=0)
