"""shielded evaluate"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from shielded.cli.options import AsJson, Debug, Device, Features, UsageError, errors, show, show_skipped
from shielded.models import DEFAULT_MODEL

_HEADINGS = {
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "vendi": "Vendi score of the generated images",
    "similarity": "mean similarity of their pairs",
    "frechet": "Fréchet distance",
    "nearest": "distance to the nearest reference",
}


def evaluate(
    generated: Annotated[str, typer.Argument(help="Folder or glob of generated images.")],
    reference: Annotated[str, typer.Argument(help="Folder or glob of reference images.")],
    features: Features = DEFAULT_MODEL,
    source: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder or hub name of the clip or dinov2 model.")
    ] = None,
    k: Annotated[
        int, typer.Option("-k", metavar="K", min=1, help="Neighbours of precision, recall, density and coverage.")
    ] = 5,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare generated images with reference images: precision, recall, density, coverage, Vendi, Fréchet, distance.

    Example: shielded evaluate images/ photos/ --features clip
    """
    with errors(debug):
        from shielded.evaluation.comparison import compare
        from shielded.evaluation.extractors import features as extractor

        sets = [_images(path) for path in (generated, reference)]
        fewest = min(map(len, sets))
        if fewest <= k:
            raise UsageError(f"{fewest} images are too few for {k} neighbours of each; give more, or a smaller -k.")
        encode = extractor(features, source, device or "cpu").image_features
        found = compare(encode(sets[0]), encode(sets[1]), k)
        result = {"generated": len(sets[0]), "reference": len(sets[1]), "features": features, "k": k, "metrics": found}
        show(result, as_json, _summary(result))


def _images(path: str) -> list[Any]:
    from shielded.protected import load_images

    passed: Counter[str] = Counter()
    loaded, skipped = load_images(path, strict=False, not_looked_at=passed)
    show_skipped(skipped, passed)
    if not loaded:
        raise ValueError(f"none of the images in {path} could be read.")
    return [image for _, image, *_ in loaded]


def _summary(result: dict[str, Any]) -> str:
    width = max(map(len, _HEADINGS.values()))
    lines = [
        f"{result['generated']} generated and {result['reference']} reference images; features {result['features']}, "
        f"k = {result['k']}; 95 % intervals."
    ]
    for name, heading in _HEADINGS.items():
        m = result["metrics"][name]
        more = f", least {m['minimum']:.4f}" if "minimum" in m else ""
        lines.append(f"{heading:<{width}}  {m['value']:8.4f}  [{m['low']:.4f}, {m['high']:.4f}]{more}")
    return "\n".join(lines)
