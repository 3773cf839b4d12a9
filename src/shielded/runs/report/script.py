"""The settings of a run as a Python script."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from shielded.models import GUIDANCE_OPTIONS, locate
from shielded.runs.report.rows import Row

_READERS = {"protected": "ProtectedSet", "calibration": "Calibration"}  # setting that is a file -> class that reads it
_AS_THEY_ARE = (*GUIDANCE_OPTIONS, "height", "width", "strength")
_CALL_ARGUMENTS = {"steps": "num_inference_steps", **{name: name for name in _AS_THEY_ARE}}


def script_of(
    report: Mapping, rows: Sequence[Row], settings: Mapping[str, object], made_with: Mapping[str, Any]
) -> str:
    """Write a script that generates the images again.

    Args:
        report: content of `report.json`; its `prompt` and `n` are used if there are no rows.
        rows: images whose prompts and seeds the script repeats.
        settings: keyword arguments of `Spell`.
        made_with: model, steps, guidance and what else a call takes, named as in certificates.

    Raises:
        TypeError: a setting is not plain data.
    """
    several_sets = isinstance(settings.get("protected"), list)
    names = [name for key, name in _READERS.items() if settings.get(key) is not None]
    if several_sets:
        names.remove("ProtectedSet")
    imports = [f"from shielded import {', '.join(sorted([*names, 'Spell']))}"]
    if several_sets:
        imports.append("from shielded.protected import open_sets")
    setup: list[str] = []
    if "model" in made_with:
        more, setup = _pipeline(made_with, rows)
        imports += more
    if rows:
        imports.insert(0, "import torch")
        setup += [
            f"prompts = {_prompts([row.prompt for row in rows])}",
            f"seeds = {_seeds([row.seed for row in rows])}",
            "generators = [torch.Generator().manual_seed(seed) for seed in seeds]",
        ]
    spans = _spans([row.prompt for row in rows]) if settings.get("batch") else []
    loop = len(spans) > 1  # images of one prompt keep apart from each other alone
    part, count = ("[start:end]", "(end - start)") if loop else ("", str(len(rows) or 1))
    call = [repr(report.get("prompt") or "a prompt")]
    if rows:
        call = [f"prompts{part}", f"generator=generators{part}"]
    elif report.get("n") is not None:
        call.append(f"num_images_per_prompt={report['n']}")
    call += [f"{name}={made_with[key]!r}" for key, name in _CALL_ARGUMENTS.items() if key in made_with]
    if "negative_prompt" in made_with:
        call.append(f"negative_prompt=[{made_with['negative_prompt']!r}] * {count}")
    if "image" in made_with:
        call.append(f"image=[picture] * {count}")
    arguments = "\n".join(f"    {name}={_literal(name, value)}," for name, value in settings.items())
    run = f"with spell.attach(pipe):\n    images = pipe({', '.join(call)}).images\n"
    if loop:
        run = (
            f"images = []\nfor start, end in {spans}:\n    with spell.attach(pipe):\n"
            f"        images += pipe({', '.join(call)}).images\n"
        )
    lines = "".join(f"{line}\n" for line in setup)
    return "\n".join(imports) + f"\n\n{lines}spell = Spell(\n{arguments}\n)\n{run}"


def _pipeline(made_with: Mapping[str, Any], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Write the imports and the statements that make the pipeline; files have the names that they had."""
    imports, setup = ["from shielded.models import load"], [f"pipe = load({made_with['model']!r})"]
    scheduler = made_with.get("scheduler")
    if scheduler is not None and scheduler != _own_scheduler(str(made_with["model"])):
        imports.append("from shielded.samplers.named import use_scheduler")
        setup.append(f"use_scheduler(pipe, {scheduler!r})")
    for adapter in made_with.get("lora", ()):
        imports += ["from pathlib import Path", "from shielded.models.lora import add_lora"]
        setup.append(f"add_lora(pipe, Path({adapter['file']!r}), {adapter['scale']!r})")
    if "image" in made_with:
        images = [image for row in rows for image in (row.with_, row.without) if image is not None]
        size = images[0].size if images else None
        imports += ["from PIL import Image, ImageOps", "from diffusers import AutoPipelineForImage2Image"]
        setup.append("pipe = AutoPipelineForImage2Image.from_pipe(pipe)")
        setup.append(f"picture = Image.open({made_with['image']['file']!r}).convert('RGB')")
        if size is not None:
            setup.append(f"picture = ImageOps.fit(picture, {size!r}, Image.Resampling.LANCZOS)")
    return list(dict.fromkeys(imports)), setup


def _own_scheduler(model: str) -> str | None:
    """Read which scheduler a model on this machine comes with; None: it is not here, or not known."""
    try:
        source = locate(model)
        content = json.loads((source / "model_index.json").read_bytes()) if isinstance(source, Path) else {}
    except (OSError, ValueError):
        return None
    return content.get("scheduler", [None, None])[1]


def _spans(prompts: Sequence[str]) -> list[tuple[int, int]]:
    """Find first and last image of each run of one prompt."""
    ends = [0]
    for _, same in groupby(prompts):
        ends.append(ends[-1] + len(list(same)))
    return list(pairwise(ends))


def _prompts(prompts: Sequence[str]) -> str:
    """Write a list of prompts as Python: ['owl'] * 4 + ['cat'] * 4."""
    return " + ".join(f"[{prompt!r}] * {len(list(same))}" for prompt, same in groupby(prompts))


def _seeds(seeds: Sequence[int]) -> str:
    consecutive = range(seeds[0], seeds[0] + len(seeds))
    return repr(consecutive) if list(seeds) == list(consecutive) else repr(list(seeds))


def _literal(name: str, value: object) -> str:
    if name == "protected" and isinstance(value, list):
        return f"open_sets({value!r})"
    if name in _READERS and isinstance(value, str | Path):
        return f"{_READERS[name]}.{'open' if name == 'protected' else 'load'}({str(value)!r})"
    if value is None or isinstance(value, bool | int | float | str | tuple | list):
        return repr(value)
    raise TypeError(
        f"the setting {name} is a {type(value).__name__}, which cannot be written as Python: "
        "give numbers, text or tuples, and for protected the path of the set"
    )
