"""Descriptors: unit vectors, the same for a picture however it is given, by weights of one's own."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ImageOps

from helpers.descriptors import pictures, small_descriptor, write_network
from shielded.copies import Descriptor
from shielded.copies.network import CopyNetwork, fold
from shielded.files import file_sha256


def test_vectors_have_length_one_and_do_not_depend_on_the_batch(tmp_path):
    descriptor = small_descriptor(tmp_path)
    images = pictures(5)
    vectors = descriptor.of(images)
    assert vectors.shape == (5, descriptor.dim)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(descriptor.of(images[3:4]), vectors[3:4])
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(descriptor.of(pixels), vectors)
    assert descriptor.of([]).shape == (0, descriptor.dim)


def test_views_are_averaged_so_mirrored_pictures_have_the_same_vector(tmp_path):
    descriptor = small_descriptor(tmp_path)
    images = pictures(3, side=64)
    torch.testing.assert_close(descriptor.of([ImageOps.mirror(image) for image in images]), descriptor.of(images))
    single = Descriptor.load("shielded", write_network(tmp_path / "single.safetensors", views=[(0.0, False)]))
    assert (single.of([ImageOps.mirror(images[0])]) - single.of(images[:1])).abs().max() > 0.01
    both = single.of(images) + single.of([ImageOps.mirror(image) for image in images])
    torch.testing.assert_close(F.normalize(both, dim=1), descriptor.of(images), atol=2e-3, rtol=0)


def test_the_network_hardly_sees_brightness_and_contrast():
    torch.manual_seed(0)
    network = CopyNetwork(channels=(4, 4, 8, 8), blocks=(0, 0, 0, 0), dim=8).eval()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert (network(pixels) * network(0.5 * pixels + 0.2)).sum(dim=1).min() > 0.99


def test_folded_batch_norms_change_nothing():
    torch.manual_seed(1)
    network = CopyNetwork(channels=(4, 4, 8, 8), blocks=(0, 1, 1, 0), dim=8)
    pixels = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        for _ in range(3):
            network.train()(pixels)
        before = network.eval()(pixels)
        fold(network)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        torch.testing.assert_close(network(pixels), before, atol=1e-5, rtol=1e-4)


def test_name_and_digest_are_those_of_the_weights(tmp_path):
    one, other = small_descriptor(tmp_path, 0), small_descriptor(tmp_path, 1)
    assert one.name == other.name == "shielded"
    assert one.sha256 != other.sha256
    assert one.sha256 == file_sha256(tmp_path / "descriptor0.safetensors")
    assert one.record == {"name": "shielded", "sha256": one.sha256, "dim": 12, "threshold": 0.9}


def test_sscd_is_read_as_torchscript(tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3))

    file = tmp_path / "sscd.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Means()), file)
    descriptor = Descriptor.load("sscd", file)
    assert descriptor.dim == 3
    assert descriptor.sha256 == file_sha256(file)
    grey = torch.full((1, 3, 20, 20), 0.5)  # 0.75 in 0..1; standardised as networks for ImageNet expect
    expected = (torch.tensor([0.75] * 3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(descriptor.of(grey)[0], F.normalize(expected, dim=0))


def test_dinov2_is_read_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2")
    descriptor = Descriptor.load("dinov2", tmp_path / "dinov2")
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        token = model(pixel_values=((pixels + 1) / 2 - mean) / deviation).last_hidden_state[:, 0]
    torch.testing.assert_close(descriptor.of(pixels), F.normalize(token, dim=1), atol=1e-5, rtol=1e-4)
    again = Descriptor.load("dinov2", tmp_path / "dinov2")
    assert descriptor.dim == 16
    assert again.sha256 == descriptor.sha256
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(tmp_path / "dinov2")
    assert Descriptor.load("dinov2", tmp_path / "dinov2").sha256 != descriptor.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clip", None, "choose one of shielded, sscd, dinov2"),
        ("sscd", None, "needs path="),
        ("sscd", b"no script", "not a TorchScript file"),
        ("shielded", b"no weights", "does not hold a descriptor"),
    ],
)
def test_what_is_no_descriptor_is_refused(tmp_path, name, content, message):
    path = None
    if content is not None:
        path = tmp_path / "file"
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Descriptor.load(name, path)


def test_wrong_images_are_refused(tmp_path):
    descriptor = small_descriptor(tmp_path)
    with pytest.raises(FileNotFoundError, match="no descriptor at"):
        Descriptor.load("shielded", tmp_path / "missing")
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        descriptor.of(torch.full((1, 3, 8, 8), 200.0))
    with pytest.raises(ValueError, match="finite"):
        descriptor.of(torch.full((1, 3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="float tensor"):
        descriptor.of(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match="PIL"):
        descriptor.of(["a.png"])
