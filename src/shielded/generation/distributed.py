"""Many GPUs: the processes of `accelerate launch` share each batch and make the images that one process makes.

    from shielded.generation import distributed, generate
    device = distributed.join()                      # None without `accelerate launch`
    made = generate(pipe, prompts, seeds, spell, processes=device is not None)

Every batch is split by rows. Each process has the same number of rows: where a batch runs out, its last image is
sampled once more and dropped, so no process waits for one that has already finished. Batch references and the history
are those of the whole batch: x0 is gathered at each step, every process computes the correction of all images in the
same way and keeps its own rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shielded._extras import missing
from shielded.generation.generated import Generated
from shielded.generation.packing import as_tensor, pack, unpack
from shielded.samplers.through import Through
from shielded.spell import Spell

# How long a process waits for the others, since one may have images to sample again when the others have none. A
# process that has ended is noticed at once.
_WAIT = timedelta(hours=2)

_joined = 0  # calls of `join` without their `leave`


def join(device: str | None = None) -> torch.device | None:
    """Join the processes that `accelerate launch` or `torchrun` started.

    Args:
        device: "cpu" keeps all of them on processors; None: the device that accelerate assigns.

    Returns:
        The device of this process, or None without a launcher.

    Raises:
        RuntimeError: there are several processes, but accelerate is not installed, or they were left already.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import PartialState
    except ImportError:
        raise RuntimeError(missing("Several processes", "accelerate")) from None
    # accelerate's annotation leaves out None, its default
    joined = PartialState(cpu=True if device == "cpu" else None, timeout=_WAIT).device  # pyright: ignore[reportArgumentType]
    if not dist.is_initialized():  # accelerate begins a group only once
        raise RuntimeError("this process has left the others already; join them once, around everything they do.")
    _joined += 1
    return joined


def leave() -> None:
    """End what `join` began. Calls nest; the last `leave` destroys the group."""
    global _joined
    _joined = max(0, _joined - 1)
    if dist.is_initialized() and not _joined:
        dist.destroy_process_group()


def is_main() -> bool:
    """Tell whether this process is the one that writes files and talks to the user, joined or not."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


@dataclass(frozen=True)
class Share:
    """The part of a batch that one process makes.

    Args:
        count: images of the whole batch.
        first: batch row of this process's first image.
        size: images per process; past the end of the batch they repeat its last one.
    """

    count: int
    first: int
    size: int

    @classmethod
    def of(cls, count: int) -> Share:
        """Compute this process's share of a batch of `count` images; a single process has all of them."""
        size = -(-count // _processes())
        return cls(count, _rank() * size, size)

    @property
    def rows(self) -> list[int]:
        """Batch rows that this process samples."""
        return [min(self.first + i, self.count - 1) for i in range(self.size)]

    @property
    def kept(self) -> int:
        """Number of these rows that are kept: the first ones."""
        return max(0, min(self.size, self.count - self.first))

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather (size, ...) of each process into (count, ...) of the batch, in its order. All processes call it."""
        if _processes() == 1:
            return tensor
        device = _device()
        mine = tensor.to(device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(_processes())]
        try:
            dist.all_gather(parts, mine)
        except RuntimeError as error:  # from gloo; with NCCL, the launcher ends all processes
            raise RuntimeError(
                "another process has ended, and this one cannot go on without it; its own message says why. "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        return torch.cat(parts)[: self.count].to(tensor.device)

    def take(self, tensor: Tensor) -> Tensor:
        """Select the rows of this process from (count, ...) of the batch."""
        return tensor[self.rows]


class Gathered(Through):
    """A Spell whose batch is spread over processes; samplers call it instead of the Spell.

    The sampler must take the same number of steps in every process, which excludes adaptive step sizes.

    Args:
        spell: the same in every process. Its `trace` and `history` cover the whole batch in each of them.
        share: this process's part of the batch that is about to be sampled.
    """

    def __init__(self, spell: Spell, share: Share) -> None:
        super().__init__(spell)
        self.share = share
        self.finished: Tensor | None = None

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        alpha: float | None = None,
        sigma: float | None = None,
        last: bool = False,
        released: Tensor | None = None,
    ) -> Tensor:
        """Compute the correction λΔ for the rows of this process; see `Spell`."""
        everyone = self.share.gather(x0)
        noise = None if noise is None else self.share.gather(noise)
        if released is not None:
            released = self.share.gather(released.to(torch.uint8)) > 0
        return self.share.take(
            self.spell(everyone, noise=noise, alpha=alpha, sigma=sigma, last=last, released=released)
        )

    def colliding(self, x0: Tensor, *, alpha: float, sigma: float, last: bool = False) -> Tensor | None:
        """Find the rows of this process whose guidance is to be released; None if no process has any. See `Spell`."""
        rows = self.spell.colliding(self.share.gather(x0), alpha=alpha, sigma=sigma, last=last)
        return None if rows is None else self.share.take(rows)

    def restrict(self, mask: Tensor) -> None:
        """Restrict distance and push to a part of the latents; see `Spell`. Every process finds the same one."""
        self.spell.restrict(mask)

    def end_call(self, returned: Tensor | None) -> None:
        """End a call of the pipeline, which returned the latents (size, *S) of this process; see `Spell`."""
        self.spell.end_call(None if returned is None else self.share.gather(returned))

    def finish(self, latents: Tensor) -> Tensor:
        """End a trajectory with the latents (size, *S) of this process; see `Spell`."""
        everyone = self.share.gather(latents)
        moved = self.spell.finish(everyone)
        self.finished = latents if moved is everyone else self.share.take(moved)
        return self.finished

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Gathered]:
        """Correct every step of a pipeline, like `Spell.attach`."""
        with self.spell.attach(pipe, through=self):
            yield self


def batch_of_all(batch_size: int, spell: Spell | None) -> int:
    """Count the images of a batch over all processes; without coupled rows, `batch_size` is per process."""
    return batch_size if _coupled(spell) else batch_size * _processes()


def for_share(spell: Spell | None, share: Share) -> Spell | Gathered | None:
    """Choose the correction of this process's part: without batch repellency or history, the Spell itself."""
    return Gathered(spell, share) if spell is not None and _coupled(spell) and _processes() > 1 else spell


def gather_finished(
    made: Generated, spell: Spell | Gathered | None, share: Share, events: list[tuple[str, dict[str, Any]]]
) -> tuple[Generated, list[tuple[str, dict[str, Any]]]]:
    """Assemble the whole batch in every process; the trace of an uncoupled Spell becomes that of the whole batch.

    Args:
        made: the images of this process, without repeated ones.
        spell: their correction, from `for_share`.
        share: this process's part.
        events: log entries of this process, in JSON types.

    Returns:
        The images and the log entries of all processes.
    """
    uncoupled = spell if isinstance(spell, Spell) else None
    trace = [row for row in uncoupled.trace if row["image"] < share.kept] if uncoupled is not None else []
    parts = [unpack(part) for part in gather_bytes(pack(made, events=events, trace=trace))]
    if uncoupled is not None:
        rows = [
            {**row, "image": row["image"] + i * share.size}
            for i, (_, content) in enumerate(parts)
            for row in content["trace"]
        ]
        uncoupled.trace = sorted(rows, key=lambda row: (row["run"], row["step"], row["image"]))
    logged = [(event, content) for _, message in parts for event, content in message["events"]]
    return Generated.joined([part for part, _ in parts]), logged


def gather_bytes(data: bytes) -> list[bytes]:
    """Gather bytes of any length from each process, in their order. All processes call it."""
    everyone = Share(_processes(), _rank(), 1)
    sizes = everyone.gather(torch.tensor([len(data)])).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8)
    padded[0, : len(data)] = as_tensor(data)
    return [row[:size].numpy().tobytes() for row, size in zip(everyone.gather(padded), sizes, strict=True)]


def _coupled(spell: Spell | None) -> bool:
    """Tell whether an image depends on others of its batch or of earlier ones."""
    return spell is not None and (spell.batch or spell.history is not None)


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _device() -> torch.device:
    """Device on which the processes exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
