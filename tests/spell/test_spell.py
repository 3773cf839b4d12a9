"""Spell on an ideal memorising denoiser, and its options one by one."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shielded import Calibration, History, LatentSpace, ProtectedSet, RepelledDenoiser, Spell

DIM, POINTS, RADIUS = 48, 64, 3.0


@pytest.fixture(scope="module")
def points():
    return 1.2 * torch.randn(POINTS, DIM, generator=torch.Generator().manual_seed(0))


def memorising(points):
    """The ideal denoiser of a finite set: the posterior mean, which ends on a training point."""

    def denoiser(x, sigma):
        weights = torch.softmax(-torch.cdist(x, points).square() / (2 * sigma**2), dim=1)
        return weights @ points

    return denoiser


def sigmas(steps=24):
    ramp = torch.linspace(0, 1, steps)
    return torch.cat([(40 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 40 ** (1 / 7))) ** 7, torch.zeros(1)]).tolist()


def euler(denoiser, x):
    levels = sigmas()
    for now, then in itertools.pairwise(levels):
        x = x + (x - denoiser(x, now)) / now * (then - now)
    return x


def heun(denoiser, x):
    levels = sigmas()
    for now, then in itertools.pairwise(levels):
        slope = (x - denoiser(x, now)) / now
        guess = x + slope * (then - now)
        if then > 0:
            slope = (slope + (guess - denoiser(guess, then)) / then) / 2
        x = x + slope * (then - now)
    return x


def dpmpp_2m(denoiser, x):
    levels, before = sigmas(), None
    for i, (now, then) in enumerate(itertools.pairwise(levels)):
        denoised = denoiser(x, now)
        if then == 0:
            return denoised
        ratio = then / now
        target = denoised
        if before is not None:
            last, step = torch.tensor([levels[i - 1] / now, now / then]).log().tolist()
            target = (1 + step / (2 * last)) * denoised - step / (2 * last) * before
        x = ratio * x + (1 - ratio) * target
        before = denoised
    return x


def ancestral(denoiser, x):
    generator, levels = torch.Generator().manual_seed(3), sigmas()
    for now, then in itertools.pairwise(levels):
        denoised = denoiser(x, now)
        up = (then**2 * (now**2 - then**2) / now**2) ** 0.5
        down = (then**2 - up**2) ** 0.5
        x = x + (x - denoised) / now * (down - now) + up * torch.randn(x.shape, generator=generator)
    return x


SAMPLERS = [euler, heun, dpmpp_2m, ancestral]


def start(count, seed=1):
    return 40 * torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def nearest(samples, points):
    return torch.cdist(samples.double(), points.double()).min(dim=1).values


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
@pytest.mark.parametrize("overlap", ["sum", "project"])
def test_memorised_points_are_left_to_exactly_the_radius(points, sampler, overlap):
    plain = sampler(memorising(points), start(32))
    assert nearest(plain, points).max() < 0.01
    spell = Spell(points, RADIUS, overcompensation=1.0, batch=False, overlap=overlap)
    kept = nearest(sampler(RepelledDenoiser(memorising(points), spell), start(32)), points)
    assert kept.tolist() == pytest.approx([RADIUS] * 32, rel=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_overlapping_shells_are_kept_where_the_sum_leaks(sampler):
    """500 samples. The points lie close together in a plane of few dimensions, as pictures do, so normals oppose."""
    points = 3 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) @ torch.eye(4, 64)
    radius = 1.5 * torch.pdist(points).min().item()
    noise = 40 * torch.randn(500, 64, generator=torch.Generator().manual_seed(1))

    def leaks(overlap):
        spell = Spell(points, radius, overcompensation=1.0, batch=False, overlap=overlap)
        samples = sampler(RepelledDenoiser(memorising(points), spell), noise)
        return int((nearest(samples, points) < radius * (1 - 1e-4)).sum())

    assert leaks("project") == 0
    assert leaks("sum") > 0


@pytest.mark.parametrize("overlap", ["sum", "project"])
def test_batch_references_keep_the_images_of_a_batch_apart(points, overlap):
    plain = torch.pdist(euler(memorising(points[:2]), start(8)))
    assert plain.min() < 0.01
    spell = Spell(radius=RADIUS, overlap=overlap)
    apart = euler(RepelledDenoiser(memorising(points[:2]), spell), start(8))
    assert torch.pdist(apart).min() > 0.9 * RADIUS


def test_batch_and_protected_references_together(points):
    spell = Spell(points[:2], RADIUS, overcompensation=1.0)
    samples = euler(RepelledDenoiser(memorising(points[:2]), spell), start(8))
    assert nearest(samples, points[:2]).min() > RADIUS * (1 - 1e-3)
    assert torch.pdist(samples).min() > RADIUS * (1 - 1e-3)


def test_groups_repel_only_among_themselves():
    x0 = torch.zeros(4, 16)
    delta = Spell(radius=1.0, groups=torch.tensor([0, 1, 2, 2]))(x0)
    assert delta[:2].count_nonzero() == 0
    assert delta[2:].norm(dim=1).min() > 0.5
    with pytest.raises(ValueError, match="3 ids"):
        Spell(radius=1.0, groups=torch.tensor([0, 1, 2]))(x0)


@pytest.mark.parametrize("schedule", ["constant", "posterior"])
def test_groups_in_one_call_are_what_a_call_for_each_gives(schedule):
    generator = torch.Generator().manual_seed(4)
    x0 = torch.randn(18, 4, 6, 6, generator=generator)
    x0[7] = x0[4]  # equal images of a group
    groups = torch.tensor([2, 0, 1] * 5 + [1, 5, 2])  # interleaved, and one image alone
    calibration = None if schedule == "constant" else Calibration(energy=200.0)
    level = {"alpha": 0.8, "sigma": 0.6} if calibration else {}
    options = {"radius": 22.0, "radius_schedule": schedule, "calibration": calibration}
    together = Spell(groups=groups, **options)(x0, **level)
    assert together.flatten(1).any(dim=1).sum() >= 12
    for group in groups.unique():
        rows = groups == group
        assert torch.equal(together[rows], Spell(**options)(x0[rows], **level))


def test_mask_counts_the_hole_alone():
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = z + 0.01
    x0[:, :, 4:] += 100  # the known part differs and does not matter
    delta = Spell(z, 2.0, overcompensation=1.0, batch=False, mask=mask)(x0)
    assert delta[:, :, 4:].count_nonzero() == 0
    assert (x0 + delta - z)[:, :, :4].norm().item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize(("sigma", "acts"), [(9.0, False), (2.0, True), (0.5, False)])
def test_window_is_a_share_of_the_noise_schedule(sigma, acts):
    spell = Spell(torch.zeros(1, 8), 1.0, batch=False, window=(0.8, 0.5))
    delta = spell(torch.full((1, 8), 0.1), alpha=1.0, sigma=sigma)
    assert bool(delta.any()) == acts
    with pytest.raises(ValueError, match="noise level"):
        spell(torch.full((1, 8), 0.1))


def test_nearest_takes_the_k_nearest_only():
    z = torch.zeros(3, 8)
    z[1, 0], z[2, 1] = 0.5, 0.8
    x0 = torch.full((1, 8), 0.01)
    one = Spell(z, 2.0, batch=False, nearest=1, overlap="sum")(x0)
    torch.testing.assert_close(one, Spell(z[:1], 2.0, batch=False, overlap="sum")(x0))
    # The nearest reference, whether or not x0 is in its shield: not the nearest of those that fire.
    radii = torch.tensor([0.001, 2.0, 2.0])
    assert not Spell(z, radii, batch=False, nearest=1)(x0).any()
    assert Spell(z, radii, batch=False, nearest=2)(x0).any()


def test_posterior_radius_is_late_but_never_absent(points):
    """Shields are smaller while x0 is uncertain, and full at the end, also for a picture of little energy."""
    faint = torch.cat([points, 0.1 * points[:1]])
    spell = Spell(faint, RADIUS, overcompensation=1.0, batch=False, radius_schedule="posterior")
    kept = nearest(euler(RepelledDenoiser(memorising(faint), spell), start(64)), faint)
    assert kept.min() > RADIUS * (1 - 1e-4)
    calibration = Calibration(energy=100.0)
    assert calibration.posterior_variance(torch.tensor([40.0, 120.0]), 0.9).tolist() == pytest.approx([60.0, 0.0])
    assert calibration.posterior_variance(torch.tensor([40.0]), 0.5).item() == pytest.approx(25.0)
    assert calibration.posterior_variance(torch.tensor([40.0]), 0.1).item() == 0
    measured = Calibration(100.0, [0.2, 0.6], [1.0, 9.0])
    assert measured.posterior_variance(torch.tensor([40.0]), 0.4).item() == pytest.approx(5.0)


def test_history_is_bounded_saved_and_repels(tmp_path):
    history = History(limit=3)
    history.add(torch.arange(10.0).view(5, 2))
    assert history.latents.tolist() == [[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]
    history.save(tmp_path / "history.safetensors")
    loaded = History.load(tmp_path / "history.safetensors", limit=2)
    assert loaded.latents.tolist() == [[6.0, 7.0], [8.0, 9.0]]
    spell = Spell(radius=1.0, overcompensation=1.0, batch=False, history=loaded)
    x0 = torch.tensor([[6.0, 7.5]])
    assert (x0 + spell(x0)).tolist()[0] == pytest.approx([6.0, 8.0])
    spell.finish(torch.tensor([[0.0, 0.0]]))
    assert len(loaded) == 2
    assert spell(torch.tensor([[6.0, 7.5]])).count_nonzero() == 0  # forgotten
    with pytest.raises(ValueError, match="NaN"):
        history.add(torch.full((1, 2), float("nan")))
    with pytest.raises(ValueError, match="shape"):
        history.add(torch.zeros(1, 3))


def test_protected_set_on_disk_gives_the_same_as_its_tensor(tmp_path, points):
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape=(DIM,)))
    protected.add(points, [f"p{i}" for i in range(POINTS)], radius=RADIUS)
    x0 = points[:5] + 0.1
    level = {"noise": torch.ones_like(x0), "alpha": 0.5, "sigma": 0.5}
    for options in ({"radius_schedule": "posterior"}, {"overlap": "sum"}, {"nearest": 3}, {"nearest": 99}, {}):
        on_disk, in_memory = Spell(protected, batch=False, **options), Spell(points, RADIUS, batch=False, **options)
        torch.testing.assert_close(on_disk(x0, **level), in_memory(x0, **level))
    assert on_disk.trace[0]["nearest_id"] == "p0"
    protected.remove(["p0"])
    assert on_disk(x0)[0].count_nonzero() == 0
    with pytest.raises(ValueError, match="shape"):
        on_disk(torch.zeros(1, DIM + 1))


def test_trace_says_what_fired(tmp_path):
    spell = Spell(torch.zeros(2, 8), 1.0, overcompensation=1.0, batch=False)
    x0 = torch.zeros(2, 8)
    x0[0, 0], x0[1, 1] = 0.5, 7.0
    spell(x0, noise=torch.full((2, 8), 8**-0.5), alpha=1.0, sigma=2.0)
    near, far = spell.trace
    assert (near["active"], far["active"]) == (2, 0)
    assert near["push"] == pytest.approx(0.5, rel=1e-4)
    assert near["score_ratio"] == pytest.approx(0.25, rel=1e-4)  # (α/σ) 0.5 / ‖ε‖
    assert near["nearest_distance"] == pytest.approx(0.5)
    assert near["noise_level"] == pytest.approx(2 / 3)
    assert far["nearest_id"] is None
    spell.write_trace(tmp_path / "trace.csv")
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_callers_dtype_comes_back(dtype):
    delta = Spell(torch.zeros(1, 8), 1.0)(torch.full((2, 8), 0.1, dtype=dtype))
    assert delta.dtype == dtype
    assert delta.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protected": torch.zeros(2, 8)}, "radius"),
        ({"radius": None}, "radius"),
        ({"radius": 0.0}, "positive"),
        ({"radius": float("nan")}, "positive"),
        ({"protected": torch.zeros(0, 8), "radius": 1.0}, "empty"),
        ({"batch": False}, "nothing to repel"),
        ({"radius": 1.0, "overlap": "plus"}, "overlap"),
        ({"radius": 1.0, "window": (0.2, 0.8)}, "window"),
        ({"radius": 1.0, "nearest": 0}, "nearest"),
        ({"radius": 1.0, "overcompensation": -1.0}, "overcompensation"),
        ({"radius": 1.0, "radius_schedule": "late"}, "radius_schedule"),
        ({"radius": 1.0, "radius_schedule": "posterior"}, "calibration"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Spell(**options)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (torch.zeros(2, 9), "shape"),
        (torch.zeros(2, 8, dtype=torch.uint8), "uint8"),
        (torch.full((2, 8), float("inf")), "infinity"),
    ],
)
def test_references_that_cannot_be_latents_are_refused(references, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Spell(references, 1.0)(torch.zeros(1, 8))


def test_broken_x0_is_named():
    x0 = torch.zeros(3, 8)
    x0[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"images \[1\]"):
        Spell(radius=1.0)(x0)


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host would have to wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"history": True}, {"radius_schedule": "posterior"}, {"nearest": 2}])
def test_an_idle_step_reads_one_boolean_from_the_device(options):
    generator = torch.Generator().manual_seed(0)
    references, x0 = 10 * torch.randn(5, 3, 4, 4, generator=generator), torch.randn(4, 3, 4, 4, generator=generator)
    spell = Spell(references, 0.5, **options)
    if spell.history is not None:
        spell.history.add(20 + x0)
    spell(x0, noise=x0, alpha=0.5, sigma=0.5)  # builds what is kept
    with HostReads() as reads:
        assert not spell(x0, noise=x0, alpha=0.5, sigma=0.5).any()
    assert reads.count == 1 + 1  # the second is this test's own


# What is known to fail is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(5, 1), torch.ones(4, 2), torch.full((3, 1), 1e-25), torch.full((3, 4), 7.0).half()],
    ids=["line", "plane", "denormal", "half"],
)
def test_leave_gives_no_nan_for_equal_rows(latents):
    left = Spell(latents[:1].float() + 1e-26, 1.5).leave(latents)
    assert left.dtype == latents.dtype
    assert torch.isfinite(left).all()
    assert (left.double() - latents[:1].double()).norm(dim=1).min() >= 1.5 * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_are_apart_after_rounding(dtype):
    latents = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    spell = Spell(radius=14.0)
    left = spell.leave(latents).double()
    assert torch.pdist(left).min() >= 14.0 * (1 - 2e-5)


@pytest.mark.parametrize("case", ["walls", "crowd", "line"])
def test_images_too_close_after_finish_are_in_the_trace(case):
    """Where the protected references have the last word, the pairs that they leave too close are named."""
    generator = torch.Generator().manual_seed(1)
    if case == "walls":  # on both sides of a corridor that is too narrow for two
        protected = torch.tensor([[x, y] for x in torch.linspace(-40, 40, 81).tolist() for y in (-1.05, 1.05)])
        latents, radius = torch.tensor([[0.0, 0.0], [0.01, 0.0], [30.0, 5.0]]), 1.0
    elif case == "crowd":
        protected, latents, radius = torch.randn(50, 2, generator=generator), torch.zeros(20, 2), 1.0
    else:
        protected, latents, radius = torch.zeros(1, 1), 0.1 * torch.randn(12, 1, generator=generator), 3.0
    spell = Spell(protected, radius)
    spell.start()
    finished = spell.finish(latents).double()
    static = torch.cdist(finished, protected.double()).amin(dim=1)
    pairs = torch.cdist(finished, finished) + torch.eye(len(finished)) * 1e9
    expected = (static < radius * (1 - 1e-6)) | (pairs.amin(dim=1) < radius * (1 - 2e-4))
    told = [row["unresolved"] for row in spell.trace] or [False] * len(latents)
    assert told == expected.tolist()


def test_a_finish_that_keeps_every_distance_adds_nothing_to_the_trace():
    spell = Spell(torch.zeros(1, 8), 1.0)
    spell.start()
    spell.finish(torch.randn(4, 8, generator=torch.Generator().manual_seed(3)))
    assert spell.trace == []
