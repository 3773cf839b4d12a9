"""Each metric against a closed form, SciPy or loops in NumPy."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shielded.evaluation.comparison import compare
from shielded.evaluation.metrics import (
    bootstrap_interval,
    caption_score,
    density_coverage,
    frechet_distance,
    inside_shields,
    jackknife_interval,
    manifold_rows,
    mean_pairwise_similarity,
    nearest_distance,
    precision_recall,
    vendi,
)


def normal(*shape: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def loop_distances(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    return np.array([[math.dist(a, b) for b in second.tolist()] for a in first.tolist()])


def loop_radius(points: torch.Tensor, k: int) -> list[float]:
    """Distance to the k-th nearest other point."""
    distances = loop_distances(points, points)
    return [sorted(distances[i][j] for j in range(len(points)) if j != i)[k - 1] for i in range(len(points))]


ORDERS = [0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 10.0, math.inf]


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_counts_identical_and_orthogonal_rows(q):
    assert vendi(normal(1, 6).repeat(9, 1), q) == pytest.approx(1)
    assert vendi(normal(1, 6), q) == pytest.approx(1)
    assert vendi(3 * torch.eye(7, 12), q) == pytest.approx(7)
    assert vendi(torch.eye(5).repeat(4, 1), q) == pytest.approx(5)


@pytest.mark.parametrize("q", ORDERS)
def test_vendi_of_orthogonal_groups_is_the_renyi_number_of_their_sizes(q):
    sizes = np.array([1, 2, 5, 12])
    features = torch.eye(4).repeat_interleave(torch.tensor(sizes), dim=0)
    p = sizes / sizes.sum()
    if q == 1:
        expected = np.exp(-np.sum(p * np.log(p)))
    elif math.isinf(q):
        expected = 1 / p.max()
    else:
        expected = np.sum(p**q) ** (1 / (1 - q))
    assert vendi(features, q) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_vendi_matches_the_full_kernel(shape, q):
    features = normal(*shape, seed=1, shift=0.3)
    rows = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    p = np.linalg.eigvalsh(rows @ rows.T / len(rows))
    p = p[p > 1e-13]
    expected = np.exp(-np.sum(p * np.log(p))) if q == 1 else np.sum(p**q) ** (1 / (1 - q))
    assert vendi(features.float(), q) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_vendi_is_bounded_and_falls_with_the_order(n, d, seed):
    scores = [vendi(normal(n, d, seed=seed), q) for q in (0.0, 1.0, 2.0, math.inf)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(scores))
    assert scores[-1] >= 1 - 1e-9
    assert scores[0] <= min(n, d) + 1e-9


def test_mean_pairwise_similarity_matches_loops():
    rows = normal(7, 5, shift=0.2)
    cosines = [1 - scipy.spatial.distance.cosine(rows[i], rows[j]) for i in range(7) for j in range(i)]
    assert mean_pairwise_similarity(rows) == pytest.approx(np.mean(cosines))
    assert mean_pairwise_similarity(rows[:1].repeat(4, 1)) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("n", [11, 40])
def test_precision_recall_density_coverage_match_loops(k, n):
    generated, reference = normal(n, 3, seed=2, shift=0.7), normal(40, 3, seed=3)
    distances = loop_distances(generated, reference)
    of_reference, of_generated = loop_radius(reference, k), loop_radius(generated, k)
    inside = [[distances[i, j] <= of_reference[j] for j in range(40)] for i in range(n)]
    precision = np.mean([any(row) for row in inside])
    recall = np.mean([any(distances[i, j] <= of_generated[i] for i in range(n)) for j in range(40)])
    density = sum(sum(row) for row in inside) / (k * n)
    coverage = np.mean([any(inside[i][j] for i in range(n)) for j in range(40)])
    assert precision_recall(generated, reference, k) == pytest.approx((precision, recall))
    assert density_coverage(generated, reference, k) == pytest.approx((density, coverage))
    assert 0 < recall < 1  # the case says something


def test_a_set_matches_itself_and_not_a_distant_one():
    points = normal(30, 4)
    assert precision_recall(points, points) == (1, 1)
    assert density_coverage(points, points)[1] == 1
    assert precision_recall(points + 100, points) == (0, 0)
    assert density_coverage(points + 100, points) == (0, 0)


def test_a_set_of_copies_is_precise_but_reaches_one_reference_only():
    reference = normal(30, 4)
    copies = reference[:1].repeat(10, 1)
    assert precision_recall(copies, reference, k=5) == (1, pytest.approx(1 / 30))


def test_results_do_not_depend_on_the_block_size(monkeypatch):
    generated, reference = normal(23, 3, shift=0.5), normal(31, 3, seed=5)
    whole = (*precision_recall(generated, reference), *density_coverage(generated, reference))
    monkeypatch.setattr("shielded.evaluation.metrics._MAX_ROWS_PER_BLOCK", 4)
    assert (*precision_recall(generated, reference), *density_coverage(generated, reference)) == whole


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 5), (8, 9, 12), (3, 40, 6)])
def test_frechet_distance_matches_the_matrix_square_root(n, m, d):
    first, second = normal(n, d, seed=6, shift=0.4), normal(m, d, seed=7) * 1.7
    c1, c2 = np.cov(first.numpy(), rowvar=False), np.cov(second.numpy(), rowvar=False)
    mean = np.sum((first.mean(0) - second.mean(0)).numpy() ** 2)
    root = np.real(scipy.linalg.sqrtm(c1 @ c2 + 1e-14 * np.eye(d)))
    expected = mean + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_closed_forms():
    points = normal(40, 6)
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(points, points + 0.5) == pytest.approx(6 * 0.25)
    # Scaling by s about the mean: (s - 1)² tr C.
    centred = points - points.mean(dim=0)
    trace = centred.var(dim=0).sum().item()
    assert frechet_distance(3 * centred, centred) == pytest.approx(4 * trace)


def test_caption_score_is_the_cosine():
    images, texts = normal(6, 4), normal(6, 4, seed=8)
    expected = [1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(images, texts, strict=True)]
    assert caption_score(images.float(), texts).numpy() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(caption_score(images, texts[:1]), caption_score(images, texts[:1].expand(6, 4)))


def test_nearest_distance_matches_loops_and_is_zero_for_copies():
    generated, reference = normal(9, 4), normal(12, 4, seed=9)
    generated[3] = reference[5]
    found = nearest_distance(generated, reference)
    assert found.numpy() == pytest.approx(loop_distances(generated, reference).min(axis=1))
    assert found[3] == 0


def test_bootstrap_interval_of_a_normal_sample_is_the_textbook_one():
    values = normal(400, seed=10, shift=2)
    low, high = bootstrap_interval(values, generator=torch.Generator().manual_seed(3))
    mean, error = values.mean().item(), values.std().item() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error * 1.96)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error * 1.96)
    wider = bootstrap_interval(values, level=0.99)
    assert wider[0] < low < high < wider[1]


def test_bootstrap_interval_repeats_and_leaves_the_global_generator_alone():
    values = normal(20)
    state = torch.get_rng_state()
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert torch.equal(torch.get_rng_state(), state)
    assert bootstrap_interval(torch.full((5,), 0.25)) == (0.25, 0.25)


def test_rows_of_the_manifold_metrics_match_loops():
    generated, reference = normal(9, 3, seed=2, shift=0.7), normal(14, 3, seed=3)
    distances, radius = loop_distances(generated, reference), loop_radius(reference, 3)
    rows = manifold_rows(generated, reference, 3)
    inside = distances <= np.array(radius)
    assert rows["precision"].tolist() == inside.any(axis=1).astype(float).tolist()
    assert rows["density"].numpy() == pytest.approx(inside.sum(axis=1) / 3)
    assert rows["coverage"].tolist() == inside.any(axis=0).astype(float).tolist()
    reached = np.less_equal(distances.T, loop_radius(generated, 3))
    assert rows["recall"].tolist() == reached.any(axis=1).astype(float).tolist()
    assert 0 < rows["recall"].mean() < 1


def test_inside_shields_matches_loops_and_the_surface_is_outside():
    generated, reference = normal(12, 4, shift=0.5), normal(7, 4, seed=4)
    distances = loop_distances(generated, reference)
    radii = torch.linspace(0.5, 3, 7)
    expected = [any(distances[i, j] < radii[j].item() for j in range(7)) for i in range(12)]
    assert inside_shields(generated, reference, radii).tolist() == expected
    assert 0 < sum(expected) < 12
    assert inside_shields(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 5.0).tolist() == [False]
    assert inside_shields(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), 5.001).tolist() == [True]


def test_jackknife_of_the_mean_is_the_textbook_interval():
    values = normal(40, 1, seed=11, shift=1)
    low, high = jackknife_interval(lambda rows: rows.mean().item(), values, groups=40)
    reach = scipy.stats.norm.ppf(0.975) * values.std().item() / math.sqrt(40)
    assert (low, high) == pytest.approx((values.mean().item() - reach, values.mean().item() + reach))
    assert jackknife_interval(lambda rows: 3.0, values) == (3.0, 3.0)


def test_jackknife_covers_the_vendi_score_of_more_rows_of_the_same_kind():
    """Groups of equal rows have the same Vendi score whatever their number."""
    rows = torch.eye(4).repeat(15, 1)
    low, high = jackknife_interval(vendi, rows, groups=15)
    assert low <= 4 + 1e-9
    assert high >= 4 - 1e-9
    assert high - low < 0.5


def test_compare_gives_every_metric_with_an_interval_around_it():
    generated, reference = normal(30, 5, shift=0.3), normal(40, 5, seed=12)
    generated[2] = reference[7]
    found = compare(generated, reference, k=4)
    assert found["precision"]["value"] == pytest.approx(precision_recall(generated, reference, 4)[0])
    assert found["coverage"]["value"] == pytest.approx(density_coverage(generated, reference, 4)[1])
    assert found["vendi"]["value"] == pytest.approx(vendi(generated))
    assert found["frechet"]["value"] == pytest.approx(frechet_distance(generated, reference))
    assert found["nearest"]["minimum"] == 0
    assert found["nearest"]["value"] == pytest.approx(loop_distances(generated, reference).min(axis=1).mean())
    assert set(found) == {"precision", "recall", "density", "coverage", "nearest", "vendi", "similarity", "frechet"}
    assert all(m["low"] <= m["value"] <= m["high"] for m in found.values())


BAD = [
    (lambda: manifold_rows(normal(5, 3), normal(9, 3)), "generated has 5 rows"),
    (lambda: inside_shields(normal(5, 3), normal(9, 3), torch.ones(4)), "one per row"),
    (lambda: inside_shields(normal(5, 3), normal(9, 3), 0.0), "positive"),
    (lambda: jackknife_interval(vendi, normal(1, 3)), "at least 2"),
    (lambda: jackknife_interval(vendi, normal(9, 3), level=95), "between 0 and 1"),
    (lambda: vendi(torch.zeros(0, 4)), "at least 1"),
    (lambda: vendi(torch.zeros(2, 4)), "row of the features is zero"),
    (lambda: vendi(torch.ones(2, 3, 4, 4)), "flatten"),
    (lambda: vendi(torch.eye(3), q=-1), "q must be"),
    (lambda: vendi(torch.eye(3), q=math.nan), "q must be"),
    (lambda: vendi(torch.tensor([[1.0, math.nan]])), "NaN"),
    (lambda: mean_pairwise_similarity(torch.ones(1, 4)), "at least 2"),
    (lambda: precision_recall(normal(5, 3), normal(9, 3)), "generated has 5 rows"),
    (lambda: density_coverage(normal(9, 3), normal(5, 3)), "reference has 5 rows"),
    (lambda: density_coverage(normal(9, 3), normal(9, 3), k=0), "k must be"),
    (lambda: precision_recall(normal(9, 3), normal(9, 4)), "same encoder"),
    (lambda: frechet_distance(normal(1, 3), normal(9, 3)), "at least 2"),
    (lambda: frechet_distance(normal(3, 3), normal(9, 3) * math.inf), "reference holds NaN"),
    (lambda: caption_score(normal(4, 3), normal(3, 3)), "one text row per image"),
    (lambda: caption_score(normal(4, 3), normal(4, 2)), "do not match"),
    (lambda: nearest_distance(normal(4, 3), torch.zeros(0, 3)), "at least 1"),
    (lambda: bootstrap_interval(normal(4, 3)), r"shape \(n,\)"),
    (lambda: bootstrap_interval(normal(1)), "at least 2"),
    (lambda: bootstrap_interval(normal(4), level=95), "between 0 and 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
