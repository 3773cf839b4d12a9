"""The emoji images and captions that the embedded model is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shielded.protected.ingest.archives import tar_files
from shielded.protected.ingest.pictures import decode_picture

STYLES = ("noto", "3d", "color", "flat")
# What the text-to-image model learns: what has a picture of its own. Left out are "Symbols", mostly lettering; of
# "People & Body" what takes more than one word, mostly one figure in small variations; and a few series whose members
# differ in a detail.
PICTURES = ("Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places", "Smileys & Emotion")
ONE_WORD = ("People & Body",)
SERIES = ("’", "moon", "mailbox", "globe showing")
# What the first version of the model learned, which figures are compared on.
CORE = ("Animals & Nature", "Food & Drink", "Activities")
CORE_ONE_WORD = ("Objects", "Travel & Places", "Smileys & Emotion")
NOT_CORE = ("moon", "face", "globe", "cloud", "medal", "japan")
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
    for member, content in tar_files(str(tar), (".json", ".webp")):
        key, _, suffix = member.rpartition(".")
        if suffix == "json":
            labels[key] = json.loads(content)
        else:
            images[key] = np.asarray(decode_picture(content))
    keys = sorted(images.keys() & labels.keys())
    return Emoji(
        torch.from_numpy(np.stack([images[key] for key in keys])).permute(0, 3, 1, 2).contiguous(),
        [labels[key]["caption"] for key in keys],
        [labels[key]["style"] for key in keys],
        [labels[key]["group"] for key in keys],
    )


def trained_captions(data: Emoji) -> list[str]:
    """Return the captions that the text-to-image model learns: distinct pictures, drawn in all four styles."""
    return _chosen(data, PICTURES, ONE_WORD, SERIES, words=99)


def core_captions(data: Emoji) -> list[str]:
    """Return those of the trained captions that the first version of the model learned too."""
    return _chosen(data, CORE, CORE_ONE_WORD, NOT_CORE, words=2)


def _chosen(
    data: Emoji, groups: tuple[str, ...], one_word: tuple[str, ...], left_out: tuple[str, ...], words: int
) -> list[str]:
    """Return the captions of `groups` of up to so many words, of `one_word` those of one, and what is kept anyway."""
    styles: dict[str, set[str]] = {}
    group: dict[str, str] = {}
    for caption, style, name in zip(data.captions, data.styles, data.groups, strict=True):
        styles.setdefault(caption, set()).add(style)
        group[caption] = name
    allowed = dict.fromkeys(groups, words) | dict.fromkeys(one_word, 1)
    return sorted(
        caption
        for caption, seen in styles.items()
        if seen == set(STYLES)
        and (
            caption in KEPT
            or (
                caption.count(" ") < allowed.get(group[caption], 0)
                and not any(word in caption.lower() for word in left_out)
            )
        )
    )
