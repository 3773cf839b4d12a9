"""Samplers of servers: latents of which each process holds a part, and schedulers that step by `step_post`.

Servers that call `scheduler.step` of diffusers with whole latents, or step deep copies of it one after another, need
nothing of this: `Spell.attach` corrects them (docs/servers.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shielded.samplers.rows import select_rows
from shielded.samplers.through import Through

_NEEDED = ("step_post", "step_index", "infer_steps", "sigmas")  # of a scheduler that steps by `step_post`


class Sharded(Through):
    """A Spell for latents of which each process holds a part, as in sequence parallelism; use it as
    `spell.attach(pipe, through=Sharded(spell, gather, take))`.

    Distances are those of whole images, so x0 is gathered at each step; every process computes the same correction and
    keeps its own part. Each needs a Spell of its own with the same references.

    Args:
        spell: the correction of whole latents.
        gather: part of the latents (B, *part) -> whole latents (B, *S). All processes call it at the same time.
        take: whole latents (B, *S) -> the part of this process.
    """

    def __init__(self, spell: Any, gather: Callable[[Tensor], Tensor], take: Callable[[Tensor], Tensor]) -> None:
        super().__init__(spell)
        self.gather, self.take = gather, take
        self.finished: Tensor | None = None  # the part of this process

    def __call__(self, x0: Tensor, *, noise: Tensor | None = None, **options: Any) -> Tensor:
        """Compute the correction for the part of this process; see `Spell`."""
        whole = None if noise is None else self.gather(noise)
        return self.take(self.spell(self.gather(x0), noise=whole, **options))

    def colliding(self, x0: Tensor, **options: Any) -> Tensor | None:
        """Find the images whose guidance is to be released; see `Spell`."""
        return self.spell.colliding(self.gather(x0), **options)

    def finish(self, latents: Tensor) -> Tensor:
        """End a trajectory; see `Spell`."""
        whole = self.gather(latents)
        moved = self.spell.finish(whole)
        self.finished = latents if moved is whole else self.take(moved)
        return self.finished

    def end_call(self, returned: Tensor | None) -> None:
        """End a call of the pipeline, which returned the part of this process; see `Spell`."""
        self.spell.end_call(None if returned is None else self.gather(returned))


@contextmanager
def attach_step_post(scheduler: Any, correct: Any, batched: bool = False) -> Iterator[None]:
    """Correct x0 at every step of a rectified-flow scheduler that keeps its state to itself, as LightX2V's do.

    Such a scheduler holds `latents` and the model's velocity `noise_pred`, with x0 = latents − σ noise_pred, and takes
    its step in `step_post()`. The velocity is changed before that step such that the scheduler derives x0 + correction.
    A scheduler whose `step_post` calls `step` of a scheduler of diffusers is attached to by that one.

    Args:
        scheduler: with `step_post`, `step_index`, `infer_steps` and `sigmas`.
        correct: a Spell, or what `shielded.samplers.attach` takes.
        batched: whether latents have a batch axis; False: they are of one image or video.

    Raises:
        TypeError: the scheduler has none of these, or predicts something else.
        RuntimeError: it never stepped inside the context.
    """
    missing = [name for name in _NEEDED if not hasattr(scheduler, name)]
    inner = getattr(scheduler, "scheduler", None)
    if missing or hasattr(inner, "step"):
        instead = "attach to its `scheduler`" if hasattr(inner, "step") else f"it has no `{missing[0]}`"
        raise TypeError(f"{type(scheduler).__name__} cannot be corrected in step_post; {instead}.")
    plain, before, stepped = scheduler.step_post, vars(scheduler).get("step_post"), False

    def rows(tensor: Tensor) -> Tensor:
        return tensor if batched else tensor[None]

    def step_post(*args: Any, **kwargs: Any) -> Any:
        nonlocal stepped
        if args or kwargs:
            raise TypeError(f"{type(scheduler).__name__}.step_post takes latents of its own, which go uncorrected.")
        stepped = True
        index, last = scheduler.step_index, scheduler.step_index == scheduler.infer_steps - 1
        if index == 0:
            correct.start()
        sigma, velocity = float(scheduler.sigmas[index]), rows(scheduler.noise_pred)
        sample = rows(scheduler.latents).float()
        x0 = sample - sigma * velocity.float()
        noise = x0 + velocity.float()  # of x = (1 − σ) x0 + σ noise
        delta = correct(x0, noise=noise, alpha=1 - sigma, sigma=sigma, last=last)
        moved = (delta != 0).flatten(1).any(1)
        changed = select_rows(moved, (velocity.float() - delta / sigma).to(velocity.dtype), velocity)
        scheduler.noise_pred = changed if batched else changed[0]
        result = plain()
        if last:
            latents = rows(scheduler.latents)
            finished = correct.finish(latents)
            if finished is not None and finished is not latents:
                scheduler.latents = finished if batched else finished[0]
        return result

    scheduler.step_post = step_post
    try:
        yield
    finally:
        if before is None:
            vars(scheduler).pop("step_post", None)
        else:
            scheduler.step_post = before
    if not stepped:
        raise RuntimeError("step_post was never called inside the context, so nothing was corrected.")


def shard(rank: int, world: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Make the `take` of a process that holds an equal part of an axis of the latents.

    Args:
        rank: of the process.
        world: number of processes.
        dim: axis, counted with the batch axis; its length is a multiple of `world`.
    """
    return lambda whole: torch.chunk(whole, world, dim)[rank].contiguous()
