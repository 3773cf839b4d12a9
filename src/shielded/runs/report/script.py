"""The settings of a run as a Python script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from shielded.models import GUIDANCE_OPTIONS
from shielded.runs.report.rows import Row

_READERS = {"protected": "ProtectedSet", "calibration": "Calibration"}  # setting that is a file -> class that reads it
_AS_THEY_ARE = (*GUIDANCE_OPTIONS, "height", "width", "strength")
_CALL_ARGUMENTS = {"steps": "num_inference_steps", **{name: name for name in _AS_THEY_ARE}}


def script_of(
    report: Mapping, rows: Sequence[Row], settings: Mapping[str, object], made_with: Mapping[str, object]
) -> str:
    """Write a script that generates the images again.

    Args:
        report: content of `report.json`; its `prompt` and `n` are used if there are no rows.
        rows: images whose prompts and seeds the script repeats.
        settings: keyword arguments of `Spell`.
        made_with: model, steps and guidance, named as in certificates.

    Raises:
        TypeError: a setting is not plain data.
    """
    several = isinstance(settings.get("protected"), list)
    names = [name for key, name in _READERS.items() if settings.get(key) is not None]
    if several:
        names.remove("ProtectedSet")
    imports = [f"from shielded import {', '.join(sorted([*names, 'Spell']))}"]
    call = [repr(report.get("prompt") or "a prompt")]
    if report.get("n") is not None:
        call.append(f"num_images_per_prompt={report['n']}")
    setup = ""
    if rows:
        imports.insert(0, "import torch")
        setup = f"prompts = {_prompts([row.prompt for row in rows])}\nseeds = {_seeds([row.seed for row in rows])}\n"
        setup += "generators = [torch.Generator().manual_seed(seed) for seed in seeds]\n"
        call = ["prompts", "generator=generators"]
    call += [f"{name}={made_with[key]!r}" for key, name in _CALL_ARGUMENTS.items() if key in made_with]
    if "negative_prompt" in made_with:
        call.append(f"negative_prompt=[{made_with['negative_prompt']!r}] * {len(rows) or 1}")
    if "model" in made_with:
        imports.append("from shielded.models import load")
        setup = f"pipe = load({made_with['model']!r})\n{setup}"
    if several:
        imports.append("from shielded.protected import open_sets")
    arguments = "\n".join(f"    {name}={_literal(name, value)}," for name, value in settings.items())
    return "\n".join(imports) + (
        f"\n\n{setup}spell = Spell(\n{arguments}\n)\n"
        f"with spell.attach(pipe):\n    images = pipe({', '.join(call)}).images\n"
    )


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
