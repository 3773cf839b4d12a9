"""The formula against published golden numbers and closed forms; the projection against brute force."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls
from torch.utils._python_dispatch import TorchDispatchMode

from shielded import LatentSpace, ProtectedSet, Spell
from shielded.core import correction, references, sketch
from shielded.core.correction import project_correction, repellency
from shielded.core.distances import distances_of, squared_distances
from shielded.core.pairs import active_pairs, project_pairs, sum_pairs
from shielded.core.references import TensorReferences
from shielded.protected.references import SetReferences


def golden():
    """The points of the golden table: D = 256, five sines and a query next to the first."""
    i = torch.arange(1, 257, dtype=torch.float64)
    z = torch.stack([torch.sin(0.37 * (k + 1) * i + 0.1 * k * k) for k in range(5)])
    x = z[0] + 0.3 * torch.cos(0.11 * i)
    return x.view(1, 4, 8, 8), z.view(5, 4, 8, 8)


def distances(x, z):
    return (x.double().flatten(1)[:, None] - z.double().flatten(1)[None]).norm(dim=2)


def formula(x, z, radius):
    """The paper's sum in float64, term by term."""
    x, z = x.double(), z.double()
    delta = torch.zeros_like(x)
    for i in range(len(x)):
        for k in range(len(z)):
            d = (x[i] - z[k]).norm()
            delta[i] += max(radius - d, 0) * (x[i] - z[k]) / d
    return delta


@pytest.mark.parametrize(
    ("radius", "strength", "norm", "total", "head"),
    [
        (15.5, 1.0, 12.112784, 0.042220, (1.066325, 1.046951, 1.014922)),
        (15.5, 1.6, 19.380454, 0.067552, (1.706120, 1.675122, 1.623876)),
        (18.0, 1.0, 16.796721, 0.034311, (1.333027, 1.628446, 1.663430)),
    ],
)
def test_golden_numbers(radius, strength, norm, total, head):
    x, z = golden()
    delta = repellency(x, z, radius, overcompensation=strength).flatten()
    assert delta.norm().item() == pytest.approx(norm, abs=1e-5)
    assert delta.sum().item() == pytest.approx(total, abs=1e-5)
    assert delta[:3].tolist() == pytest.approx(head, abs=1e-5)


def test_golden_numbers_within_a_batch():
    x, z = golden()
    batch = torch.cat([x, 0.9 * x + 0.1 * z[1:2], z[2:3] + 0.2 * x]).flatten(1).float()
    radius = torch.full((3, 3), 15.5)
    delta = sum_pairs(batch, radius, active_pairs(batch, radius, torch.ones(3, 3, dtype=torch.bool)))
    assert delta.norm(dim=1).tolist() == pytest.approx([14.206032, 13.398328, 2.105508], abs=1e-5)
    assert delta.sum(dim=1).tolist() == pytest.approx([-0.449266, 0.335774, 0.113491], abs=1e-5)
    assert delta[0, :3].tolist() == pytest.approx([-0.094234, -0.014654, 0.449899], abs=1e-5)


@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("batch", [1, 2, 5, 6])  # 5 references: broadcasting must not pair rows with references
def test_shapes_and_rows_are_independent(batch, overlap):
    generator = torch.Generator().manual_seed(batch)
    x, z = torch.randn(batch, 3, 4, 4, generator=generator), torch.randn(5, 3, 4, 4, generator=generator)
    delta = repellency(x, z, 9.0, overlap=overlap)
    assert delta.shape == x.shape
    for i in range(batch):
        torch.testing.assert_close(delta[i : i + 1], repellency(x[i : i + 1], z, 9.0, overlap=overlap))
    if overlap == "sum":
        torch.testing.assert_close(delta.double(), formula(x, z, 9.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_shield_is_left_to_its_shell(dtype, overlap):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    x = (z + 0.2 * torch.randn(3, 4, 8, 8, generator=generator)).to(dtype)
    delta = repellency(x, z, 7.0, overlap=overlap)
    assert delta.dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    assert distances(x.double() + delta.double(), z).flatten().tolist() == pytest.approx([7.0] * 3, rel=tolerance)


@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e-9, 1e-3, 0.999])
def test_finite_push_of_length_r_minus_d_at_any_distance(distance, overlap):
    z = torch.zeros(1, 50)
    x = torch.zeros(1, 50)
    x[0, 7] = distance
    delta = repellency(x, z, 1.0, overlap=overlap, noise=torch.ones(1, 50))
    assert delta.norm().item() == pytest.approx(1 - distance, abs=1e-6)
    assert distances(x + delta, z).item() == pytest.approx(1.0, abs=1e-6)


def test_at_distance_zero_the_push_follows_the_noise():
    z, noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2)), torch.zeros(1, 4, 4, 4)
    noise[0, 1, 2, 3] = -5.0
    delta = repellency(z, z, 2.0, noise=noise)
    torch.testing.assert_close(delta, 2.0 * noise / 5.0)
    assert torch.equal(repellency(z, z, 2.0), repellency(z, z, 2.0))


@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("distance", [1.0, 1.001, 5.0, 1e6])
def test_exactly_zero_outside(distance, overlap):
    x = torch.zeros(2, 30)
    x[0, 0] = distance
    x[1, 1] = distance
    assert repellency(x, torch.zeros(1, 30), 1.0, overlap=overlap).count_nonzero() == 0


@given(st.integers(0, 10_000), st.sampled_from(["sum", "project"]))
@settings(max_examples=30, deadline=None)
def test_orthogonal_invariance_and_permutation(seed, overlap):
    generator = torch.Generator().manual_seed(seed)
    x, z = torch.randn(4, 24, generator=generator), torch.randn(6, 24, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    delta = repellency(x, z, 6.5, overlap=overlap)
    torch.testing.assert_close(
        repellency(x @ rotation, z @ rotation, 6.5, overlap=overlap), delta @ rotation, rtol=1e-3, atol=1e-3
    )
    order = torch.randperm(4, generator=generator)
    torch.testing.assert_close(
        repellency(x[order], z.flip(0), 6.5, overlap=overlap), delta[order], rtol=1e-3, atol=1e-3
    )


@given(
    seed=st.integers(0, 10_000),
    distance=st.one_of(st.just(0.0), st.floats(1e-12, 1e6)),
    depth=st.floats(1e-3, 1.0),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    overlap=st.sampled_from(["sum", "project"]),
)
@settings(max_examples=150, deadline=None)
def test_one_shield_at_any_distance_in_any_dtype(seed, distance, depth, batch, dtype, overlap):
    """From d = 0 to 1e6, next to a duplicate of the reference: outside nothing happens, inside the shell is reached."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float16:
        distance = min(distance, 1e5)  # its numbers end at 65,504
    away = torch.randn(batch, 1024, generator=generator, dtype=torch.float64)
    x = (distance * away / away.norm(dim=1, keepdim=True)).to(dtype)
    z = torch.zeros(2 if overlap == "project" else 1, 1024)
    d = distances(x, z).max().item()
    shell = (d + 1e-9) / (1 - 0.999 * depth)
    assume(dtype != torch.float16 or 1e-2 < shell < 1e5)  # where float16 has its full precision
    inside = repellency(x, z, shell, overlap=overlap)
    # Half a unit in the last place of each number, and the size of the float32 arithmetic in between.
    rounding = 2 * torch.finfo(dtype).eps + 3e-5
    assert distances(x.double() + inside.double(), z).min().item() >= shell * (1 - rounding)
    assert inside.double().norm(dim=1).max().item() <= (shell - distances(x, z).min().item()) + rounding * shell
    if d > 0:
        nearest = distances(x, z).min().item()
        assert repellency(x, z, nearest * (1 - 1e-3), overlap=overlap).count_nonzero() == 0


def smallest_move_directly(x, z, radius):
    """How far scipy moves one image, in coordinates and float64; it may stop at a move that is not the smallest."""
    w = (x.double()[None] - z.double()).numpy()
    excess = radius**2 - (w**2).sum(axis=1)
    basis = np.linalg.qr(w.T)[0]  # the smallest move lies in the span of the offsets, and one direction beside it
    w = w @ basis

    def value(v):
        return v @ v  # ‖h‖², with the last number of v the step at a right angle

    found = minimize(
        value,
        np.append(np.zeros(w.shape[1]), radius),
        jac=lambda v: 2 * v,
        constraints={
            "type": "ineq",
            "fun": lambda v: 2 * w @ v[:-1] + v @ v - excess,
            "jac": lambda v: np.hstack([2 * w + 2 * v[:-1], np.full((len(w), 1), 2 * v[-1])]),
        },
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return np.sqrt(found.fun)


# The projection -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 500), st.sampled_from([16, 64, 256]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_random_overlapping_sets_are_left_or_flagged(seed, count, dim, opposed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, dim, generator=generator)
    if opposed:
        z[count // 2 :] = -z[: count - count // 2]
    x = 0.2 * torch.randn(2, dim, generator=generator)
    radius = 1.05 * distances(x, z).max().item()
    spell = Spell(z, radius, overcompensation=1.0, batch=False)
    moved = x + spell(x, noise=torch.randn(2, dim, generator=generator))
    kept = distances(moved, z).min(dim=1).values >= radius * (1 - 1e-5)
    flagged = torch.tensor([row["unresolved"] for row in spell.trace])
    assert (kept | flagged).all()
    assert [row["active"] for row in spell.trace] == [count, count]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_smallest_move(seed):
    """No local search from many starts finds a shorter way out."""
    generator = torch.Generator().manual_seed(seed)
    count = 2 + seed % 3
    z = 0.8 * torch.randn(count, 6, generator=generator)
    x = 0.3 * torch.randn(1, 6, generator=generator)
    radius = 2.5
    move = repellency(x, z, radius, overlap="project").double()[0]
    assert distances(x + move, z).min() >= radius * (1 - 1e-5)
    best = np.inf
    point, centres = x[0].double().numpy(), z.double().numpy()
    for _ in range(12):
        start = torch.randn(6, generator=generator).double().numpy() * radius
        found = minimize(
            lambda h: h @ h,
            start,
            jac=lambda h: 2 * h,
            constraints={"type": "ineq", "fun": lambda h: ((point + h - centres) ** 2).sum(axis=1) - radius**2},
            method="SLSQP",
        )
        if found.success and np.linalg.norm(point + found.x - centres, axis=1).min() >= radius * (1 - 1e-5):
            best = min(best, np.linalg.norm(found.x))
    if np.isfinite(best):
        assert move.norm().item() <= best * (1 + 1e-3)


@pytest.mark.parametrize("gap", [1e-8, 1e-6, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_next_to_a_reference_in_a_crowd(gap, offset):
    """x0 almost on one of twelve references: neither shields nor the smallest move get lost in rounding."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(12, 600, generator=generator) + offset
    x = z[:3] + gap * torch.randn(3, 600, generator=generator)
    radius, noise = 30.0, torch.randn(3, 600, generator=generator)
    move = repellency(x, z, radius, overlap="project", noise=noise)
    assert distances(x.double() + move.double(), z).min() >= radius * (1 - 1e-5)
    for i in range(3):
        assert move[i].double().norm().item() <= smallest_move_directly(x[i], z, radius) * (1 + 1e-4)


@pytest.mark.parametrize("overlap", ["sum", "project"])
@pytest.mark.parametrize("own", [False, True])
def test_a_batch_is_solved_as_its_images_one_by_one(overlap, own):
    """In shared products and in parts, whether the images share their shields or each has some of its own."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(60, 300, generator=generator)
    x = 0.3 * torch.randn(70, 300, generator=generator)
    if own:
        x = (z[:, None] + 0.2 * torch.randn(60, 2, 300, generator=generator)).flatten(0, 1) + 5 * torch.arange(120)[
            :, None
        ]
        z = (x[:, None] + 0.5 * torch.randn(120, 4, 300, generator=generator)).flatten(0, 1)
    radius = 8.0 if own else 1.02 * distances(x, z).max().item()
    noise = torch.randn(x.shape, generator=generator)
    together = repellency(x, z, radius, overlap=overlap, noise=noise)
    for i in range(0, len(x), 17):
        alone = repellency(x[i : i + 1], z, radius, overlap=overlap, noise=noise[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    if overlap == "sum":
        torch.testing.assert_close(together[::40].double(), formula(x[::40], z, radius), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [150, 400])
def test_a_move_out_of_a_crowd_is_as_short_as_duality_allows(dim):
    """Any multipliers ν ≥ 0 bound the length of every way out from below; those of the move itself show it shortest."""
    generator = torch.Generator().manual_seed(13)
    count, common = 700, torch.randn(12, dim, generator=generator)
    z = torch.randn(count, 12, generator=generator) @ common + 0.5 * torch.randn(count, dim, generator=generator)
    x = 0.3 * z[:6] + 0.1 * torch.randn(6, dim, generator=generator)
    radius = 1.05 * distances(x, z).max().item()
    move = repellency(x, z, radius, overlap="project").double()
    assert (distances(x, z) < radius).all()
    assert (distances(x.double() + move, z) >= radius * (1 - 1e-6)).all()
    for start, h in zip(x.double().numpy(), move.numpy(), strict=True):
        offset = start - z.double().numpy()
        distance = np.linalg.norm(offset, axis=1)
        touched = np.linalg.norm(offset + h, axis=1) < radius * (1 + 2e-5)
        assert touched.sum() > 3
        units = offset[touched] / distance[touched, None]
        multipliers, _ = nnls(units.T, h)
        excess, slope = (radius**2 - distance[touched] ** 2) / (2 * distance[touched]), 1 / (2 * distance[touched])
        energy = np.square(multipliers @ units).sum()
        least = (multipliers @ excess - energy / 2) / (0.5 + multipliers @ slope)
        assert np.sqrt(least) <= np.linalg.norm(h) <= np.sqrt(least) * (1 + 1e-4)


class Systems(TorchDispatchMode):
    """The largest system of equations among those that are solved at once."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "linalg" in func.name() and args[0].dim() > 2 and len(args[0]) > 1:
            self.largest = max(self.largest, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_large_systems_are_solved_one_by_one():
    """torch solves several at once wrongly or never, on a CPU and after `torch.set_num_threads`."""
    generator = torch.Generator().manual_seed(2)
    z, x = torch.randn(200, 400, generator=generator), 0.2 * torch.randn(3, 400, generator=generator)
    radius = 1.05 * distances(x, z).max().item()
    with Systems() as systems:
        repellency(x, z, radius, overlap="project")
        repellency(x, torch.cat([z, -z]), radius, overlap="project")  # the way out is at a right angle
        assert 1 < systems.largest <= 64 or systems.largest == 0
        repellency(x, z[:20], radius, overlap="project")
    assert 1 < systems.largest <= 64


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, torch.Tensor) and "view" not in func.name() and "expand" not in func.name():
                self.largest = max(self.largest, value.numel())
        return made


@pytest.mark.parametrize("overlap", ["sum", "project"])
def test_no_tensor_of_batch_times_references_times_dimensions(overlap):
    generator = torch.Generator().manual_seed(0)
    x, z = 0.3 * torch.randn(48, 8192, generator=generator), torch.randn(40, 8192, generator=generator)
    radius = 1.1 * distances(x[:4], z).max().item()
    with Sizes() as sizes:
        move = repellency(x, z, radius, overlap=overlap)
    assert move.any(dim=1).all()
    assert sizes.largest <= max(x.numel(), z.numel())  # 40 times less than all differences


def test_references_are_fetched_once_per_round(tmp_path):
    """For the whole batch, not once per image."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 256, generator=generator)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape=(256,)))
    protected.add(z, [str(k) for k in range(30)])
    fetched = []

    class Counting(SetReferences):
        def vectors(self, rows):
            fetched.append(len(rows))
            return super().vectors(rows)

    x, noise = 0.3 * torch.randn(8, 256, generator=generator), torch.randn(8, 256, generator=generator)
    references = Counting(protected, 20.0, x.device)
    move, unresolved = project_correction(x, references, references.scan(x).hits(), noise)
    assert distances(x + move, z).min() >= 20.0 * (1 - 1e-5)
    assert not unresolved.any()
    assert fetched == [30]  # all shields are active from the start, and one round leaves them


@given(seed=st.integers(0, 10_000), dim=st.integers(1, 3000), offset=st.sampled_from([0.0, 100.0]), gap=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_distances_by_products_are_as_exact_as_they_say(seed, dim, offset, gap):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(5, dim, generator=generator) + offset
    x = torch.cat([z[:2] + gap**8 * torch.randn(2, dim, generator=generator), z[2:3]])
    squared, error = squared_distances(x, z)
    true = (x.double()[:, None] - z.double()).square().sum(dim=2)
    assert ((squared - true).abs() <= error).all()
    row = torch.arange(5)
    for i in range(3):
        found = distances_of(x, z, torch.full((5,), i), row, squared, error)
        torch.testing.assert_close(found, true[i].sqrt(), rtol=1e-7, atol=0.0)


@contextmanager
def low_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS = {"default": nullcontext, "medium": low_precision, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e22])
@pytest.mark.parametrize("nearest", [None, 1, 4, 40])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_scan_finds_what_float64_finds(monkeypatch, setting, scale, nearest, sketched):
    """Also at the shell itself, among equal references, and with a radius for each of them."""
    monkeypatch.setattr(sketch, "_MIN_ROWS", 0 if sketched else 1000)
    monkeypatch.setattr(sketch, "_SAMPLE_ROWS", 8)
    monkeypatch.setattr(references, "_MAX_OPEN_SHARE", 0.9)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(40, 5000, generator=generator)
    z[20:30] = z[:10]  # ties
    x = torch.cat([0.1 * z[:3], z[3:5] + 1e-3 * z[5:7], 0.2 * torch.randn(2, 5000, generator=generator)]) * scale
    z = z * scale
    true = torch.stack([(row.double() - z.double()).norm(dim=1) for row in x])
    rank = true.argsort(dim=1, stable=True).argsort(dim=1)
    shrink = (0.01 * true.min(dim=1).values.square()).float()
    for radius in (true[0, 7].item(), true.median().item(), true[1] * torch.linspace(0.9, 1.1, 40)):
        for reduction in (None, shrink):
            limit = torch.as_tensor(radius, dtype=torch.float64).expand(len(z))
            taken = 0 if reduction is None else reduction.double()[:, None]
            limit = (limit.square() - taken).clamp(min=0).sqrt().expand(len(x), -1)
            expected = (true < limit) & (rank < (nearest or len(z)))
            with SETTINGS[setting]():
                scan = TensorReferences(z, radius, nearest).scan(x, reduction)
                hits = scan.hits()
            assert bool(scan.some) or not expected.any()
            assert torch.equal(torch.stack([hits.query, hits.row]), expected.nonzero().T)
            torch.testing.assert_close(hits.distance, true[expected], rtol=1e-8, atol=0)
            torch.testing.assert_close(hits.radius, limit[expected], rtol=0, atol=0)


@pytest.mark.parametrize("first", [3, 20])
def test_few_shields_at_first_lead_to_the_same_move(monkeypatch, first):
    """What is known of the move out of some shields speeds up the next rounds and does not change where they end."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(150, 400, generator=generator)
    x = torch.cat([0.2 * torch.randn(6, 400, generator=generator), z[:2] + 0.02 * z[2:4]])
    radius = torch.linspace(0.9, 1.1, 150) * distances(x, z).median()
    expected = repellency(x, z, radius, overlap="project")
    monkeypatch.setattr(correction, "_MAX_NEW_SHIELDS", first)
    monkeypatch.setattr(correction, "_MAX_ROUNDS", 60)
    found = repellency(x, z, radius, overlap="project")
    assert (distances(x + found, z) >= (1 - 1e-5) * radius).all()
    torch.testing.assert_close(found.norm(dim=1), expected.norm(dim=1), rtol=2e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["random", "equal", "in a plane", "far away", "tiny", "huge"])
def test_sketches_are_never_farther_apart_than_rows(monkeypatch, kind):
    monkeypatch.setattr(sketch, "_SAMPLE_ROWS", 30)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(200, 300, generator=generator)
    if kind == "equal":
        z[:] = z[0]
    elif kind == "in a plane":
        z = z[:, :2] @ torch.randn(2, 300, generator=generator)
    elif kind == "far away":
        z = 1e4 + 1e-2 * z
    z = z * {"tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    x = torch.cat([z[:5], 0.5 * z[5:10], z[10:15] + 1e-3 * z[15:20], z.mean(dim=0, keepdim=True)])
    lower = sketch.Sketch(z).lower_bounds(x)
    true = distances(x, z)
    assert (lower <= true).all()
    if kind == "in a plane":  # nothing lies across it
        assert (lower >= 0.99 * true - 1e-3).all()


def test_no_direction_in_the_noise():
    """At the last step of some samplers the predicted noise is zero; the push takes a fixed direction then."""
    z = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    for overlap in ("sum", "project"):
        move = repellency(z[:1], z[:1], 2.0, overlap=overlap, noise=torch.zeros(1, 40))
        assert move.norm().item() == pytest.approx(2.0, rel=1e-5)
        move = repellency(z[:1], z, 30.0, overlap=overlap, noise=torch.zeros(1, 40))
        assert torch.isfinite(move).all()
    assert distances(z[:1] + move, z).min() >= 30.0 * (1 - 1e-5)


def test_opposing_shields_are_left_sideways():
    """Between two equal shields the normals oppose; the shortest way out is at a right angle, of length √(r² − d²)."""
    z = torch.zeros(2, 40)
    z[0, 0], z[1, 0] = 1.0, -1.0
    x, noise = torch.zeros(1, 40), torch.zeros(1, 40)
    noise[0, 5] = 1.0
    assert repellency(x, z, 2.0).norm() == 0  # the paper's sum cancels and leaves the image where it is
    move = repellency(x, z, 2.0, overlap="project", noise=noise)
    assert move.norm().item() == pytest.approx(3**0.5, rel=1e-4)
    assert move[0, 5].item() == pytest.approx(3**0.5, rel=1e-4)
    assert distances(x + move, z).min().item() >= 2.0 * (1 - 1e-5)


@pytest.mark.parametrize("dim", [16, 64, 1024])
@pytest.mark.parametrize("count", [1, 2, 8, 60, 500])
def test_outside_all_shields_for_random_overlapping_sets(dim, count):
    generator = torch.Generator().manual_seed(dim + count)
    z = torch.randn(count, dim, generator=generator)
    x = 0.5 * torch.randn(4, dim, generator=generator)
    noise = torch.randn(4, dim, generator=generator)
    radius = 1.1 * distances(x, z).median().item()
    moved = x + repellency(x, z, radius, overlap="project", noise=noise)
    assert distances(moved, z).min().item() >= radius * (1 - 1e-5) or dim < count


def test_duplicates_among_the_references_count_once():
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(3, 32, generator=generator)
    x = z[:1] + 0.1 * torch.randn(1, 32, generator=generator)
    once = repellency(x, z, 5.0, overlap="project")
    torch.testing.assert_close(repellency(x, z.repeat(4, 1), 5.0, overlap="project"), once, rtol=1e-3, atol=1e-3)


# Pairs --------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from(["sum", "project"]))
@settings(max_examples=30, deadline=None)
def test_pairs_turn_and_change_places_with_the_batch(seed, overlap):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 24, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator))
    order = torch.randperm(5, generator=generator)
    spell = Spell(radius=8.0, overlap=overlap)
    delta = spell(x)
    assert delta.any()
    torch.testing.assert_close(spell(x[order]), delta[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(spell(x @ rotation), delta @ rotation, rtol=1e-3, atol=1e-3)


def test_both_sides_of_a_pair_share_the_move():
    x = torch.zeros(2, 10)
    x[1, 0] = 1.0
    move, unresolved = project_pairs(x, torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(move[:, 0], torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=1e-4)
    assert move[:, 1:].abs().max() < 1e-5
    assert not unresolved.any()


@given(st.integers(2, 40), st.integers(0, 1000), st.floats(0.0, 2.0))
@example(39, 0, 0.29296875)  # takes most rounds of those tried
@settings(max_examples=20, deadline=None)
def test_pairs_are_separated(count, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    x = 3.0 + spread * torch.randn(count, 200, generator=generator) / 200**0.5
    together = torch.ones(count, count, dtype=torch.bool)
    move, unresolved = project_pairs(x, torch.full((count, count), 1.5), together)
    apart = distances(x + move, x + move) + 9 * torch.eye(count)
    close = (apart < 1.5 * (1 - 1e-4)).any(dim=1)
    assert not (close & ~unresolved).any()  # what is not kept is said
    assert not unresolved.any()
    assert (move.norm(dim=1) < 4.0).all()


def test_equal_rows_are_pushed_apart_antisymmetrically():
    x = torch.ones(2, 64)
    radius, together = torch.full((2, 2), 2.0), torch.ones(2, 2, dtype=torch.bool)
    delta = sum_pairs(x, radius, active_pairs(x, radius, together))
    torch.testing.assert_close(delta[0], -delta[1])
    assert delta[0].norm().item() == pytest.approx(2.0, abs=1e-5)
    move, _ = project_pairs(x, radius, together)
    torch.testing.assert_close(move[0], -move[1], rtol=1e-3, atol=1e-3)
    assert (move[0] - move[1]).norm().item() == pytest.approx(2.0, rel=1e-3)


def test_groups_do_not_repel_each_other():
    x = torch.zeros(4, 30)
    groups = torch.tensor([0, 0, 1, 1])
    move, _ = project_pairs(x, torch.full((4, 4), 1.0), groups[:, None] == groups[None])
    assert (move[0] - move[1]).norm() > 0.999
    assert (move[2] - move[3]).norm() > 0.999


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0, 1.0])])
def test_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match="positive"):
        repellency(torch.zeros(1, 4), torch.ones(3, 4), radius)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same"):
        repellency(torch.zeros(1, 4), torch.ones(3, 5), 1.0)
    with pytest.raises(ValueError, match="one per reference"):
        repellency(torch.zeros(1, 4), torch.ones(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        repellency(torch.full((1, 4), float("nan")), torch.ones(3, 4), 1.0)
    with pytest.raises(ValueError, match="overlap"):
        repellency(torch.zeros(1, 4), torch.ones(3, 4), 1.0, overlap="both")
