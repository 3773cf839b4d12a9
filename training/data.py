"""The emoji images and captions that the embedded model is trained on."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

STYLES = ("noto", "3d", "color", "flat")
# What the text-to-image model learns. Left out: "People & Body", mostly one figure in small variations, and "Symbols",
# mostly lettering. Of the larger groups only what one word names, elsewhere at most two: a model of this size then
# learns each picture well.
GROUPS = ("Animals & Nature", "Food & Drink", "Activities")
ONE_WORD_GROUPS = ("Objects", "Travel & Places", "Smileys & Emotion")
LEFT_OUT = ("moon", "face", "globe", "cloud", "medal", "japan")
KEPT = ("red heart", "blue heart", "broken heart", "heart with arrow", "cat face", "dog face", "pig face", "tiger face",
        "clown face", "grinning face", "face with tears of joy", "smiling face with sunglasses", "sun with face",
        "crescent moon", "alarm clock", "fire engine", "police car", "light bulb", "top hat", "mount fuji")  # fmt: skip


@dataclass
class Emoji:
    images: Tensor  # (N, 3, 128, 128) uint8
    captions: list[str]
    styles: list[str]
    groups: list[str]

    def select(self, captions: set[str]) -> Emoji:
        keep = [i for i, caption in enumerate(self.captions) if caption in captions]
        return Emoji(
            self.images[keep],
            [self.captions[i] for i in keep],
            [self.styles[i] for i in keep],
            [self.groups[i] for i in keep],
        )


def load(tar: str | Path) -> Emoji:
    """Read the webdataset tar: `NNNNN.webp` and `NNNNN.json` with caption, group and style."""
    images: dict[str, np.ndarray] = {}
    labels: dict[str, dict[str, str]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, suffix = member.name.rpartition(".")
            data = archive.extractfile(member)
            if data is None:
                continue
            if suffix == "json":
                labels[key] = json.load(data)
            elif suffix == "webp":
                images[key] = np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB"))
    keys = sorted(images.keys() & labels.keys())
    return Emoji(
        torch.from_numpy(np.stack([images[key] for key in keys])).permute(0, 3, 1, 2).contiguous(),
        [labels[key]["caption"] for key in keys],
        [labels[key]["style"] for key in keys],
        [labels[key]["group"] for key in keys],
    )


def trained_captions(data: Emoji) -> list[str]:
    """The captions that the text-to-image model learns: distinct pictures, drawn in all four styles."""
    styles: dict[str, set[str]] = {}
    group: dict[str, str] = {}
    for caption, style, name in zip(data.captions, data.styles, data.groups, strict=True):
        styles.setdefault(caption, set()).add(style)
        group[caption] = name
    return sorted(
        caption for caption, seen in styles.items() if seen == set(STYLES) and learned(caption, group[caption])
    )


def learned(caption: str, group: str) -> bool:
    if caption in KEPT:
        return True
    if any(word in caption.lower() for word in LEFT_OUT):
        return False
    words = caption.count(" ") + 1
    return (group in GROUPS and words <= 2) or (group in ONE_WORD_GROUPS and words == 1)
