"""What people pass: taken where its meaning is clear, refused with one sentence everywhere else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pipelines import randn
from shielded import Guided, History, LatentSpace, ProtectedSet, RepelledDenoiser, Spell, repellency
from shielded.core.inputs import float_tensor
from shielded.evaluation.metrics import vendi
from shielded.generation import generate

PICTURE = Image.new("RGB", (8, 8), "red")


def test_arrays_are_tensors():
    x0, z = randn(3, 2, 4), randn(5, 2, 4, seed=2)
    assert torch.equal(repellency(x0.numpy(), z.numpy(), 3.0), repellency(x0, z, 3.0))
    spells = Spell(z.numpy(), 3.0, batch=False), Spell(z, 3.0, batch=False)
    assert torch.equal(spells[0](x0.numpy()), spells[1](x0))
    assert vendi(x0.flatten(1).numpy()) == vendi(x0.flatten(1))
    half = float_tensor(x0.half().numpy(), "x")
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([PICTURE], r"not list of Image; encode pictures"),
        (PICTURE, r"not Image; encode pictures"),
        (Path("photos"), r"not \w*Path; read pictures with `shielded.protected.load_images`"),
        (["a.png"], "not list of str; read pictures"),
        ("my-set", "not str; read pictures .* sets with `ProtectedSet.open`"),
        ([randn(2, 4)], "not list of Tensor; join tensors with torch.stack"),
        (torch.zeros(1, 2, 4, dtype=torch.int64), "got torch.int64"),
        (np.zeros((1, 2, 4), np.uint8), "got torch.uint8"),
        (np.array([None]), "an array of object"),
        (5, "not int"),
    ],
)
def test_what_is_no_float_tensor_is_named(value, message, tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((2, 4)))
    protected.add(randn(1, 2, 4), [0])
    x0 = randn(1, 2, 4)
    calls = [
        lambda: repellency(value, x0, 1.0),
        lambda: repellency(x0, value, 1.0),
        lambda: Spell(value, 1.0),
        lambda: Spell(x0, 1.0)(value),
        lambda: protected.nearest(value),
        lambda: protected.within(value, 1.0),
        lambda: History().add(value),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()


def test_latents_and_ids_as_arrays(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((2, 4)))
    latents = randn(6, 2, 4)
    protected.add(latents[:2].numpy(), np.array([10, 11]))
    protected.add(latents[2:4], torch.tensor([12, 13]))
    protected.add(latents[4:], [np.int64(14), np.str_("fifteen")])
    assert list(protected.ids) == [10, 11, 12, 13, 14, "fifteen"]
    assert protected.nearest(latents.numpy())[1] == [[name] for name in protected.ids]
    protected.remove(np.array([10, 12]))
    assert len(protected) == 4
    for ids in (5, "ab", [1.5, 2.5], np.array([0.5, 1.5]), [None, None], [True, False]):
        with pytest.raises(TypeError, match="list of strings or whole numbers"):
            protected.add(latents[:2], ids)
    with pytest.raises(TypeError, match="must be a float tensor, not str"):
        protected.add("photos", ["a"])


def test_groups_as_lists_names_and_arrays():
    x0 = 0.1 * randn(4, 2, 4)
    expected = Spell(radius=2.0, groups=torch.tensor([0, 0, 1, 1]))(x0)
    for groups in ([7, 7, 3, 3], ["cat", "cat", "owl", "owl"], np.array([5, 5, 9, 9]), ("a", "a", "b", "b")):
        assert torch.equal(Spell(radius=2.0, groups=groups)(x0), expected)
    for groups in (3, "cats", [[0, 1], [2, 3]], [0.5, 1.5]):
        with pytest.raises(TypeError, match="groups must be a list of ids"):
            Spell(radius=2.0, groups=groups)


def test_pictures_as_arrays_of_bytes():
    space = LatentSpace.pixels((3, 8, 8))
    arrays = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = space.encode([Image.fromarray(array) for array in arrays])
    assert torch.equal(space.encode(arrays), expected)
    assert torch.equal(space.encode(list(arrays)), expected)
    grey = space.encode(arrays[..., 0])
    assert torch.equal(grey, space.encode([Image.fromarray(array[..., 0]) for array in arrays]))
    for wrong in (arrays / 255, arrays.transpose(0, 3, 1, 2), arrays[0, 0]):
        with pytest.raises(TypeError, match="of bytes; got"):
            space.encode(wrong)
    for paths in ("photos", Path("photos"), ["a.png"], [Path("a.png")]):
        with pytest.raises(TypeError, match="PIL images, not paths"):
            space.encode(paths)


def test_denoisers_that_return_tuples():
    z, x = randn(2, 2, 4), randn(3, 2, 4, seed=3)

    def plain(x, sigma):
        return 0.5 * x

    def several(x, sigma):
        return 0.5 * x, "hidden", 7

    expected = RepelledDenoiser(plain, Spell(z, 3.0, batch=False))(x, 1.0)
    assert not torch.equal(expected, 0.5 * x)
    found = RepelledDenoiser(several, Spell(z, 3.0, batch=False))(x, 1.0)
    assert torch.equal(found[0], expected)
    assert found[1:] == ("hidden", 7)
    guided, other = Guided(several, plain, 2.0), Guided(plain, several, 2.0)
    assert guided(x, 1.0)[1:] == ("hidden", 7)
    assert torch.equal(guided(x, 1.0)[0], other(x, 1.0))
    both = RepelledDenoiser(guided, Spell(z, 3.0, batch=False))(x, 1.0)
    assert torch.equal(both[0], RepelledDenoiser(other, Spell(z, 3.0, batch=False))(x, 1.0))
    for wrong in ({"sample": x}, None, (), ("x", x)):
        with pytest.raises(TypeError, match="the denoiser <lambda> returned"):
            RepelledDenoiser(lambda x, sigma, wrong=wrong: wrong, Spell(z, 3.0, batch=False))(x, 1.0)


@pytest.mark.parametrize(("prompts", "seeds"), [("a cat", [0]), (["a cat"], 0), (None, [0])])
def test_one_prompt_or_seed_is_no_list(prompts, seeds):
    with pytest.raises(TypeError, match=r"(prompts|seeds) must be a list, one per image"):
        generate(None, prompts, seeds)
