"""Read claims that anyone may have written: strict JSON of bounded size, and fields of known types and ranges."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

_MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 16  # of objects and lists inside each other
_MAX_INTEGER = 2**63

Check = tuple[Callable[[Any], bool], str]


def strict_json(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object that means the same to every reader.

    Raises:
        ValueError: no JSON object, a key twice, NaN or infinity, a number that no float holds, or text that is too long
            or nested too deeply.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"it is longer than {_MAX_CHARACTERS} characters")
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    _check_depth(content)
    return content


def check_fields(content: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Check each field that is there.

    Raises:
        ValueError: names the first field of another type or range, and says what it has to be.
    """
    for name, (holds, kind) in checks.items():
        if name in content and not holds(content[name]):
            raise ValueError(f"{name} has to be {kind}, not {_shortened(content[name])}")


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < _MAX_INTEGER else "a number with too many digits"
    return text if len(text) <= 60 else f"{text[:60]}…"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {_shortened(twice)} twice")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not a number of JSON")


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if any(isinstance(value, float) and not math.isfinite(value) for value in level):
            raise ValueError("it holds a number that is too large")
        if not level:
            return
    if any(isinstance(value, dict | list) for value in level):
        raise ValueError("it is nested too deeply")


# Kinds of fields ------------------------------------------------------------------------------------------------------


def is_text(value: Any) -> bool:
    """Tell whether a value is text that is not empty."""
    return isinstance(value, str) and bool(value)


def is_file_name(value: Any) -> bool:
    """Tell whether a value is the name of a file, without folders."""
    return is_text(value) and len(value) <= 255 and value not in (".", "..") and not set(value) & set("/\\\0")


def is_digest(value: Any) -> bool:
    """Tell whether a value is a SHA-256 in lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_count(value: Any) -> bool:
    """Tell whether a value is an integer from 0 to 2⁶³ − 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_INTEGER


def is_length(value: Any) -> bool:
    """Tell whether a value is a finite number from 0 on."""
    return is_number(value) and value >= 0


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value is a finite number; integers up to 2⁶³."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _MAX_INTEGER if isinstance(value, int) else math.isfinite(value)


def or_none(check: Check) -> Check:
    """Allow None as well."""
    holds, kind = check
    return (lambda value: value is None or holds(value)), f"{kind} or null"


TEXT: Check = is_text, "text"
FILE_NAME: Check = is_file_name, "a file name without folders"
DIGEST: Check = is_digest, "a SHA-256 in 64 hexadecimal digits"
COUNT: Check = is_count, "an integer from 0 on"
LENGTH: Check = is_length, "a finite number from 0 on"
RADIUS: Check = (lambda value: is_length(value) and value > 0), "a finite number above 0"
ATTEMPTS: Check = (lambda value: is_count(value) and value > 0), "an integer from 1 on"
SIMILARITY: Check = (lambda value: is_number(value) and abs(value) <= 1.01), "a number from -1 to 1"
BOOL: Check = (lambda value: isinstance(value, bool)), "true or false"
OBJECT: Check = (lambda value: isinstance(value, dict)), "an object"
OBJECTS: Check = (
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    "a list of objects",
)
REPAIR: Check = (lambda value: value in ("restart", "push")), '"restart" or "push"'
