"""Many GPUs: the processes of `accelerate launch` share each batch, and come to the images that one process makes.

    from shielded.generation import distributed
    from shielded.generation.sampling import generate
    device = distributed.join()                      # None without `accelerate launch`
    made = generate(pipe, prompts, seeds, spell, processes=device is not None)

Every batch is split by rows. Each process has the same number of them: where a batch runs out, its last image is made
once more and dropped, so no process ever waits for one that has already finished. References that images of a batch
are to each other, and the history, are those of the whole batch: x0 is gathered at each step, every process computes
the correction of all images, in the same way, and keeps that of its own.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from shielded.generation.repair import Finished
from shielded.spell import Spell

# How long a process waits for the others: one may have images to sample again when the others have none. One that has
# ended is not waited for.
_WAIT = timedelta(hours=2)

_joined = 0  # calls of `join` that are not ended


def join(device: str | None = None) -> torch.device | None:
    """Joins the processes that `accelerate launch` or `torchrun` started.

    Args:
        device: "cpu" keeps all of them on processors; None: as accelerate was told.

    Returns:
        The device of this process, or None if it was started alone.

    Raises:
        RuntimeError: there are several processes, but accelerate is not installed, or they were left already.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import PartialState
    except ImportError:
        raise RuntimeError("Several processes need accelerate: pip install 'shielded[accelerate]'.") from None
    device = PartialState(cpu=True if device == "cpu" else None, timeout=_WAIT).device
    if not dist.is_initialized():  # accelerate begins a group only once
        raise RuntimeError("this process has left the others already; join them once, around everything they do.")
    _joined += 1
    return device


def leave() -> None:
    """Ends what `join` began. Who has joined twice, leaves with the second call."""
    global _joined
    _joined = max(0, _joined - 1)
    if dist.is_initialized() and not _joined:
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to the user, joined or not."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0


@dataclass(frozen=True)
class Share:
    """The part of a batch that one process makes.

    Args:
        count: images of the whole batch.
        first: the first that is this process's.
        size: how many each process makes; past the end of the batch they repeat its last one.
    """

    count: int
    first: int
    size: int

    @classmethod
    def of(cls, count: int) -> Share:
        """This process's share of a batch of `count` images; everything, if it is alone."""
        size = -(-count // _processes())
        return cls(count, _index() * size, size)

    @property
    def rows(self) -> list[int]:
        """Which images of the batch this process makes."""
        return [min(self.first + i, self.count - 1) for i in range(self.size)]

    @property
    def own(self) -> int:
        """How many of them are kept: the first ones."""
        return max(0, min(self.size, self.count - self.first))

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, ...) of each process -> (count, ...) of the batch, in its order. All processes call it."""
        if _processes() == 1:
            return tensor
        device = _device()
        mine = tensor.to(device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(_processes())]
        try:
            dist.all_gather(parts, mine)
        except RuntimeError as error:  # of gloo; with NCCL, the launcher ends all of them
            raise RuntimeError(
                "another process has ended, and this one cannot go on without it; its own message says why. "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        return torch.cat(parts)[: self.count].to(tensor.device)

    def take(self, tensor: Tensor) -> Tensor:
        """(count, ...) of the batch -> the rows of this process."""
        return tensor[self.rows]


class Gathered:
    """A Spell whose batch is spread over processes: stands in its place wherever a sampler calls it.

    The sampler must take the same number of steps in every process, so none with an adaptive step size.

    Args:
        spell: the same in every process. Its `trace` and `history` are of the whole batch in each of them.
        share: this process's part of the batch that is about to be sampled.
    """

    def __init__(self, spell: Spell, share: Share) -> None:
        self.spell = spell
        self.share = share
        self.finished: Tensor | None = None

    def __call__(
        self,
        x0: Tensor,
        noise: Tensor | None = None,
        alpha: float | None = None,
        sigma: float | None = None,
        last: bool = False,
    ) -> Tensor:
        """The correction λΔ for the rows of this process; see `Spell`."""
        everyone = self.share.gather(x0)
        noise = None if noise is None else self.share.gather(noise)
        return self.share.take(self.spell(everyone, noise=noise, alpha=alpha, sigma=sigma, last=last))

    def start(self) -> None:
        """A new trajectory begins."""
        self.spell.start()

    def finish(self, latents: Tensor) -> Tensor:
        """A trajectory ended with these latents (size, *S) in this process; see `Spell`."""
        everyone = self.share.gather(latents)
        moved = self.spell.finish(everyone)
        self.finished = latents if moved is everyone else self.share.take(moved)
        return self.finished

    @contextmanager
    def attach(self, pipe: Any) -> Iterator[Gathered]:
        """Like `Spell.attach`."""
        with self.spell.attach(pipe, through=self):
            yield self


def batch_of_all(batch_size: int, spell: Spell | None) -> int:
    """Images of one batch over all processes: where images do not see each other, `batch_size` in each."""
    return batch_size if _together(spell) else batch_size * _processes()


def for_share(spell: Spell | None, share: Share) -> Spell | Gathered | None:
    """What corrects this process's part: where images do not see each other, the Spell as it is."""
    return Gathered(spell, share) if _together(spell) and _processes() > 1 else spell


def gather_finished(
    made: Finished, spell: Spell | Gathered | None, share: Share, events: list[tuple[str, dict[str, Any]]]
) -> tuple[Finished, list[tuple[str, dict[str, Any]]]]:
    """The whole batch, in every process, from what each has made of it; the trace of the Spell becomes that of all.

    Args:
        made: the images of this process, without repeated ones.
        spell: what corrected them, from `for_share`.
        share: this process's part.
        events: what this process has to log, in JSON types.

    Returns:
        The images of all, and what all have to log.
    """
    alone = isinstance(spell, Spell)
    trace = [row for row in spell.trace if row["image"] < share.own] if alone else []
    told = {"attempts": made.attempts, "repair": made.repair, "refused": made.refused, "events": events, "trace": trace}
    tensors = {"told": _bytes(json.dumps(told).encode()), "latents": made.latents}
    tensors |= {} if made.decoded is None else {"decoded": made.decoded}
    tensors |= {f"image {i}": _bytes(_png(image)) for i, image in enumerate(made.images)}
    parts = [load(part) for part in gather_bytes(save(tensors))]
    notes = [json.loads(part["told"].numpy().tobytes()) for part in parts]
    images = [
        Image.open(io.BytesIO(part[f"image {i}"].numpy().tobytes())).copy()
        for part in parts
        for i in range(len(part["latents"]))
    ]
    decoded = None if made.decoded is None else torch.cat([part["decoded"] for part in parts])
    whole = Finished(images, torch.cat([part["latents"] for part in parts]), decoded)
    for name in ("attempts", "repair", "refused"):
        setattr(whole, name, [value for note in notes for value in note[name]])
    if alone:
        rows = [
            {**row, "image": row["image"] + i * share.size} for i, note in enumerate(notes) for row in note["trace"]
        ]
        spell.trace = sorted(rows, key=lambda row: (row["run"], row["step"], row["image"]))
    return whole, [(event, content) for note in notes for event, content in note["events"]]


def gather_bytes(data: bytes) -> list[bytes]:
    """What each process has, of any length, in their order. All processes call it."""
    everyone = Share(_processes(), _index(), 1)
    sizes = everyone.gather(torch.tensor([len(data)])).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8)
    padded[0, : len(data)] = _bytes(data)
    return [row[:size].numpy().tobytes() for row, size in zip(everyone.gather(padded), sizes, strict=True)]


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _together(spell: Spell | None) -> bool:
    """Whether an image depends on others of its batch or of earlier ones."""
    return spell is not None and (spell.batch or spell.history is not None)


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _device() -> torch.device:
    """Where tensors must be for the processes to exchange them."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
