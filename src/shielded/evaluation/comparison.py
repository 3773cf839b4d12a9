"""Compare generated images with reference images: every metric with its interval."""

from __future__ import annotations

from torch import Tensor

from shielded.evaluation.metrics import (
    bootstrap_interval,
    frechet_distance,
    jackknife_interval,
    manifold_rows,
    mean_pairwise_similarity,
    nearest_distance,
    vendi,
)


def compare(generated: Tensor, reference: Tensor, k: int = 5) -> dict[str, dict[str, float]]:
    """Measure quality and diversity of generated images against reference images.

    Intervals are 95 %: the bootstrap for means over images, the grouped jackknife over the generated images for
    metrics of the whole set (Vendi, similarity, Fréchet). The reference counts as fixed.

    Args:
        generated: features (n, d), n > k.
        reference: features (m, d) of the same encoder, m > k.
        k: index of the neighbour that sets the radius of a manifold's balls.

    Returns:
        name -> value, low, high; for "nearest" also the minimum.

    Raises:
        ValueError: too few images, features that do not match, or k < 1.
    """
    rows = {**manifold_rows(generated, reference, k), "nearest": nearest_distance(generated, reference)}
    found = {}
    for name, values in rows.items():
        low, high = bootstrap_interval(values)
        found[name] = {"value": values.mean().item(), "low": low, "high": high}
    found["nearest"]["minimum"] = rows["nearest"].min().item()
    whole = {
        "vendi": vendi,
        "similarity": mean_pairwise_similarity,
        "frechet": lambda part: frechet_distance(part, reference),
    }
    for name, statistic in whole.items():
        low, high = jackknife_interval(statistic, generated, groups=min(20, len(generated) // 2))
        found[name] = {"value": statistic(generated), "low": low, "high": high}
    return found
