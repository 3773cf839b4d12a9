"""File names of images, by a pattern."""

from __future__ import annotations

import string
from collections.abc import Sequence

from shielded._extras import RequestError

PATTERN = "{prompt}-{seed}"
_FIELDS = ("prompt", "seed", "number")
_MAX_PROMPT_LETTERS = 60
_MAX_NAME_BYTES = 240  # file systems take 255, of which a temporary name needs some


def image_name(prompt: str, seed: int, pattern: str = PATTERN, number: int = 0) -> str:
    """Name the file of an image.

    Args:
        prompt: its words stand for {prompt}.
        seed: stands for {seed}.
        pattern: of the name, without suffix.
        number: of the image in its run, stands for {number}.

    >>> image_name("a red apple, ripe", 3)
    'a-red-apple-ripe-3.png'
    >>> image_name("owl", 3, "bird {number}", 7)
    'bird 0007.png'
    """
    words = "".join(c if c.isalnum() else " " for c in prompt).split()
    short = "-".join(words)[:_MAX_PROMPT_LETTERS] or "image"
    return f"{pattern.format(prompt=short, seed=seed, number=f'{number:04d}')}.png"


def image_names(prompts: Sequence[str], seeds: Sequence[int], pattern: str = PATTERN) -> list[str]:
    """Name the files of all images of a run; prompts that share their words are numbered.

    Args:
        prompts: one per image.
        seeds: one per image.
        pattern: see `image_name`.

    Raises:
        RequestError: the pattern is no file name, has other fields, or names several images alike.
    """
    check_pattern(pattern)
    names = [image_name(prompt, seed, pattern, i) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    longest = max((len(name.encode()) for name in names), default=0)
    if longest > _MAX_NAME_BYTES:
        raise RequestError(f"the pattern {pattern[:20]!r}... makes names of {longest} letters, too long for a file.")
    if len({name.lower() for name in names}) == len(names):
        return names
    if pattern != PATTERN:
        raise RequestError(f"the pattern {pattern!r} gives several images one name; add {{seed}} or {{number}}.")
    distinct = list(dict.fromkeys(prompts))
    return [
        image_name(f"{distinct.index(prompt) + 1} {prompt}", seed) for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def check_pattern(pattern: str) -> None:
    """Refuse a pattern that is no file name, or has unknown fields.

    Raises:
        RequestError: says which fields there are.
    """
    try:
        fields = [field for _, field, *_ in string.Formatter().parse(pattern) if field is not None]
        image_name("owl", 0, pattern)
    except (ValueError, KeyError, IndexError, AttributeError):
        fields = ["?"]
    if any(field not in _FIELDS for field in fields):
        raise RequestError(f"the pattern {pattern!r} is not known; its fields are {{prompt}}, {{seed}} and {{number}}.")
    if any(letter in pattern for letter in '/\\:*?"<>|') or pattern.startswith("."):
        raise RequestError(f"the pattern {pattern!r} is no file name; leave out folders and special characters.")
