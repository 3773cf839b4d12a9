"""Encode images into a protected set on a cluster, like `shielded.protected.add_images`."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shielded._extras import Bar, show_progress
from shielded.latent_space import LatentSpace
from shielded.protected.ingest import sources
from shielded.protected.ingest.encoding import (
    AddedImages,
    EncodedImage,
    KnownImages,
    Saver,
    encode_pixels,
    frame_digest,
    frame_name,
    pixels_of,
)
from shielded.protected.ingest.pictures import NoPictureError, Passed, Picture, count_frames
from shielded.protected.ingest.sources import Paths
from shielded.protected.protected_set import ProtectedSet
from shielded.protected.ray.connection import CHECK_SECONDS, Head, connect

_HARMLESS, _NOT_KNOWN = "harmless", "not known"  # kinds of files that are not looked at
_FILES_PER_TASK = 64  # image files that a worker reads in one task


def add_images_on_cluster(
    protected: ProtectedSet,
    paths: Paths,
    address: str,
    model: str,
    radius: float | None = None,
    strict: bool = False,
    batch_size: int = 32,
    mirror: bool = False,
    progress: bool = True,
    columns: Sequence[str] = (),
) -> AddedImages:
    """Encode images into a protected set like `add_images`, read and encoded by the workers of a cluster.

    Ids, order and contents are those of `add_images`; the rounding of an encoder can depend on which images are in one
    batch.

    Args:
        protected: the set to add to. This process writes it.
        paths: as in `add_images`.
        address: of the cluster; see `connect`.
        model: name or folder for `shielded.models.load`; each worker loads it. A cluster with GPUs gets one worker for
            each of them, another one a worker for each processor but one, which reads.
        radius: as in `add_images`.
        strict: as in `add_images`.
        batch_size: images per call of the encoder, at most.
        mirror: as in `add_images`.
        progress: as in `add_images`.
        columns: as in `add_images`.

    Returns:
        As `add_images`.

    Raises:
        RuntimeError: no cluster, its head was lost, or a worker failed. Images encoded by then are saved, and the same
            call goes on from there.
        FileNotFoundError: a path does not exist, or there is no image in it. Other errors are those of `add_images`.
    """
    sources.require_images(paths, columns)
    if protected.descriptor is not None:
        raise ValueError("A cluster does not describe images yet, and this set has a descriptor; add them without ray.")
    connect(address)
    result = AddedImages()
    total = sources.count_pictures(paths) if progress else None
    encoded = encoded_rows(protected, paths, model, batch_size, mirror, columns)
    with (
        show_progress(total=total, desc="protect", unit="image", shown=progress) as bar,
        Saver(protected, radius, result) as saver,
    ):
        for image, latent in _missing_images(protected, encoded, mirror, strict, result, bar):
            saver.append([image], latent[None])
    return result


def _missing_images(
    protected: ProtectedSet,
    encoded: Iterable[dict[str, Any]],
    mirror: bool,
    strict: bool,
    result: AddedImages,
    bar: Bar,
) -> Iterator[tuple[EncodedImage, Tensor]]:
    """Yield columns and latents of each image that is not in the set yet and could be encoded, in order."""
    known = KnownImages(protected, mirror)
    for row in encoded:
        if row["passed"]:
            result.skip(row["source"], NoPictureError(Passed(row["error"], row["passed"] == _HARMLESS)), strict)
            continue
        bar.update(not row["frame"])
        if row["error"]:
            result.skip(row["source"], ValueError(row["error"]), strict)
            continue
        missing = known.missing(row["sha256"])
        result.found += 1
        result.present += not missing
        for number, mirrored in enumerate(missing):
            name = known.add(row["sha256"], row["name"], mirrored)
            data = np.frombuffer(row["mirrored" if mirrored else "latents"], np.float32)
            latent = torch.from_numpy(data.copy()).view(protected.space.shape)
            yield EncodedImage(name, row["source"], row["sha256"].hex(), number == 0), latent


def encoded_rows(
    protected: ProtectedSet, paths: Paths, model: str, batch_size: int, mirror: bool, columns: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Read and encode images on the cluster that this process has joined; those that are in the set are only read.

    Args:
        protected: the set.
        paths: as in `add_images`.
        model: as in `add_images_on_cluster`.
        batch_size: as in `add_images_on_cluster`.
        mirror: encode each image mirrored left to right too.
        columns: as in `add_images`.

    Yields:
        For each image, in order: name, source, sha256, latents and mirrored (bytes of float32), error, frame (empty for
        the first of a file), passed (not empty for a file that is not looked at; then `error` says what it is).
    """
    import ray
    import ray.data

    known = ray.put(_sorted_digests(KnownImages(protected, mirror).complete()))
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = gpus or max(1, int(resources.get("CPU", 1)) - 1)
    data = ray.data.from_items(list(_tasks(paths)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)  # few images, no mistake
    data.context.enable_progress_bars = False
    data.context.execution_options.preserve_order = True
    # Half a processor: a reader waits most of the time, and Ray would make one operator of two with equal needs.
    reader: Any = _read  # Ray's types know functions of one argument alone
    read = data.map_batches(
        reader, batch_size=1, batch_format="pyarrow", num_cpus=0.5, fn_kwargs={"known": known, "columns": list(columns)}
    )
    encoded = read.map_batches(
        EncodingActor,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if gpus else 0,
        fn_constructor_kwargs={"model": model, "fingerprint": protected.space.fingerprint, "mirror": mirror},
    )
    # `_watched` fetches ahead already; with prefetching, finished batches would wait for unfinished ones.
    finished = encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in _watched(finished):
        yield from table.to_pylist()


def _tasks(paths: Paths) -> Iterator[dict[str, list[str]]]:
    """Divide the files into tasks of a worker: some image files each, or one archive or table."""

    def key(numbered: tuple[int, tuple[str, str]]) -> int:
        number, (_, path) = numbered
        return number if sources.holds_many(path) else -1

    files = sources.files(paths)
    while chunk := list(islice(files, _FILES_PER_TASK)):
        for _, group in groupby(enumerate(chunk), key):
            names, places = zip(*(file for _, file in group), strict=True)
            yield {"names": list(names), "paths": list(places)}


def _sorted_digests(digests: Iterable[bytes]) -> np.ndarray:
    """Sort digests into (n, 32) bytes, which workers map instead of copying a set each."""
    return np.frombuffer(b"".join(sorted(digests)), np.uint8).reshape(-1, 32)


def _is_known(digest: bytes, known: np.ndarray) -> bool:
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if known[middle].tobytes() < digest else (low, middle)
    return low < len(known) and known[low].tobytes() == digest


def _read(task: Any, known: Any, columns: list[str]) -> Iterator[Any]:
    """Read the images of a task into tables: name, source, sha256, data (empty for a known image), error and so on."""
    import ray

    known = ray.get(known)
    pictures = (
        picture
        for name, path in zip(task["names"][0].as_py(), task["paths"][0].as_py(), strict=True)
        for picture in sources.pictures_in(name, path, columns)
    )
    rows = (row for picture in pictures for row in _read_frames(picture, known))
    while chunk := list(islice(rows, _FILES_PER_TASK)):
        yield _table(chunk, ("sha256", "data"))


def _read_frames(picture: Picture, known: np.ndarray) -> Iterator[dict[str, Any]]:
    """Read an image file into a row for each of its frames."""
    row = {
        "name": picture.name,
        "source": picture.source,
        "sha256": b"",
        "data": b"",
        "error": "",
        "frame": "",
        "passed": "",
    }
    if picture.passed is not None:
        yield row | {"error": picture.passed.reason, "passed": _HARMLESS if picture.passed.harmless else _NOT_KNOWN}
        return
    try:
        data = picture.read()
        frames, problem = count_frames(data)
    except NoPictureError as error:
        yield row | {"error": error.passed.reason, "passed": _HARMLESS if error.passed.harmless else _NOT_KNOWN}
        return
    except Exception as error:
        yield row | {"error": str(error) or type(error).__name__}
        return
    whole = hashlib.sha256(data).digest()
    for frame in range(frames):
        digest = frame_digest(whole, frame)
        names = {key: frame_name(row[key], frame) for key in ("name", "source")}
        content = b"" if _is_known(digest, known) else data
        yield row | names | {"sha256": digest, "data": content, "frame": str(frame) if frame else ""}
    if problem is not None:
        yield row | {"error": problem, "frame": str(frames)}


class EncodingActor:
    """Keep a model loaded in a worker, and encode tables that `_read` made.

    Args:
        model: name or folder for `shielded.models.load`.
        fingerprint: of the latent space that the model must have.
        mirror: encode each image mirrored left to right too.
    """

    def __init__(self, model: str, fingerprint: str, mirror: bool) -> None:
        from shielded.models import load

        self._space = LatentSpace.of(load(model))
        self._mirror = mirror
        self._pool = ThreadPoolExecutor(os.cpu_count())
        if self._space.fingerprint != fingerprint:
            raise ValueError(f"The model {model} of this worker is not the one that the protected set was made with.")

    def __call__(self, table: Any) -> Any:
        rows = table.to_pylist()
        pixels: list[Tensor] = []
        decoded_rows = []
        for row, decoded in zip(rows, self._pool.map(self._decode, rows), strict=True):
            row |= {"latents": b"", "mirrored": b""}
            if isinstance(decoded, Exception):
                row["error"] = str(decoded) or type(decoded).__name__
            elif decoded is not None:
                decoded_rows.append(row)
                pixels.append(decoded)
            del row["data"]
        if pixels:
            self._encode(decoded_rows, pixels, "latents")
            if self._mirror:
                self._encode(decoded_rows, [picture.flip(-1) for picture in pixels], "mirrored")
        return _table(rows, ("sha256", "latents", "mirrored"))

    def _decode(self, row: dict[str, Any]) -> Tensor | Exception | None:
        if row["error"] or not row["data"]:
            return None
        try:
            return pixels_of(row["data"], self._space, int(row["frame"] or 0))
        except Exception as error:  # decoders raise all kinds of errors on broken files
            return error

    def _encode(self, rows: list[dict[str, Any]], pixels: list[Tensor], name: str) -> None:
        for row, latent in zip(rows, encode_pixels(self._space, pixels), strict=True):
            row[name] = latent.numpy().tobytes()


def _table(rows: list[dict[str, Any]], binary: Sequence[str]) -> Any:
    import pyarrow as pa

    types = {name: pa.large_binary() if name in binary else pa.string() for name in rows[0]}
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


def _watched(batches: Iterable[Any]) -> Iterator[Any]:
    """Pass batches on; raise an error when the head of the cluster is lost."""
    found: queue.Queue[Any] = queue.Queue(maxsize=2)
    stopped = threading.Event()
    end = object()

    def fetch() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(end)
        except Exception as error:
            put(error)

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return found.put(item, timeout=CHECK_SECONDS)
            except queue.Full:
                pass

    threading.Thread(target=fetch, daemon=True).start()
    head = Head()
    try:
        while True:
            try:
                item = found.get(timeout=CHECK_SECONDS)
            except queue.Empty:
                head.check()
                continue
            if item is end:
                return
            if isinstance(item, Exception):
                raise RuntimeError(f"the Ray job failed: {str(item).strip().splitlines()[-1]}") from item
            yield item
    finally:
        stopped.set()
