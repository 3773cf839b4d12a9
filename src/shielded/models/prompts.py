"""What a model reads of a prompt, which its text encoder cuts off at a number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_NO_LIMIT = 100_000  # tokenizers without a limit name a huge number


def cut_prompts(pipe: Any, prompts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Find the prompts that are longer than the model reads.

    Args:
        pipe: a diffusers pipeline. With several text encoders, the one that reads most counts.
        prompts: texts.

    Returns:
        Each long prompt with its number of tokens and the number that is read.
    """
    names = sorted(name for name in getattr(pipe, "components", {}) if name.startswith("tokenizer"))
    tokenizers = [part for part in (getattr(pipe, name) for name in names) if hasattr(part, "model_max_length")]
    if not tokenizers:
        return []
    reader = max(tokenizers, key=lambda part: part.model_max_length)
    if reader.model_max_length > _NO_LIMIT:
        return []
    with without_length_warnings():
        lengths = [len(reader(prompt).input_ids) for prompt in dict.fromkeys(prompts)]
    found = zip(dict.fromkeys(prompts), lengths, strict=True)
    return [(prompt, length, reader.model_max_length) for prompt, length in found if length > reader.model_max_length]


@contextmanager
def without_length_warnings() -> Iterator[None]:
    """Silence what transformers and diffusers print about long prompts, each time that they read one."""
    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(_is_about_other_things)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_about_other_things)


def _is_about_other_things(record: logging.LogRecord) -> bool:
    text = str(record.msg)
    return not ("sequence length is longer than" in text or "part of your input was truncated" in text)
