"""Measure quality and diversity of a set of images by their features.

Features are (n, d) tensors from any encoder; every row is one image. All computation is in float64. Distances are
Euclidean, and features are normalised only where stated: precision, recall, density, coverage and the Fréchet distance
do not normalise them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shielded.core.inputs import float_tensor

_MAX_ROWS_PER_BLOCK = 1024  # of a distance matrix
_MAX_DRAWN = 1 << 22  # numbers that the bootstrap draws at once
_MIN_EIGENVALUE_SHARE = 1e-12  # of the sum; smaller eigenvalues are rounding noise


def _checked(features: Tensor, name: str, at_least: int = 1) -> Tensor:
    features = float_tensor(features, name)
    if features.ndim != 2:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(features.shape)}: flatten each image to one row.")
    if len(features) < at_least:
        raise ValueError(f"{name} has {len(features)} rows, at least {at_least} are needed: pass more images.")
    if not features.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values: check the images and the encoder's precision.")
    return features.detach().double()


def _checked_pair(generated: Tensor, reference: Tensor, at_least: int = 1) -> tuple[Tensor, Tensor]:
    generated, reference = _checked(generated, "generated", at_least), _checked(reference, "reference", at_least)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"generated has {generated.shape[1]} features per row and reference {reference.shape[1]}: "
            "compute both with the same encoder."
        )
    return generated, reference


def _normalised(features: Tensor) -> Tensor:
    norm = features.norm(dim=1, keepdim=True)
    if (norm == 0).any():
        raise ValueError("a row of the features is zero, so its cosine similarity is undefined: leave it out.")
    return features / norm


def vendi(features: Tensor, q: float = 1.0) -> float:
    """Compute the Vendi score: the effective number of different rows, from 1 (all alike) to n (all orthogonal).

    It is the exponential of the Rényi entropy of order q of the eigenvalues of K/n, with K the cosine similarities.
    Friedman and Dieng 2023, "The Vendi Score" (q = 1); Pasarkar and Dieng 2024, "Cousins of the Vendi Score".

    Args:
        features: (n, d), n ≥ 1.
        q: order, 0 ≤ q ≤ inf. Small orders are sensitive to rare rows, large ones only to the most common.

    Returns:
        The score, from 1 to n.

    Raises:
        ValueError: no rows, not finite, a row of zeros, or q < 0.

    Example:
        >>> round(vendi(torch.eye(4)), 6), round(vendi(torch.ones(4, 2)), 6)
        (4.0, 1.0)
    """
    if not q >= 0:
        raise ValueError(f"q must be at least 0, got {q}.")
    rows = _normalised(_checked(features, "features"))
    n, d = rows.shape
    gram = rows @ rows.T if n <= d else rows.T @ rows  # equal but for eigenvalues of zero
    share = torch.linalg.eigvalsh(gram / n)
    share = share[share > _MIN_EIGENVALUE_SHARE]
    if q == 1:
        entropy = -(share * share.log()).sum()
    elif math.isinf(q):
        entropy = -share.max().log()
    else:
        entropy = torch.logsumexp(q * share.log(), 0) / (1 - q)
    return entropy.exp().item()


def mean_pairwise_similarity(features: Tensor) -> float:
    """Compute the mean cosine similarity of all pairs of different rows: 1 if all are alike; lower is more diverse.

    Args:
        features: (n, d), n ≥ 2.

    Raises:
        ValueError: fewer than two rows, not finite, or a row of zeros.
    """
    rows = _normalised(_checked(features, "features", at_least=2))
    n = len(rows)
    return ((rows.sum(dim=0).square().sum() - n) / (n * (n - 1))).item()


def _distance_blocks(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield distances (rows of points, others), without the matmul trick: copies must be at distance exactly 0."""
    for rows in points.split(_MAX_ROWS_PER_BLOCK):
        yield torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _neighbour_radius(points: Tensor, k: int) -> Tensor:
    """Return the distance (n,) from each row to its k-th nearest other row."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distance_blocks(points, points)])


def _checked_neighbours(generated: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return _checked_pair(generated, reference, at_least=k + 1)


def manifold_rows(generated: Tensor, reference: Tensor, k: int = 5) -> dict[str, Tensor]:
    """Compute the values per image whose means are precision, recall, density and coverage.

    Args:
        generated: (n, d), n > k.
        reference: (m, d), m > k.
        k: which neighbour sets the radius of a ball.

    Returns:
        float64 "precision" and "density", (n,) for each generated row; "recall" and "coverage", (m,) for each
        reference row.

    Raises:
        ValueError: too few rows, different d, not finite, or k < 1.
    """
    generated, reference = _checked_neighbours(generated, reference, k)
    of_reference, of_generated = _neighbour_radius(reference, k), _neighbour_radius(generated, k)
    balls = torch.cat([(block <= of_reference).sum(dim=1) for block in _distance_blocks(generated, reference)])
    reached = torch.cat([(block <= of_generated).any(dim=1) for block in _distance_blocks(reference, generated)])
    covered = nearest_distance(reference, generated) <= of_reference
    return {
        "precision": (balls > 0).double(),
        "recall": reached.double(),
        "density": balls.double() / k,
        "coverage": covered.double(),
    }


def precision_recall(generated: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Compute improved precision and recall: shares of one set inside the k-nearest-neighbour balls of the other.

    Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", Equations 1-2.

    Args:
        generated: (n, d), n > k.
        reference: (m, d), m > k.
        k: which neighbour sets the radius of a ball.

    Returns:
        Precision, the share of generated rows that look like the reference, and recall, the share of reference rows
        that the generated ones reach.

    Raises:
        ValueError: too few rows, different d, not finite, or k < 1.

    Example:
        >>> reference = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
        >>> precision_recall(torch.tensor([[0.4], [0.6]]), reference, k=1)
        (1.0, 0.0)
    """
    rows = manifold_rows(generated, reference, k)
    return rows["precision"].mean().item(), rows["recall"].mean().item()


def density_coverage(generated: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Compute density and coverage: both count generated rows in the k-nearest-neighbour balls of the reference.

    Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models". A point on the surface of a ball
    counts as inside.

    Args:
        generated: (n, d), n > k.
        reference: (m, d), m > k.
        k: which neighbour sets the radius of a ball.

    Returns:
        Density, the mean number of balls around a generated row over k (it may pass 1), and coverage, the share of the
        balls that hold a generated row.

    Raises:
        ValueError: too few rows, different d, not finite, or k < 1.
    """
    rows = manifold_rows(generated, reference, k)
    return rows["density"].mean().item(), rows["coverage"].mean().item()


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """Compute the squared Fréchet distance between Gaussians fitted to the rows, the formula of FID.

    It is ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½).
    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    Equation 6. It is FID only on the features of that paper's Inception network. Biased upwards for small n.

    Args:
        generated: (n, d), n ≥ 2.
        reference: (m, d), m ≥ 2.

    Raises:
        ValueError: too few rows, different d, or not finite.
    """
    generated, reference = _checked_pair(generated, reference, at_least=2)

    def fit(features: Tensor) -> tuple[Tensor, Tensor]:
        mean = features.mean(dim=0)
        return mean, torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r").R

    (mean_1, root_1), (mean_2, root_2) = fit(generated), fit(reference)
    # C = RᵀR, so tr (C₁C₂)^½ is the sum of the singular values of R₁R₂ᵀ: no matrix square root, no complex rounding.
    shared = torch.linalg.svdvals(root_1 @ root_2.T).sum()
    return ((mean_1 - mean_2).square().sum() + root_1.square().sum() + root_2.square().sum() - 2 * shared).item()


def caption_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Compute the cosine similarity of each image to its prompt, the CLIP score without its factor and clipping.

    Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning".

    Args:
        image_features: (n, d).
        text_features: (n, d), or (1, d) for a prompt that all images share.

    Returns:
        (n,) float64 in [-1, 1].

    Raises:
        ValueError: no rows, other shapes, not finite, or a row of zeros.
    """
    images, texts = _checked(image_features, "image_features"), _checked(text_features, "text_features")
    if images.shape[1] != texts.shape[1] or len(texts) not in (1, len(images)):
        raise ValueError(
            f"image_features {tuple(images.shape)} and text_features {tuple(texts.shape)} do not match: "
            "pass one text row per image, or a single one, from the same encoder."
        )
    return (_normalised(images) * _normalised(texts)).sum(dim=1)


def nearest_distance(generated: Tensor, reference: Tensor) -> Tensor:
    """Compute the distance from each generated row to the nearest reference row; 0 for an exact copy.

    Args:
        generated: (n, d).
        reference: (m, d).

    Returns:
        (n,) float64.

    Raises:
        ValueError: no rows, different d, or not finite.

    Example:
        >>> nearest_distance(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        tensor([4.4721, 0.0000], dtype=torch.float64)
    """
    generated, reference = _checked_pair(generated, reference)
    return torch.cat([block.amin(dim=1) for block in _distance_blocks(generated, reference)])


def inside_shields(generated: Tensor, reference: Tensor, radius: float | Tensor) -> Tensor:
    """Find the generated rows that lie inside a shield, the open ball of its radius around a reference row.

    Args:
        generated: (n, d), flattened latents.
        reference: (m, d).
        radius: one number, or (m,) for each reference row.

    Returns:
        (n,) bool; its mean is the share inside shields.

    Raises:
        ValueError: no rows, different d, not finite, or a radius that is not positive or not one per reference.

    Example:
        >>> inside_shields(torch.tensor([[0.5, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), radius=2.0)
        tensor([ True, False])
    """
    generated, reference = _checked_pair(generated, reference)
    radius = torch.as_tensor(radius, dtype=torch.float64, device=reference.device)
    if radius.ndim and radius.shape != (len(reference),):
        raise ValueError(
            f"radius has shape {tuple(radius.shape)}; give one number or one per row, ({len(reference)},)."
        )
    if not (radius > 0).all():
        raise ValueError("a radius must be positive.")
    return torch.cat([(block < radius).any(dim=1) for block in _distance_blocks(generated, reference)])


def bootstrap_interval(
    values: Tensor, level: float = 0.95, generator: torch.Generator | None = None, resamples: int = 2000
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of the mean.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        values: (n,) independent values, one per image, prompt or seed, n ≥ 2.
        level: share of the bootstrap means inside the interval, between 0 and 1.
        generator: CPU generator for the resamples; None: a new one with seed 0, so that a report repeats.
        resamples: number of bootstrap means.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: fewer than two values, not a vector, not finite, or a level outside (0, 1).
    """
    if values.ndim != 1:
        raise ValueError(f"values must have shape (n,), got {tuple(values.shape)}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    values = _checked(values[:, None], "values", at_least=2)[:, 0].cpu()
    generator = generator or torch.Generator().manual_seed(0)
    several = max(1, _MAX_DRAWN // len(values))
    means = torch.cat([
        values[torch.randint(len(values), (min(several, resamples - first), len(values)), generator=generator)].mean(1)
        for first in range(0, resamples, several)
    ])  # fmt: skip
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


def jackknife_interval(
    statistic: Callable[[Tensor], float], rows: Tensor, level: float = 0.95, groups: int = 20
) -> tuple[float, float]:
    """Compute the interval of a statistic of a whole set, such as the Vendi score or the Fréchet distance.

    The grouped jackknife (Efron and Tibshirani 1993, chapter 11) leaves out one group of rows at a time. A bootstrap
    would repeat rows, and these statistics would count that as a lack of diversity.

    Args:
        statistic: function of rows (n, d).
        rows: (n, d), in random order or sorted by prompt; group i holds every `groups`-th row from row i on.
        level: of the normal interval around the statistic, between 0 and 1.
        groups: number of groups, at least 2; at most n are used.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: fewer than two rows or groups, or a level outside (0, 1).
    """
    groups = min(groups, len(rows))
    if groups < 2:
        raise ValueError(f"an interval needs at least 2 rows and groups, got {len(rows)} rows, {groups} groups.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    member = torch.arange(len(rows), device=rows.device) % groups
    values = torch.tensor([statistic(rows[member != group]) for group in range(groups)], dtype=torch.float64)
    error = ((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt().item()
    reach = error * statistics.NormalDist().inv_cdf((1 + level) / 2)
    value = statistic(rows)
    return value - reach, value + reach
