"""The embedded model: loads without a network, runs with every common scheduler, and keeps its distance with Spell."""

import diffusers
import pytest
import torch

from shielded import LatentSpace, ProtectedSet, Spell
from shielded.certificates.certificate import certify, leaks
from shielded.evaluation.encoder import Encoder
from shielded.evaluation.metrics import caption_score
from shielded.generation import generate
from shielded.models import EMOJI, load

PROMPTS = ["red heart", "pizza"]
SEEDS = [3, 4]
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def pipe():
    return load("emoji", "cpu")


@pytest.fixture
def scheduled(pipe, request):
    """The pipeline with another scheduler, put back afterwards."""
    name, options = SCHEDULERS[request.param]
    original = pipe.scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(original.config, **options)
    yield pipe
    pipe.scheduler = original


def run(pipe, spell=None, steps=8):  # 8 divides the 1,000 training timesteps: DDIM then ends on x0 itself
    return generate(pipe, PROMPTS, SEEDS, spell, steps=steps, guidance_scale=3.0, progress=False)


@pytest.mark.parametrize("scheduled", SCHEDULERS, indirect=True)
def test_latents_are_bit_identical_while_no_shield_is_active(scheduled):
    plain = run(scheduled, steps=4)
    far = Spell(1e3 + torch.zeros(1, *LatentSpace.of(scheduled).shape), radius=1.0)
    step = scheduled.scheduler.step
    untouched = run(scheduled, far, steps=4)
    assert torch.equal(plain.latents, untouched.latents)
    assert scheduled.scheduler.step == step  # restored
    assert sum(row["active"] for row in far.trace) == 0


@pytest.mark.parametrize("scheduled", SCHEDULERS, indirect=True)
def test_own_images_are_left_to_the_radius(scheduled):
    plain = run(scheduled, steps=5)
    spell = Spell(plain.latents, radius=12.0, overcompensation=1.0, batch=False)
    kept = run(scheduled, spell, steps=5)
    distance = torch.cdist(kept.latents.flatten(1).double(), plain.latents.flatten(1).double())
    assert distance.min().item() >= 12.0 * (1 - 1e-4)


def test_same_seeds_same_images(pipe):
    spell = Spell(radius=20.0)
    first, second = run(pipe, spell), run(pipe, Spell(radius=20.0))
    assert torch.equal(first.latents, second.latents)
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_certificates_of_images_with_and_without(pipe, tmp_path):
    plain = run(pipe)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace.of(pipe))
    protected.add(plain.latents, ["heart", "pizza"], radius=10.0)
    kept = run(pipe, Spell(protected, batch=False))
    files = []
    for i, image in enumerate(kept.images):
        files.append(tmp_path / f"{i}.png")
        image.save(files[-1])
    assert leaks(certify(plain.latents, files, protected)) == 2
    certificates = certify(kept.latents, files, protected)
    assert leaks(certificates) == 0
    expected = (kept.latents[0] - plain.latents[0]).double().norm().item()
    assert certificates[0].nearest_id == "heart"
    assert certificates[0].nearest_distance == pytest.approx(expected, rel=1e-6)
    certificates[0].write(tmp_path / "0.json")
    assert type(certificates[0]).read(tmp_path / "0.json") == certificates[0]


def test_a_set_for_another_space_is_refused(pipe, tmp_path):
    other = ProtectedSet.create(tmp_path / "set", LatentSpace(shape=(4, 8, 8)))
    other.add(torch.zeros(1, 4, 8, 8), ["a"])
    with pytest.raises(ValueError, match="shape"):
        run(pipe, Spell(other, radius=1.0))


def test_encoding_and_decoding_agree(pipe):
    space = LatentSpace.of(pipe)
    made = run(pipe)
    again = space.encode(made.images)
    assert (again - made.latents).flatten(1).norm(dim=1).max() < 0.7 * made.latents.flatten(1).norm(dim=1).min()


def test_encoder_tells_prompts_apart(pipe):
    encoder = Encoder.from_pretrained(EMOJI / "encoder", EMOJI / "tokenizer")
    images = encoder.image_features(generate(pipe, PROMPTS, SEEDS, steps=15, guidance_scale=3.0, progress=False).images)
    right = caption_score(images, encoder.text_features(PROMPTS)).mean()
    wrong = caption_score(images, encoder.text_features(PROMPTS[::-1])).mean()
    assert right > wrong


def test_size_and_documentation():
    assert sum(file.stat().st_size for file in EMOJI.rglob("*") if file.is_file()) <= 30e6
    assert "Licence" in (EMOJI / "README.md").read_text()
    assert len((EMOJI / "captions.txt").read_text().splitlines()) >= 500


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="emoji"):
        load("emojis")
