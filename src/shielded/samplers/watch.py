"""Watch what a pipeline does besides stepping its scheduler: other schedulers, and what it returns in the end."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


@contextlib.contextmanager
def no_plain_steps(pipe: Any, allowed: Callable[[Any], bool]) -> Iterator[None]:
    """Raise if `pipe` steps a scheduler that is not corrected: a copy, an exchanged one, one with a restored state.

    The class of every scheduler that is loaded is watched; steps of other pipelines go on as they are.

    Args:
        pipe: the pipeline.
        allowed: tells whether a scheduler is corrected, or need not be.
    """
    plain: dict[type, Any] = {cls: vars(cls)["step"] for cls in _schedulers() if "step" in vars(cls)}

    def watched(step: Any) -> Any:
        @functools.wraps(step)
        def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if live and not allowed(self) and _called_by(pipe):
                raise RuntimeError(
                    f"{type(pipe).__name__} steps another {type(self).__name__} than the one that it had when it was "
                    "attached to, or one whose state it has restored, so this step would go uncorrected; let it step "
                    "`pipe.scheduler` itself, and set that before attaching."
                )
            return step(self, *args, **kwargs)

        return checked

    live = [True]  # emptied at the end: contexts may end in any order, and leave a watch below that of another one
    mine = {cls: watched(step) for cls, step in plain.items()}
    for cls, step in mine.items():
        cls.step = step
    try:
        yield
    finally:
        live.clear()
        for cls, step in mine.items():
            if vars(cls).get("step") is step:
                cls.step = plain[cls]


@contextlib.contextmanager
def watched_call(pipe: Any, begin: Callable[[], None], end: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Announce each call of a pipeline, and the latents that it returns.

    Args:
        pipe: an object that is called to sample.
        begin: called before it.
        end: called after it, with the latents if it was asked for these (`output_type="latent"`), else None.
    """
    cls = type(pipe)
    owner = next((base for base in cls.__mro__ if "__call__" in vars(base)), None)
    if owner is None:
        yield
        return
    plain = vars(owner)["__call__"]

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not pipe or not live:
            return plain(self, *args, **kwargs)
        begin()
        result = plain(self, *args, **kwargs)
        end(_latents_of(plain, result, (self, *args), kwargs))
        return result

    live = [True]
    owner.__call__ = call
    try:
        yield
    finally:
        live.clear()
        if vars(owner).get("__call__") is call:
            owner.__call__ = plain


def _latents_of(call: Any, result: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return the latents of a call's result, if it was asked for latents."""
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.apply_defaults()
        options = {**bound.arguments, **kwargs}  # a wrapper may take all options as **kwargs
        if options.get("output_type", "latent" if isinstance(result, Tensor) else None) != "latent":
            return None
        first = result if isinstance(result, Tensor) else result[0]
    except (TypeError, ValueError, KeyError, IndexError):
        return None
    return first if isinstance(first, Tensor) else None


def _schedulers() -> list[type]:
    """List the classes of diffusers' schedulers that are loaded."""
    module = sys.modules.get("diffusers.schedulers.scheduling_utils")
    found, open_classes = [], [] if module is None else [module.SchedulerMixin]
    while open_classes:
        cls = open_classes.pop()
        found.append(cls)
        open_classes += cls.__subclasses__()
    return list(dict.fromkeys(found))


def _called_by(pipe: Any) -> bool:
    """Tell whether a method of `pipe` is under way in this thread."""
    frame = sys._getframe(2)
    while frame is not None:
        names = frame.f_code.co_varnames
        if names and frame.f_code.co_argcount and frame.f_locals.get(names[0]) is pipe:
            return True
        frame = frame.f_back
    return False
