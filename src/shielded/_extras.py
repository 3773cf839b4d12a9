"""What every room may use: hints about optional dependencies, progress, and the error of a senseless request."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tqdm import tqdm

_LINE_SECONDS = 10.0  # at least, between two lines about the same work


def missing(what: str, extra: str) -> str:
    """Say which extra `what` needs and how to install it from a checkout.

    The package has no published release to install by name, so the hint never names one.

    Args:
        what: subject of the sentence, in the plural, such as `"Parquet and Arrow files"`.
        extra: key of `[project.optional-dependencies]` in pyproject.toml.

    >>> missing("Parquet and Arrow files", "parquet")
    "Parquet and Arrow files need the extra `parquet`: pip install -e '.[parquet]' in a checkout of shielded."
    """
    return f"{what} need the extra `{extra}`: pip install -e '.[{extra}]' in a checkout of shielded."


class RequestError(ValueError):
    """A request that makes no sense with what is there; commands answer it with exit code 2."""


# Progress ---------------------------------------------------------------------------------------------------------


def watched() -> bool:
    """Tell whether standard error is a terminal, where a bar can be drawn again and again."""
    return sys.stderr is not None and sys.stderr.isatty()


def show_progress(
    given: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    desc: str,
    unit: str,
    shown: bool = True,
    **options: Any,
) -> tqdm | Lines:
    """Show progress on standard error: a bar on a terminal, lines elsewhere.

    Args:
        given: what to go through; None: `update` counts.
        total: how much there is; None: the length of `given`, if it has one.
        desc: what is being done.
        unit: what is counted, in the singular.
        shown: False: nothing is shown.
        **options: further arguments of `tqdm`.
    """
    if not shown or watched():
        from tqdm import tqdm

        return tqdm(given, total=total, desc=desc, unit=unit, disable=not shown, **options)
    return Lines(given, total, desc, unit)


class Bar(Protocol):
    """What counts progress: a bar of `tqdm`, or lines."""

    def update(self, n: int = 1) -> Any:
        """Count n more."""
        ...


class Lines:
    """Progress as lines: one every few seconds, and one at the end. The part of `tqdm` that this package uses.

    Args:
        given: what to go through, or None.
        total: how much there is, or None.
        desc: what is being done.
        unit: what is counted, in the singular.
    """

    def __init__(self, given: Iterable[Any] | None, total: int | None, desc: str, unit: str) -> None:
        self._given, self._desc, self._unit = given, desc, unit
        self._total = len(given) if total is None and hasattr(given, "__len__") else total  # pyright: ignore[reportArgumentType]
        self._done = 0
        self._said = -1
        self._start = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self._done += n
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._say()

    def set_description(self, desc: str) -> None:
        """Change what is being done."""
        self._desc = desc

    def close(self) -> None:
        """Say how far it went."""
        if self._said != self._done:
            self._say()

    def __iter__(self) -> Iterator[Any]:
        for one in self._given or ():
            yield one
            self.update()
        self.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self) -> None:
        self._last, self._said = time.monotonic(), self._done
        of = "" if self._total is None else f" of {self._total}"
        unit = self._unit if (self._done if self._total is None else self._total) == 1 else f"{self._unit}s"
        print(f"{self._desc}: {self._done}{of} {unit}, {self._last - self._start:.0f} s", file=sys.stderr, flush=True)
