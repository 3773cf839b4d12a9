"""Radii by measured distances, and the measured denoising error, against brute force and closed forms."""

import io
import json
import math
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from shielded import Calibration, LatentSpace, ProtectedSet, Spell
from shielded.cli import app
from shielded.models import EMOJI, load
from shielded.radius.alterations import CHANGES
from shielded.radius.choose import (
    diversity_radius,
    largest_radius,
    protection_radius,
    radii_per_image,
    read_radii,
    share_within,
    suggested_radius,
    write_radii,
)
from shielded.radius.evidence import (
    Evidence,
    caption_of,
    copy_distances,
    different_distances,
    measure_evidence,
    open_pictures,
    prompt_distances,
)
from shielded.spell.posterior import measure_calibration

runner = CliRunner()
SHAPE = (3, 4, 4)
DIM = math.prod(SHAPE)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The denoising error ----------------------------------------------------------------------------------------------


class FakePipeline:
    """A sampling loop around a denoiser D(x, alpha, sigma) -> x0, with the scheduler's own prediction type."""

    def __init__(self, scheduler, denoiser):
        self.scheduler = scheduler
        self.denoiser = denoiser
        self.prompts = []

    def __call__(self, prompt, num_inference_steps, guidance_scale, latents, generator, output_type):
        assert (guidance_scale, output_type) == (1.0, "latent")
        self.prompts += prompt
        scheduler = self.scheduler
        shifted = scheduler.config.get("use_dynamic_shifting", False)
        scheduler.set_timesteps(num_inference_steps, **({"mu": 0.8} if shifted else {}))
        x = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = self._level(i, t)
            x0 = self.denoiser(x, alpha, sigma)
            flow = "FlowMatch" in type(scheduler).__name__
            output = (x - (1 if flow else alpha) * x0) / sigma  # velocity or epsilon
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x)[0]
        return SimpleNamespace(images=x)

    def _level(self, i, t):
        """(alpha, sigma), from what the schedulers' papers say."""
        name = type(self.scheduler).__name__
        if name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"):
            cumprod = float(self.scheduler.alphas_cumprod[int(t)])
            return cumprod**0.5, (1 - cumprod) ** 0.5
        sigma = float(self.scheduler.sigmas[i])
        if "FlowMatch" in name:
            return 1 - sigma, sigma
        if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
            alpha = 1 / (1 + sigma**2) ** 0.5
            return alpha, sigma * alpha
        return 1.0, sigma


MEAN, SPREAD = randn(*SHAPE, seed=5), 1.5


def gaussian(x, alpha, sigma):
    """E[X_0|x] for X_0 ~ N(MEAN, SPREAD²)."""
    return MEAN + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x - alpha * MEAN)


SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"use_dynamic_shifting": True},
    "FlowMatchHeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_error_of_the_ideal_gaussian_denoiser(name):
    """E‖X_0 − x0‖² = dim·s²σ²/(α²s² + σ²); with α + σ = 1/c and t = cσ that is a function of t alone."""
    pipe = FakePipeline(getattr(diffusers, name)(**SCHEDULERS[name]), gaussian)
    clean = MEAN + SPREAD * randn(400, *SHAPE, seed=1)
    measured = measure_calibration(pipe, clean, steps=6, seed=2, batch_size=150)
    assert measured.energy == pytest.approx(clean.square().sum().item() / 400, rel=1e-5)
    assert len(measured.levels) >= 6
    for t, error in zip(measured.levels, measured.error, strict=True):
        exact = DIM * SPREAD**2 * t**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
        assert error == pytest.approx(exact, rel=0.05)  # 400·48 squares: one standard deviation is 1 %


def test_error_of_the_ideal_memorising_denoiser():
    points = 2 * randn(5, *SHAPE, seed=3)

    def memorising(x, alpha, sigma):
        gaps = (x.double()[:, None] - alpha * points.double()).flatten(2).square().sum(2)
        weights = torch.softmax(-gaps / (2 * sigma**2), dim=1)
        return (weights @ points.double().flatten(1)).view_as(x).to(x.dtype)

    pipe = FakePipeline(diffusers.EulerDiscreteScheduler(), memorising)
    clean = points.repeat(200, 1, 1, 1)
    measured = measure_calibration(pipe, clean, steps=8, seed=4, batch_size=250)
    rng = np.random.default_rng(0)
    flat = points.double().flatten(1).numpy()
    for t, error in zip(measured.levels, measured.error, strict=True):
        sigma = t / (1 - t)  # α = 1
        known = flat[rng.integers(5, size=20000)]
        x = known + sigma * rng.normal(size=known.shape)
        weights = ((x[:, None] - flat) ** 2).sum(2) / (-2 * sigma**2)
        weights = np.exp(weights - weights.max(1, keepdims=True))
        x0 = weights / weights.sum(1, keepdims=True) @ flat
        expected = ((known - x0) ** 2).sum(1)
        assert error == pytest.approx(expected.mean(), abs=6 * expected.std() / 1000**0.5 + 1e-4)
    assert measured.error[0] < 1e-3 * measured.error[-1]  # a memorising model is sure of itself early


def test_prompts_go_with_their_latents():
    pipe = FakePipeline(diffusers.EulerDiscreteScheduler(), gaussian)
    measure_calibration(pipe, randn(5, *SHAPE), list("abcde"), steps=2, batch_size=2)
    assert pipe.prompts == list("abcde")
    measure_calibration(pipe, randn(2, *SHAPE), steps=2)
    assert pipe.prompts[5:] == ["", ""]


def test_a_sampler_that_leaves_the_schedule_is_refused():
    pipe = FakePipeline(diffusers.DDIMScheduler(clip_sample=True), gaussian)
    with pytest.raises(ValueError, match="clip_sample"):
        measure_calibration(pipe, 3 + randn(20, *SHAPE), steps=6)


@pytest.mark.parametrize(
    ("latents", "prompts", "message"), [(randn(0, *SHAPE), None, "no latents"), (randn(2, *SHAPE), ["a"], "2 latents")]
)
def test_what_cannot_be_measured(latents, prompts, message):
    with pytest.raises(ValueError, match=message):
        measure_calibration(FakePipeline(diffusers.EulerDiscreteScheduler(), gaussian), latents, prompts)


def test_bound_is_interpolated_and_vanishes_with_the_noise():
    calibration = Calibration(100.0, [0.4, 0.8], [10.0, 50.0])
    assert [calibration.bound(t) for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx([0, 5, 10, 30, 50, 50])
    assert calibration.posterior_variance(torch.tensor([0.0, 95.0]), 0.6).tolist() == pytest.approx([30, 5])


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ([0.5], [], "1 noise levels but 0 errors"),
        ([0.5, 0.4], [1.0, 1.0], "ascend"),
        ([0.0], [1.0], "ascend"),
        ([1.5], [1.0], "ascend"),
        ([0.5], [-1.0], "not negative"),
        ([0.5], [math.nan], "not negative"),
    ],
)
def test_a_calibration_must_make_sense(levels, error, message):
    with pytest.raises(ValueError, match=message):
        Calibration(1.0, levels, error)


def test_calibration_files(tmp_path):
    calibration = Calibration(10.0, [0.5], [2.0], "0123")
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    for text in ("{", "[1, 2]", '{"energies": 1}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="is no calibration"):
            Calibration.load(tmp_path / "other.json")


def test_the_embedded_models_calibration_is_of_that_model():
    calibration = Calibration.load(EMOJI / "calibration.json")
    assert calibration.space == LatentSpace.of(load("emoji", "cpu")).fingerprint
    assert calibration.error == sorted(calibration.error)  # more noise, more error
    assert all(calibration.bound(t) < calibration.energy * t**2 for t in calibration.levels)
    Spell(randn(2, 4, 16, 16), radius=1.0, radius_schedule="posterior", calibration=calibration)


# Radii ------------------------------------------------------------------------------------------------------------

DISTANCES = arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0, 9.0, math.inf]))


@given(DISTANCES, st.floats(0, 0.999))
def test_largest_radius_against_brute_force(distances, rate):
    if np.isinf(distances).all():
        with pytest.raises(ValueError, match="no distances"):
            largest_radius(distances, rate)
        return
    radius = largest_radius(distances, rate)
    assert (distances < radius).sum() <= rate * len(distances) + 1e-9
    finite = distances[np.isfinite(distances)]
    larger = np.nextafter(radius, np.inf)
    assert radius == finite.max() or (distances < larger).sum() > rate * len(distances) + 1e-9


@given(DISTANCES.filter(lambda d: np.isfinite(d).any()), st.floats(0, 0.999), st.floats(0, 0.999))
def test_more_false_alarms_never_mean_a_smaller_radius(distances, one, other):
    assert largest_radius(distances, min(one, other)) <= largest_radius(distances, max(one, other))


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_rates_are_shares(rate):
    with pytest.raises(ValueError, match="rate"):
        largest_radius(np.ones(3), rate)


@pytest.fixture
def protected(tmp_path):
    """60 rows in five clusters, the last three of them the same picture."""
    latents = 4 * randn(5, *SHAPE, seed=1).repeat_interleave(12, 0) + randn(60, *SHAPE, seed=2)
    latents[58:] = latents[57]
    made = ProtectedSet.create(tmp_path / "set", LatentSpace(SHAPE))
    made.add(latents, [f"p{i}" for i in range(60)])
    return made


@pytest.mark.parametrize("clusters", [False, True])
def test_nearest_different_picture_against_brute_force(protected, clusters):
    motifs = (lambda row: row // 12) if clusters else (lambda row: row)
    rows = [0, 3, 30, 57, 58, 59]
    distances, nearest = different_distances(protected, rows, motifs)
    flat = protected.vectors(range(60)).double().flatten(1).numpy()
    for row, distance, other in zip(rows, distances, nearest, strict=True):
        gaps = np.array([np.linalg.norm(flat[row] - z) for z in flat])
        gaps[[k for k in range(60) if gaps[k] == 0 or motifs(k) == motifs(row)]] = np.inf
        assert other == gaps.argmin()
        assert distance == pytest.approx(gaps.min(), rel=1e-9)


def test_nothing_is_different(protected):
    distances, nearest = different_distances(protected, [0, 59], lambda row: "one motif")
    assert np.isinf(distances).all()
    assert nearest.tolist() == [-1, -1]


def test_prompt_distances_are_of_each_pair_once():
    latents = randn(5, *SHAPE)
    same, other = prompt_distances(latents, ["a", "b", "a", "a", "b"])
    gap = {(i, j): float((latents[i].double() - latents[j].double()).norm()) for i in range(5) for j in range(i)}
    assert sorted(same) == pytest.approx(sorted(gap[pair] for pair in [(2, 0), (3, 0), (3, 2), (4, 1)]))
    assert len(other) == 6
    assert sorted([*same, *other]) == pytest.approx(sorted(gap.values()))


def test_protection_reports_shares_at_the_suggested_radius():
    evidence = Evidence(
        dim=16,
        different=np.arange(1.0, 101.0),
        copies={"weak": np.array([0.5, 0.9, 0.9, 20.0]), "strong": np.array([6.0, 7.0])},
        generations=np.array([3.0, 60.0]),
    )
    found = protection_radius(evidence, rate=0.05)
    assert (found["radius"], found["radius_per_sqrt_dim"]) == (6.0, 1.5)
    assert found["false_alarms"] == 0.05
    assert found["copies"] == {"weak": 0.75, "strong": 0.0}  # 6 is not closer than 6
    assert found["generations"] == 0.5
    radii = [row["radius"] for row in found["table"]]
    assert radii == sorted(radii)
    given = protection_radius(evidence, radius=50.5)
    assert (given["suggested"], given["radius"], given["false_alarms"]) == (False, 50.5, 0.5)


def test_nearly_equal_pictures_do_not_rule_the_radius():
    """Three of a hundred are as close as half of the least altered copies."""
    evidence = Evidence(
        dim=16,
        different=np.r_[0.1, 0.2, 0.3, np.arange(4.0, 101.0)],
        copies={"weak": np.array([0.2, 1.0, 5.0]), "strong": np.array([6.0, 7.0])},
    )
    found = protection_radius(evidence, rate=0.0)
    assert (found["nearly_equal"], found["nearly_equal_below"]) == (3, 1.0)
    assert (found["radius"], found["false_alarms"], found["n"]) == (4.0, 0.0, 97)
    evidence.different = evidence.different[:3]  # nothing else is there to go by
    assert protection_radius(evidence, rate=0.0)["radius"] == 0.1


def test_a_radius_is_suggested_for_a_set_without_one(tmp_path):
    """By hand: of 200 images on a line, two pairs lie closer than the others; 1 % are two images."""
    places = 10.0 * torch.arange(200.0)
    places[1], places[3] = 0.5, 21.0
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace((1, 1, 10_000)))
    protected.add(places[:, None, None, None] * torch.eye(10_000)[:1, None, None], list(range(200)))
    assert suggested_radius(protected) == pytest.approx(1.0)  # two of 200 are closer, 0.5 from each other
    assert suggested_radius(protected, rate=0.5) == pytest.approx(10.0)
    alone = ProtectedSet.create(tmp_path / "one", LatentSpace((1, 1, 16)))
    alone.add(torch.zeros(1, 1, 1, 16), ["a"])
    assert suggested_radius(alone) == 0.25 * 4


def test_one_picture_goes_by_plain_images():
    evidence = Evidence(dim=4, different=np.array([np.inf]), generations=np.array([8.0, 9.0]))
    assert (protection_radius(evidence)["basis"], protection_radius(evidence)["radius"]) == ("plain images", 8.0)
    with pytest.raises(ValueError, match="no distances"):
        protection_radius(Evidence(dim=4, different=np.array([np.inf])))


def test_diversity_radius():
    evidence = Evidence(dim=4, same_prompt=np.array([1.0, 2.0, 30.0]), other_prompt=np.arange(10.0, 20.0))
    found = diversity_radius(evidence, 0.2)
    assert (found["radius"], found["radius_per_sqrt_dim"]) == (12.0, 6.0)
    assert (found["other_prompt"], found["same_prompt"]) == (0.2, pytest.approx(2 / 3))


def test_share_of_nothing():
    assert share_within(np.empty(0), 1.0) is None


def test_shields_with_radii_of_their_own_do_not_overlap(protected):
    nearest, _ = different_distances(protected, range(60))
    radii = radii_per_image(nearest, 1e9)
    flat = protected.vectors(range(60)).double().flatten(1)
    gaps = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    different = gaps > 0
    assert (radii[:, None] + radii[None, :] <= gaps * (1 + 1e-12))[different].all()
    assert radii_per_image(nearest, 2.0).max() == 2.0
    assert radii_per_image(np.array([np.inf]), 2.0) == 2.0


def test_radii_file(protected, tmp_path):
    radii = np.linspace(1, 2, 60)
    write_radii(tmp_path / "radii.csv", protected, radii, 2 * radii)
    protected.remove(["p3"])  # rows move; the names do not
    read = read_radii(tmp_path / "radii.csv", protected)
    assert read.tolist() == np.delete(radii, 3).tolist()
    spell = Spell(protected, read, batch=False)
    assert spell(protected.vectors([0])).norm() == pytest.approx(1.6 * radii[0], rel=1e-4)
    protected.add(randn(1, *SHAPE), ["new"])
    with pytest.raises(ValueError, match=r"no radius for 1 of 60 .* 'new'"):
        read_radii(tmp_path / "radii.csv", protected)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns id and radius"):
        read_radii(tmp_path / "other.csv", protected)


# Changed copies ---------------------------------------------------------------------------------------------------


def picture(seed, size=128):
    """A few discs on a pale ground."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(rng.integers(180, 240, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, r = [*rng.integers(10, size - 10, 2).tolist(), int(rng.integers(8, size // 3))]
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(40, 220, 3).tolist()))
    return image


def changed(kind, image):
    before = image.tobytes()
    copy = CHANGES[kind](image, np.random.default_rng(0))
    assert (copy.size, copy.mode) == (image.size, "RGB")
    assert image.tobytes() == before
    return np.asarray(copy).astype(float), np.asarray(image).astype(float)


@pytest.mark.parametrize("quality", [90, 75, 50])
def test_jpeg(quality):
    copy, _ = changed(f"JPEG {quality}", picture(0))
    file = io.BytesIO()
    picture(0).save(file, "JPEG", quality=quality)
    assert (copy == np.asarray(Image.open(file))).all()


@pytest.mark.parametrize(("kind", "factor"), [("brightness +10 %", 1.1), ("brightness -10 %", 0.9)])
def test_brightness(kind, factor):
    copy, image = changed(kind, picture(1))
    assert np.abs(copy - np.minimum(factor * image, 255)).max() <= 1


@pytest.mark.parametrize(("kind", "factor"), [("contrast +25 %", 1.25), ("contrast -25 %", 0.75)])
def test_contrast(kind, factor):
    copy, image = changed(kind, picture(1))
    grey = (image @ [0.299, 0.587, 0.114]).mean()
    assert np.abs(copy - np.clip(grey + factor * (image - grey), 0, 255)).max() <= 2


@pytest.mark.parametrize(("kind", "deviation"), [("noise 2 %", 5.1), ("noise 5 %", 12.75)])
def test_noise(kind, deviation):
    flat = Image.new("RGB", (100, 100), (128, 128, 128))
    copy, image = changed(kind, flat)
    assert (copy - image).std() == pytest.approx(deviation, rel=0.03)
    assert abs((copy - image).mean()) < 0.3


@pytest.mark.parametrize(("kind", "pixels"), [("shift 1 %", 1), ("shift 3 %", 4)])
def test_shift(kind, pixels):
    copy, image = changed(kind, picture(2))
    assert (copy[:, pixels:] == image[:, :-pixels]).all()
    assert (copy[:, :pixels] == image[:, :1]).all()


@pytest.mark.parametrize(("kind", "pixels"), [("crop 1 %", 1), ("crop 5 %", 6)])
def test_crop(kind, pixels):
    copy, image = changed(kind, picture(3))
    inner = Image.fromarray(image[pixels:-pixels, pixels:-pixels].astype(np.uint8))
    assert (copy == np.asarray(inner.resize((128, 128), Image.Resampling.LANCZOS))).all()


def test_mirrored():
    copy, image = changed("mirrored", picture(4))
    assert (copy == image[:, ::-1]).all()


@pytest.mark.parametrize(("kind", "period"), [("half size", 2), ("quarter size", 4)])
def test_smaller_size_loses_what_is_finer(kind, period):
    fine = np.indices((128, 128))[1] // (period // 2) % 2 * 255  # stripes finer than the small picture can hold
    copy, _ = changed(kind, Image.fromarray(np.repeat(fine[..., None], 3, 2).astype(np.uint8)))
    assert copy[:, 8:-8].std() < 45 < 127
    smooth, image = changed(kind, Image.linear_gradient("L").resize((128, 128)).convert("RGB"))
    assert np.abs(smooth - image).max() < 6


def test_copies_are_measured_at_the_models_size():
    space = LatentSpace.of(load("emoji", "cpu"))
    images = [picture(seed, 400) for seed in range(3)]
    kinds = {"same": lambda image, rng: image, "JPEG 50": CHANGES["JPEG 50"]}
    found = copy_distances(space, images, changes=kinds)
    assert found["same"].tolist() == [0, 0, 0]
    small = images[1].resize((128, 128), Image.Resampling.LANCZOS)
    copy = CHANGES["JPEG 50"](small, None)
    assert found["JPEG 50"][1] == pytest.approx((space.encode([copy]) - space.encode([small])).norm().item(), rel=1e-4)


# Pictures and captions --------------------------------------------------------------------------------------------


def test_captions_beside_pictures(tmp_path):
    (tmp_path / "a.txt").write_text(" a red heart\n")
    (tmp_path / "b.json").write_text('{"caption": "an owl"}')
    (tmp_path / "c.json").write_text('{"title": "an owl"}')
    (tmp_path / "d.json").write_text("no JSON")
    (tmp_path / "e.json").write_text('["caption"]')
    captions = [caption_of(tmp_path / f"{name}.png") for name in "abcdef"]
    assert captions == ["a red heart", "an owl", None, None, None, None]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Seven pictures, two of them with one caption, and a protected set of them."""
    folder = tmp_path_factory.mktemp("calibrate") / "pictures"
    folder.mkdir()
    for seed in range(7):
        picture(seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"disc {max(seed, 1)}")
    target = folder.parent / "set"
    assert runner.invoke(app, ["protect", str(folder), "--out", str(target), "--json"]).exit_code == 0
    return folder, target


def test_a_mirrored_copy_is_near_where_mirrored_images_are_protected(files, tmp_path):
    arguments = ["protect", str(files[0] / "5.png"), "--mirror", "--out", str(tmp_path / "set")]
    assert runner.invoke(app, arguments).exit_code == 0
    space = LatentSpace.of(load("emoji", "cpu"))
    with open_pictures(space, tmp_path / "set", ()) as pictures:
        evidence = measure_evidence(space, pictures, torch.empty(0, *space.shape), [])
    assert evidence.copies["mirrored"][0] < 0.05 < evidence.copies["crop 5 %"][0]
    assert np.isinf(evidence.different).all()  # one motif
    with open_pictures(space, files[1], ()) as pictures:
        assert measure_evidence(space, pictures, torch.empty(0, *space.shape), []).copies["mirrored"].min() > 1


def test_pictures_are_found_where_they_are_now(files, tmp_path):
    folder, target = files
    space = LatentSpace.of(load("emoji", "cpu"))
    with open_pictures(space, target, ()) as pictures:
        opened = pictures.open(5, seed=0)
        assert len(opened) == 5
        for row, image in opened.items():
            assert image.tobytes() == picture(int(pictures.protected.ids[row])).tobytes()
        assert pictures.motif(0) == pictures.motif(1) != pictures.motif(2)
    picture(3).save(tmp_path / "moved.png")
    picture(99).save(tmp_path / "foreign.png")
    with open_pictures(space, target, [str(tmp_path)]) as pictures:
        assert list(pictures.open(5, seed=0)) == [3]
    kept = (folder / "2.png").read_bytes()
    try:
        picture(98).save(folder / "2.png")  # no longer what was protected
        with open_pictures(space, target, ()) as pictures:
            assert 2 not in pictures.open(7, seed=0)
    finally:
        (folder / "2.png").write_bytes(kept)


# The command ------------------------------------------------------------------------------------------------------

SHORT = ["--steps", "3", "--seeds", "2", "--sample", "4"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("red heart\n\nowl\n")
    return str(file)


def run(*arguments):
    return runner.invoke(app, ["calibrate", *map(str, arguments)])


def test_command_for_a_protected_set(files, prompts, tmp_path):
    _, target = files
    out = tmp_path / "out"
    result = run("--protect", target, "--prompts", prompts, "--per-image", "--out", out, "--json", *SHORT)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "radius.json").read_text())
    assert json.loads(result.stdout) == report
    found = report["protection"]
    assert (report["rows"], found["n"], report["changed_pictures"]) == (7, 7, 4)
    assert set(found["copies"]) == set(CHANGES)
    assert found["copies"]["JPEG 90"] == 1
    root = ProtectedSet.open(target).space.dim ** 0.5
    assert found["radius"] == pytest.approx(found["radius_per_sqrt_dim"] * root)

    # Against brute force over the latents themselves: the two pictures of one caption do not count as different.
    protected = ProtectedSet.open(target)
    flat = protected.vectors(range(7)).double().flatten(1)
    gaps = (flat[:, None] - flat[None, :]).norm(dim=2)
    gaps[range(7), range(7)] = gaps[0, 1] = gaps[1, 0] = math.inf
    assert found["radius"] == pytest.approx(gaps.min().item())
    assert report["closest"][0][2] == pytest.approx(gaps.min().item())
    radii = read_radii(out / "radii.csv", protected)
    assert radii.tolist() == pytest.approx((gaps.amin(dim=1) / 2).tolist())
    assert report["per_image"]["smallest"] == pytest.approx(radii.min().item())

    calibration = Calibration.load(out / "calibration.json")
    assert calibration.energy == pytest.approx(flat.square().sum(1).mean().item(), rel=0.5)
    assert (len(calibration.levels), report["denoising_error"]["with_caption"]) == (3, 4)
    assert calibration.space == protected.space.fingerprint
    assert (report["diversity"]["pairs_same_prompt"], report["diversity"]["pairs_other_prompt"]) == (2, 4)
    if report["plot"]:
        assert Image.open(out / "radius.png").width > 600
    assert run("--protect", target, "--out", out).exit_code == 2  # what is there is kept


def test_command_for_pictures_without_a_set(files, tmp_path):
    folder, _ = files
    result = run(
        "--images", folder / "1.png", "--images", folder / "2.png", "--seeds", 0, "--steps", 2, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    head, row, plot, empty, first, *_ = result.stdout.splitlines()
    assert head.split() == ["value", "per", "√dim", "false", "alarms", "copies", "caught"]
    assert row.startswith("radius, protected set")
    assert plot == f"Plot: {tmp_path / 'radius.png'}" or plot.startswith("No plot: ")
    assert (empty, first[:38]) == ("", "Suggested radius for the protected set")
    assert "diversity" not in result.stdout
    assert "L2" in result.stdout
    assert {file.name for file in tmp_path.iterdir()} <= {"radius.json", "radius.png", "calibration.json"}


def test_command_without_pictures(prompts, tmp_path):
    result = run("--prompts", prompts, "--out", tmp_path, *SHORT)
    assert result.exit_code == 0, result.output
    assert "Suggested radius for diversity" in result.stdout
    assert "protected" not in result.stdout
    assert json.loads((tmp_path / "radius.json").read_text())["denoising_error"]["pictures"] == 4


def test_a_single_picture_needs_plain_images(files, tmp_path):
    result = run("--images", files[0] / "1.png", "--seeds", 0, "--steps", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "no two different pictures" in result.stdout


def test_a_given_radius(files, tmp_path):
    result = run("--protect", files[1], "--seeds", 0, "--radius", 1e6, "--out", tmp_path, "--json", *SHORT[:2])
    found = json.loads(result.stdout)["protection"]
    assert (found["suggested"], found["radius"], found["false_alarms"]) == (False, 1e6, 1.0)
    assert set(found["copies"].values()) == {1.0}


def test_numbers_come_without_matplotlib(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("--protect", files[1], "--seeds", 0, "--steps", 2, "--sample", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "plots need the extra `plot`" in result.stdout
    assert "Suggested radius" in result.stdout
    assert not (tmp_path / "radius.png").exists()


def test_radii_come_where_the_error_cannot_be_measured(files, tmp_path, monkeypatch):
    pipe = load("emoji", "cpu")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    monkeypatch.setattr("shielded.radius.calibrate.load", lambda model, device: pipe)
    result = run("--protect", files[1], "--seeds", 0, "--steps", 4, "--sample", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "could not be measured" in result.stdout
    assert "Suggested radius" in result.stdout
    assert not (tmp_path / "calibration.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--radius", "-1"],
        ["--false-alarms", "1"],
        ["--false-alarms", "nan"],
        ["--seeds", "-1"],
        ["--sample", "0"],
        ["--per-image"],
        ["--seeds", "0"],
        ["--model", "someone/something"],
    ],
)
def test_bad_usage_exits_with_2(arguments, tmp_path):
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    assert run("--prompts", "empty.txt").exit_code == 2
    for arguments in (["--prompts", "nowhere.txt"], ["--protect", "nowhere"], ["--images", "nowhere", "--seeds", "0"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "nowhere" in result.stderr
