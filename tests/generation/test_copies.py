"""Finished pictures that the descriptor calls copies are sampled again, or refused, also outside of every shield."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from helpers.descriptors import pictures, small_descriptor
from shielded import LatentSpace, ProtectedSet, Spell
from shielded.generation import generate
from shielded.generation.copies import GROWTH, LEVELS, NEARLY, AwayFromCopies, away_from_copies, find_copies
from shielded.generation.repair import WIDER, repair
from shielded.models import load

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
    protected.set_copy_threshold(0.9)


# While sampling


def decode(latents):
    return [Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().clip(0, 255).byte().numpy()) for x in latents]


def test_what_is_becoming_a_copy_gets_a_shield_of_its_own(protected):
    copy, other = encode([ImageOps.mirror(pictures(4)[2]), pictures(9)[8]])
    reference = protected.vectors([2])[0]
    distance = (copy - reference).norm().item()
    nearest = protected.nearest(torch.stack([copy, other]))[0].flatten()
    radius = float(nearest.max() / NEARLY * 1.01)  # both are near a shield, and outside
    assert radius < nearest.min()
    log = []
    spell = Spell(protected, radius, 2.0, batch=False, radius_schedule="constant", release=0.4)
    space = SimpleNamespace(decode=decode)
    away = AwayFromCopies(spell, protected, space, lambda event, **more: log.append((event, more)))
    x0 = torch.stack([other, copy])
    reach = distance
    steps = [(0.6, 0), (0.5, 1), (0.45, 1), (0.3, 2), (0.2, 2)]
    assert LEVELS == (0.5, 0.3)
    for trajectory in range(2):
        away.start()
        for level, compared in steps:
            state = {"alpha": 1 - level, "sigma": level, "last": False}
            released = away.colliding(x0, **state)
            assert (released is not None) == (level == 0.45)  # found at the step before, and above `release`
            assert released is None or released.tolist() == [False, True]
            correction = away(x0, noise=torch.ones_like(x0), **state)
            assert not correction[0].any()
            reach = GROWTH**compared * distance
            expected = 2.0 * (reach / distance - 1) * (copy - reference)
            torch.testing.assert_close(correction[1], expected, rtol=1e-4, atol=1e-6)
        assert [event for event, _ in log] == ["copying"] * 2 * (trajectory + 1)
        assert [(more["row"], more["copy_id"], more["noise_level"]) for _, more in log[-2:]] == [
            (1, "c", 0.5),
            (1, "c", 0.3),
        ]


def test_a_blurred_copy_is_found_and_what_is_far_from_one_is_not_decoded_again(protected):
    x0 = encode(pictures(6)[4:])
    similarities = protected.copy_rows(decode(x0))[0].flatten()
    likest = int(similarities.argmax())
    assert similarities.max() - similarities.min() > 0.1
    protected.set_copy_threshold(float(similarities.max()) + 0.02)  # between BLUR · 0.5² and BLUR · 0.3²
    decoded, log = [], []

    def counted(latents):
        decoded.append(len(latents))
        return decode(latents)

    radius = float(protected.nearest(x0)[0].max())
    spell = Spell(protected, radius, batch=False, radius_schedule="constant")
    away = AwayFromCopies(
        spell, protected, SimpleNamespace(decode=counted), lambda event, **more: log.append((more["row"], event))
    )
    away.start()
    for level in (0.5, 0.3):
        away(x0, noise=torch.ones_like(x0), alpha=1 - level, sigma=level, last=False)
    protected.set_copy_threshold(0.9)
    assert log == [(likest, "copying")]
    assert decoded == [2, 1]


def test_only_near_images_are_decoded(protected):
    far = 3 * encode(pictures(9)[8:])
    away = AwayFromCopies(Spell(protected, RADIUS, batch=False), protected, SimpleNamespace(), None)
    away.start()
    assert not away(far, noise=torch.ones_like(far), alpha=0.6, sigma=0.4, last=False).any()


def test_generation_compares_where_the_set_has_a_threshold(tmp_path):
    pipe = load("emoji", "cpu")
    described = ProtectedSet.create(tmp_path / "set", LatentSpace.of(pipe), descriptor="shielded")
    options = {"prompts": ["pizza"], "seeds": [3], "steps": 3, "progress": False}
    described.add(generate(pipe, **options).images, ["pizza"])
    log = []
    for threshold in (None, -1.0):  # the descriptor calls nothing a copy, and everything
        described.set_copy_threshold(threshold)
        spell = Spell(described, 20.0, batch=False, radius_schedule="constant")
        assert isinstance(away_from_copies(spell, described.space, None), Spell) == (threshold is None)
        generate(
            pipe, spell=spell, on_leak="refuse", log=lambda event, **more: log.append((event, more["seed"])), **options
        )
    assert log == [("sampled", 3), ("copying", 3), ("sampled", 3)]
