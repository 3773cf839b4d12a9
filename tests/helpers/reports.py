"""Rows, traces and reports to draw pages and grids from."""

from PIL import Image, ImageDraw

from shielded import Certificate
from shielded.runs.report import Diversity, Row

RED, BLUE, GREEN = (200, 30, 30), (30, 60, 200), (20, 150, 60)


def picture(color=RED, size=(64, 64)):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((4, 4, size[0] - 4, size[1] - 4), fill=color)
    return image


def make_rows(n, prompt="a red apple", **changes):
    fields = {"without": picture(RED), "with_": picture(BLUE)}
    for name, usual in (("without", 4.5), ("with", 16.25)):
        distance = changes.pop(f"distance_{name}", usual)
        if distance is not None:
            fields[f"certificate_{name}"] = certificate(distance)
    return [Row(prompt, seed, **{**fields, **changes}) for seed in range(n)]


def certificate(distance, radius=16.0, **changes):
    """A certificate of latents at this distance from the nearest protected image, inside below the radius."""
    fields = {
        "image": "with_000.png",
        "sha256": None,
        "nearest_id": "heart_7",
        "nearest_distance": distance,
        "radius": radius,
        "inside": distance < radius,
        "attempts": 1,
        "protected_set": "hearts",
        "protected_version": 5,
    }
    return Certificate(**{**fields, **changes})


def make_trace(steps=5, images=3):
    return [
        {"step": s, "image": i, "noise_level": 1 - s / steps, "active": i, "push": 2.0 * i, "score_ratio": 0.01 * i}
        for s in range(steps)
        for i in range(images)
    ]


def make_report(**changes):
    certificate = {
        "image": "with_000.png",
        "sha256": "0123456789abcdef" * 4,
        "nearest_id": "heart_7",
        "nearest_distance": 16.25,
        "radius": 16.0,
        "inside": False,
        "attempts": 3,
        "protected_set": "hearts",
        "protected_version": 5,
        "decoded_distance": 16.05,
        "repair": "restart",
    }
    report = {
        "prompt": "a red apple",
        "n": 8,
        "radius": 16.0,
        "leaks_without": 6,
        "leaks_with": 0,
        "min_distance_without": 4.53,
        "min_distance_with": 16.27,
        "min_decoded_distance_without": 4.11,
        "min_decoded_distance_with": 16.05,
        "vendi_without": 2.31,
        "vendi_with": 5.87,
        "seconds_without": 12.3,
        "seconds_with": 13.4,
        "restarted": 1,
        "pushed": 2,
        "refused": [],
        "certificates": [certificate],
    }
    return {**report, **changes}


DIVERSITY = Diversity("cat face", [7, 8], [picture(RED)] * 2, [picture(BLUE)] * 2, 1.23, 1.98, 24.0)
SETTINGS = {"protected": "demo/protected", "radius": 16.0, "batch": True, "window": (1.0, 0.0)}
