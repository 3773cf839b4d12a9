"""Run a pipeline for prompts and seeds, with or without SPELL, and keep the finished latents with the images."""

from __future__ import annotations

import functools
import inspect
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from shielded._extras import show_progress, watched
from shielded.generation.copies import AwayFromCopies, away_from_copies
from shielded.generation.distributed import Gathered, Share, batch_of_all, for_share, gather_finished
from shielded.generation.generated import Generated
from shielded.generation.noise import CoupledNoise, coupling
from shielded.generation.repair import RESTART_LEVEL, OnLeak, ThroughPictures, check_on_leak, repair
from shielded.latent_space import LatentSpace
from shielded.models.calls import conditioning, images_of, require_options, set_progress, step_option
from shielded.protected import ProtectedSet
from shielded.samplers import attach
from shielded.samplers.diffusers import Correction
from shielded.spell import Spell
from shielded.spell.history import StoredHistory

_PER_ROW = ("negative_prompt", "image")  # options that are given for all images, and that pipelines take for each


class Watch:
    """Correct nothing and keep the finished latents of the plain pipeline."""

    finished: Tensor | None = None

    def __call__(self, x0: Tensor, noise: Tensor | None, alpha: float, sigma: float, last: bool = False) -> Tensor:
        return torch.zeros_like(x0)

    def start(self) -> None:
        pass

    def finish(self, latents: Tensor) -> None:
        self.finished = latents


class _Keeping(Correction, Protocol):
    """A correction that keeps the finished latents."""

    finished: Tensor | None


def generate(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    spell: Spell | None = None,
    steps: int = 25,
    batch_size: int = 16,
    label: str = "images",
    progress: bool = True,
    on_leak: OnLeak = "report",
    attempts: int = 3,
    log: Callable[..., None] | None = None,
    finished: Callable[[Generated], None] | None = None,
    processes: bool = False,
    couple: bool = False,
    one_prompt: bool = False,
    first: int = 0,
    space: LatentSpace | None = None,
    **options: Any,
) -> Generated:
    """Generate one image per prompt and seed.

    Image i depends on prompts[i] and seeds[i] alone and, with batch repellency, on the others of its batch. Restarts
    continue with the image's own generator, so the same seeds give the same images after the same attempts.

    Args:
        pipe: a diffusers pipeline, or an own one with a supported `scheduler` and `__call__`. Its call takes
            `generator` (one per image), `prompt`, `class_labels` or `batch_size`, and returns images, as
            `models.calls.images_of` reads them.
        prompts: one per image; names or numbers of classes for class-conditional models, "" for unconditional ones.
        seeds: one per image; each image has a generator of its own.
        spell: the correction; None generates plainly.
        steps: steps of the sampler, where the call takes `num_inference_steps`, `num_steps` or `steps`.
        batch_size: images per batch. Batch references are the other images of that batch, whatever number of processes
            shares it. Without batch repellency or history, `batch_size` is per process.
        label: text in front of the progress bar.
        progress: whether progress is shown: a bar, or lines where standard error is no terminal.
        on_leak: what to do where the finished latents, or the decoded image encoded again, lie inside a shield of the
            protected set. "report": nothing, and nothing is measured. "restart": sample again from a middle noise
            level with a wider radius, then push, then refuse; "push": push, then refuse; "refuse": refuse. The whole
            schedule counts, whatever window the Spell has. History remembers images as they are after that, and no
            refused ones.
        attempts: limit on how often an image is sampled, with on_leak="restart".
        log: called with an event and its content for each image and attempt, for example `AuditLog(...).append`.
        finished: called with each batch when it is finished, so that a stopped run loses one batch at most.
        processes: split each batch over the processes that `distributed.join` has joined. Each process calls this with
            the same arguments, except for the device of the pipeline and the log, and each gets all images.
        couple: start the images of one prompt from noise whose sum is zero; see `CoupledNoise`. An image then depends
            on the seeds before it. Restarts are not coupled.
        one_prompt: end a batch where the prompt changes, so that batch references are images of one prompt.
        first: images that an earlier call has made, which progress counts.
        space: of the latents, to measure them with `on_leak`; None: that of a set of pixels, or of the pipeline at the
            size of the options.
        **options: passed on to the pipeline, for example guidance_scale. `negative_prompt` and `image` may be one for
            all images.

    Returns:
        The images in the order of the prompts, with their latents and, where `on_leak` measured them, measurements.

    Raises:
        ValueError: not one seed per prompt, on_leak without a ProtectedSet, or with a radius that cannot be kept;
            couple with several processes or with given pictures or latents; a history in a folder with several.
        RequestError: the pipeline does not take an option, a prompt or a class.
        TypeError: couple, and the pipeline does not draw one noise per image; a pipeline that cannot be called.
    """
    prompts, seeds = _listed(prompts, "prompts"), [int(seed) for seed in _listed(seeds, "seeds")]
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed per prompt.")
    check_on_leak(on_leak, attempts, spell)
    require_options(pipe, ["generator", *options])
    conditioning(pipe, prompts)  # refuses them before anything is sampled
    if processes:
        batch_size = batch_of_all(batch_size, spell)
    if on_leak == "report":
        space = None
    elif space is None:
        space = _space_of(pipe, spell, options)
    if processes and spell is not None and isinstance(spell.history, StoredHistory):
        raise ValueError("a history in a folder is written by one process alone; use one without accelerate launch.")
    if couple and (processes or {"image", "latents", "video"} & options.keys()):
        raise ValueError("couple=True is for text-to-image runs in one process, which draw their own noise.")
    noises = {prompt: CoupledNoise(size) for prompt, size in Counter(prompts).items()}
    parts: list[Generated] = []
    spans = list(_batches(prompts, batch_size, one_prompt))
    several, total = len(spans) > 1, first + len(prompts)
    shown = progress and (several or not watched())  # one batch has the bar of its steps
    with show_progress(total=total, desc=label, unit="image", shown=shown) as whole:
        whole.update(first)
        for start, count in spans:
            began = time.perf_counter()
            share = Share.of(count) if processes else Share(count, 0, count)
            texts = [prompts[start + i] for i in share.rows]
            numbers = [seeds[start + i] for i in share.rows]
            number = first + start
            bar: dict[str, Any] = {"desc": f"{label} {number + 1}-{number + count} of {total}"}
            bar |= {"disable": not (progress and watched())}
            bar |= {"position": 1, "leave": False} if several else {}
            set_progress(pipe, **bar)
            generators = [torch.Generator().manual_seed(seed) for seed in numbers]
            told = conditioning(pipe, texts)
            call = {**told, "generator": generators, **step_option(pipe, steps), **options}
            for name in _PER_ROW:
                if isinstance(call.get(name), str | Image.Image):
                    call[name] = [call[name]] * len(texts)
            correct = for_share(spell, share) if processes else spell
            events: list[tuple[str, dict[str, Any]]] = []
            note = functools.partial(
                _note, functools.partial(_keep, events) if processes else log, texts[: share.kept], numbers
            )
            with coupling(pipe, [noises[text] for text in texts]) if couple else nullcontext():
                images, latents = _sample(pipe, away_from_copies(correct, space, note), call)
            made = Generated(images[: share.kept], latents[: share.kept])
            if space is not None and spell is not None:
                again = functools.partial(_restart, pipe, texts, call, bar)
                made = repair(spell, space, made.images, made.latents, again, on_leak, attempts, note)
            if processes:
                made, events = gather_finished(made, correct, share, events)
                for event, content in events:
                    if log is not None:
                        log(event, **content)
            if space is not None and spell is not None and spell.history is not None:
                spell.history.amend(count, made.latents[made.kept])
            made.seconds = time.perf_counter() - began
            parts.append(made)
            whole.update(count)
            if finished is not None:
                finished(made)
    set_progress(pipe, disable=True)
    return Generated.joined(parts)


def _listed(given: Any, name: str) -> list[Any]:
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a list, one per image, not {type(given).__name__}.")
    return list(given)


def _space_of(pipe: Any, spell: Spell | None, options: dict[str, Any]) -> LatentSpace:
    """Read the space of a run off its pipeline, or off the protected set, which knows all about pixels."""
    protected = None if spell is None else spell.protected
    if isinstance(protected, ProtectedSet) and protected.space.pixel_range is not None:
        return protected.space
    return LatentSpace.of(pipe, options.get("height"), options.get("width"))


def _batches(prompts: list[str], batch_size: int, one_prompt: bool) -> Iterator[tuple[int, int]]:
    """Yield first image and size of each batch."""
    sizes = [len(list(group)) for _, group in itertools.groupby(prompts)] if one_prompt else [len(prompts)]
    start = 0
    for size in sizes:
        for first in range(start, start + size, batch_size):
            yield first, min(batch_size, start + size - first)
        start += size


def _sample(pipe: Any, spell: _Keeping | None, call: dict[str, Any]) -> tuple[list[Image.Image], Tensor]:
    """Call the pipeline once; return its images and the latents (B, *S) that it decoded, in float32 on the CPU."""
    watch = Watch() if spell is None else spell
    kept: dict[str, Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.update(tensors)
        return {}

    # Inpainting pastes the known part over what the scheduler returned; the callback comes after that.
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        call = {"callback_on_step_end": keep, **call}
    with spell.attach(pipe) if isinstance(spell, Spell | Gathered | AwayFromCopies) else attach(pipe, watch):
        images = images_of(pipe, pipe(**call))
    latents = kept["latents"] if "latents" in kept else cast(Tensor, watch.finished)
    return images, latents.float().cpu()


def _restart(
    pipe: Any,
    prompts: list[str],
    call: dict[str, Any],
    bar: dict[str, Any],
    spell: ThroughPictures,
    rows: list[int],
    images: list[Image.Image],
) -> tuple[list[Image.Image], Tensor]:
    """Sample these rows of a call again from a middle noise level of their images.

    A pipeline that takes pictures itself, or has no image-to-image relative, starts from pure noise.
    """
    import diffusers

    told = conditioning(pipe, [prompts[i] for i in rows])
    of_rows = ("generator", *(name for name in _PER_ROW if isinstance(call.get(name), list)))
    call = {**call, **{name: [call[name][i] for i in rows] for name in of_rows}, **told}
    relative = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline"), None)
    if relative is None or "image" in call:
        return _sample(pipe, spell, call)
    parts = {**pipe.config, **pipe.components}
    again = relative(**{name: parts[name] for name in inspect.signature(relative).parameters if name in parts})
    set_progress(again, **{**bar, "desc": f"{len(rows)} inside a shield, sampled again"})
    known = inspect.signature(again.__call__).parameters.keys() - {"latents", "timesteps", "sigmas"}
    # With few steps, repeat at least one of them.
    strength = max(RESTART_LEVEL, 1 / call["num_inference_steps"])
    call = {name: value for name, value in call.items() if name in known}
    return _sample(again, spell, {**call, "image": images, "strength": strength})


def _note(
    log: Callable[..., None] | None, prompts: list[str], seeds: list[int], event: str, row: int, **content: Any
) -> None:
    if log is not None and row < len(prompts):  # not for the images that fill up a process's share
        log(event, prompt=prompts[row], seed=seeds[row], **content)


def _keep(events: list[tuple[str, dict[str, Any]]], event: str, **content: Any) -> None:
    events.append((event, content))
