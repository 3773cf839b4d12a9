"""Load the reference of an experiment: real images of the prompts, or plain images of other seeds."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from shielded.evaluation.reproduce.measures import NEIGHBOURS
from shielded.evaluation.reproduce.study import REFERENCE_SEED, Cell, Setting, Study
from shielded.files import replacing
from shielded.latent_space import LatentSpace
from shielded.models import DEFAULT_MODEL, preset_of
from shielded.protected.ingest.archives import tar_files
from shielded.protected.ingest.pictures import IMAGE_SUFFIXES, decode_picture

_PLAIN_SEEDS = 2  # seeds of plain images per prompt where no real ones are given


def real_images(path: Path) -> dict[str, list[Image.Image]]:
    """Load images by caption, from a webdataset tar (`caption` in each json) or a folder with a subfolder per caption.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it holds no images with captions, or is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a tar or a folder of reference images with --reference.")
    found: dict[str, list[Image.Image]] = {}
    if path.is_dir():
        for file in sorted(path.glob("*/*")):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(file.parent.name, []).append(decode_picture(file.read_bytes()))
    else:
        captions, pictures = {}, {}
        for member, content in tar_files(str(path), (".json", *IMAGE_SUFFIXES)):
            name, suffix = os.path.splitext(member)
            if suffix.lower() == ".json":
                captions[name] = json.loads(content).get("caption")
            else:
                pictures[name] = content
        for name in sorted(pictures):
            if captions.get(name):
                found.setdefault(captions[name], []).append(decode_picture(pictures[name]))
    if not found:
        raise ValueError(f"{path} holds no images with captions; give a webdataset tar or a folder per prompt.")
    return found


def emoji_prompts(count: int, reference: Path | None = None) -> list[str]:
    """Choose captions of the embedded model, as `prompts_of` does."""
    return prompts_of(DEFAULT_MODEL, count, reference)


def prompts_of(model: str, count: int, reference: Path | None = None) -> list[str]:
    """Choose captions that a model was trained on, in a fixed, mixed order.

    Args:
        model: with a preset that has captions.
        count: number of captions.
        reference: see `real_images`; only captions with enough images in it are chosen.

    Raises:
        ValueError: there are fewer than `count`.
    """
    captions = preset_of(model).read_captions()
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    known = [captions[i] for i in order]
    if reference is not None:
        images = real_images(reference)
        known = [caption for caption in known if len(images.get(caption, [])) > NEIGHBOURS]
    if count > len(known):
        raise ValueError(f"there are {len(known)} captions to choose from, {count} prompts were asked for.")
    return known[:count]


class ReferenceImages:
    """Reference images of the prompts, as features and, for shielding, as latents.

    Args:
        study: gives the prompts, the model and the features.
        path: see `real_images`; None: plain images of the same prompts at other seeds, cached as cells.

    Raises:
        ValueError: a prompt has too few images.
    """

    def __init__(self, study: Study, path: Path | None = None) -> None:
        self.study = study
        self.path = path
        self.images = {} if path is None else real_images(path)
        if path is not None:
            short = [prompt for prompt in study.prompts if len(self.images.get(prompt, [])) <= NEIGHBOURS]
            if short:
                raise ValueError(
                    f"{len(short)} prompts have fewer than {NEIGHBOURS + 1} images in {path}, {short[0]!r} for "
                    "example; leave them out, or compare without --reference."
                )

    def describe(self) -> str:
        """Say what the reference is, for the report."""
        if self.path is None:
            return f"plain images of the same prompts at {_PLAIN_SEEDS} other seeds, made by the model itself"
        return (
            f"real images of the same prompts ({self.path.name}); the model was trained on them or on images like them"
        )

    def features(self) -> dict[str, Tensor]:
        """Compute features (m, d) for each prompt."""
        if self.path is None:
            return {prompt: torch.cat([c["features"] for c in self._plain(prompt)]) for prompt in self.study.prompts}
        return {prompt: self.study.features.image_features(self.images[prompt]) for prompt in self.study.prompts}

    def latents(self) -> Tensor:
        """Return the latents of all reference images, (K, D) or (K, *S); those of real images are cached on disk."""
        if self.path is None:
            return torch.cat([c["latents"] for prompt in self.study.prompts for c in self._plain(prompt)])
        images = [image for prompt in self.study.prompts for image in self.images[prompt]]
        space = LatentSpace.of(self.study.pipe)
        digest = hashlib.sha256(space.fingerprint.encode())
        for image in images:
            digest.update(image.tobytes())
        file = self.study.out / "cells" / f"protected-{digest.hexdigest()[:16]}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as draft:
                save_file({"latents": space.encode(images).float().cpu().contiguous()}, draft)
        return load_file(file)["latents"]

    def _plain(self, prompt: str) -> list[Cell]:
        return [self.study.cell(Setting("reference"), prompt, REFERENCE_SEED + i) for i in range(_PLAIN_SEEDS)]
