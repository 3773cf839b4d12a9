"""Past one machine, with Ray: images are encoded, and a set is searched, by the workers of a cluster.

Every machine has this package and sees the images, the model and the set's folder under the same paths. Workers read
and encode; the set is written by the process that asked, in the order of the images, so a worker that dies costs what
it was working on, which another does again: nothing is missing and nothing is there twice. Searches are answered by
actors that each hold some of the shards; distances are the same numbers, bit for bit, that one machine finds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shielded.latent_space import LatentSpace, to_pixels
from shielded.protected import store
from shielded.protected.ingest import images, sources
from shielded.protected.ingest.images import MIRRORED, AddedImages
from shielded.protected.ingest.sources import Paths
from shielded.protected.protected_set import ProtectedSet
from shielded.protected.search.search import Hits, sorted_pairs

_LOOK_SECONDS = 2.0  # between two looks at the head of the cluster
_LOOKS = 3  # in vain, before it is given up
_RETRIES = 3  # of a search whose worker died: one that kills every worker must not go on for ever
_FILES = 64  # image files that a worker reads in one task
_PIECE = 4096  # entries of a column that are asked for at once


# ---- the cluster ----


def connect(address: str) -> Any:
    """Joins a cluster, unless this process has joined one already.

    Args:
        address: host:port of its head, "auto" for the one that this machine belongs to, or "local" to start one for
            this process.

    Returns:
        The module `ray`.

    Raises:
        RuntimeError: Ray is not installed, or nothing answers there.
    """
    if address.startswith("ray://"):
        raise RuntimeError(
            f"{address} is a client's address; give host:port, on a machine that belongs to the cluster."
        )
    # Ray reads these when imported. What matters is raised; and Ray ends a process that has missed the head for a
    # minute without a word, which a long step between two searches can take: `_Head` shall be the one to say it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
    try:
        import ray
    except ImportError:
        raise RuntimeError("A cluster needs Ray: pip install 'shielded[ray]'.") from None
    if ray.is_initialized():
        return ray
    hint = "start one with `ray start --head`, and see that RAY_AUTH_MODE and RAY_AUTH_TOKEN are what it was given"
    # Ray itself tries for minutes.
    if address.rpartition(":")[2].isdigit() and not _answers(address):
        raise RuntimeError(f"no Ray cluster answers at {address}; {hint}.")
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise RuntimeError(f"the Ray cluster at {address} cannot be joined; {hint}. ({error})") from None
    return ray


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class _Head:
    """Looks now and then whether the head of the cluster is there: Ray itself would wait, and then end the process."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._address = ray.get_runtime_context().gcs_address
        self._missed = 0
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raises when it has not been there for some looks."""
        if self._missed < _LOOKS and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._missed = 0 if _answers(self._address) else self._missed + 1
            self._looked = time.monotonic()
            if self._missed == _LOOKS:
                self._ray.shutdown()  # so that the next `connect` joins the new one
        if self._missed == _LOOKS:
            raise RuntimeError(
                f"the head of the Ray cluster at {self._address} does not answer any more; what was saved is kept. "
                "Start it again and repeat the command, which goes on from there."
            )

    def require(self) -> None:
        """Raises unless it is there."""
        while not _answers(self._address):
            time.sleep(_LOOK_SECONDS)
            self.look()


def _results(refs: list[Any], head: _Head) -> list[Any]:
    """What the workers answer; their errors are raised as they would be here."""
    import ray

    head.look()
    while ray.wait(refs, num_returns=len(refs), timeout=_LOOK_SECONDS)[1]:
        head.look()
    try:
        return ray.get(refs)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        head.require()  # with which workers go
        raise RuntimeError(f"a worker of the Ray cluster failed: {error}") from None


# ---- encoding ----


def add_images(
    protected: ProtectedSet,
    paths: Paths,
    address: str,
    model: str,
    radius: float | None = None,
    strict: bool = False,
    batch_size: int = 32,
    mirror: bool = False,
    progress: bool = True,
) -> AddedImages:
    """Like `shielded.protected.add_images`, with the images read and encoded by the workers of a cluster.

    Ids, order and contents are the same; how an encoder rounds can depend on which images are in one batch.

    Args:
        protected: the set to add to. This process writes it.
        paths: as there.
        address: of the cluster; see `connect`.
        model: what `shielded.models.load` takes; each worker loads it. With GPUs in the cluster there is a worker for
            each of them, else one for each processor but one, which reads.
        radius: as there.
        strict: as there.
        batch_size: images per call of the encoder, at most.
        mirror: as there.
        progress: as there.

    Returns:
        As there.

    Raises:
        RuntimeError: no cluster, its head was lost, or a worker failed. What was encoded by then is saved, and the
            same call goes on from there.
        FileNotFoundError: as there, like all other errors.
    """
    sources.require_images(paths)
    ray = connect(address)
    result = AddedImages()
    rows: list[tuple[str, str, str]] = []  # id, source and digest of each encoded image
    latents: list[Tensor] = []
    saved = time.monotonic()

    def save() -> None:
        if rows:
            ids, origins, digests = zip(*rows, strict=True)
            protected.add(torch.stack(latents), ids, radius, origins, digests)
            result.added += len(rows)
            latents.clear()
            rows.clear()

    total = sources.count(paths) if progress else None
    encoded = _encoded(ray, protected, paths, model, batch_size, mirror)
    with tqdm(total=total, desc="protect", unit="image", disable=not progress) as bar:
        try:
            for name, latent in _new_rows(protected, encoded, mirror, strict, result, bar):
                rows.append(name)
                latents.append(latent)
                if (
                    time.monotonic() - saved >= images._SAVE_SECONDS
                    or len(latents) * latent.nbytes >= images._SAVE_BYTES
                ):
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return result


def _new_rows(
    protected: ProtectedSet,
    encoded: Iterable[dict[str, Any]],
    mirror: bool,
    strict: bool,
    result: AddedImages,
    bar: tqdm,
) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """(id, source, digest) and latents of each image that is not in the set yet and could be encoded, in order."""
    taken: set[str | int] = set()
    seen: set[bytes] = set()
    for name, digest in zip(protected.ids, protected.sha256, strict=True):
        taken.add(name)
        if digest is not None:
            seen.add(images._key(bytes.fromhex(digest), str(name).startswith(MIRRORED)))
    for row in encoded:
        bar.update()
        if row["error"]:
            images._skip(row["source"], ValueError(row["error"]), strict, result.skipped)
            continue
        missing = [m for m in ((False, True) if mirror else (False,)) if images._key(row["sha256"], m) not in seen]
        result.present += not missing
        for mirrored in missing:
            seen.add(images._key(row["sha256"], mirrored))
            name = images._unique(MIRRORED + row["name"] if mirrored else row["name"], taken)
            data = np.frombuffer(row["mirrored" if mirrored else "latents"], np.float32)
            latent = torch.from_numpy(data.copy()).view(protected.space.shape)
            yield (name, row["source"], row["sha256"].hex()), latent


def _encoded(
    ray: Any, protected: ProtectedSet, paths: Paths, model: str, batch_size: int, mirror: bool
) -> Iterator[dict[str, Any]]:
    """For each image, in order: name, source, sha256, latents and mirrored (bytes of float32), error."""
    import ray.data

    known = ray.put(_digests(protected, mirror))
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    workers = gpus or max(1, int(resources.get("CPU", 1)) - 1)
    data = ray.data.from_items(list(_tasks(paths)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)  # few images, no mistake
    data.context.enable_progress_bars = False
    data.context.execution_options.preserve_order = True
    # Half a processor: a reader waits most of the time, and Ray would make one operator of two with equal needs.
    read = data.map_batches(_read, batch_size=1, batch_format="pyarrow", num_cpus=0.5, fn_kwargs={"known": known})
    encoded = read.map_batches(
        _Encoder,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if gpus else 0,
        fn_constructor_kwargs={"model": model, "fingerprint": protected.space.fingerprint, "mirror": mirror},
    )
    # `_watched` is ahead already; with prefetching, what is finished would wait here for what is not.
    done = encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in _watched(ray, done):
        yield from table.to_pylist()


def _tasks(paths: Paths) -> Iterator[dict[str, list[str]]]:
    """What a worker reads in one task: some image files, or one archive or table."""

    def key(place: tuple[int, tuple[str, str]]) -> int:
        number, (_, path) = place
        return number if path.lower().endswith(sources._TARS + sources._TABLES) else -1

    for given in sources._each(paths):
        files = sources._containers(given)
        while some := list(islice(files, _FILES)):
            for _, group in groupby(enumerate(some), key):
                names, places = zip(*(file for _, file in group), strict=True)
                yield {"names": list(names), "paths": list(places)}


def _digests(protected: ProtectedSet, mirror: bool) -> np.ndarray:
    """(n, 32) bytes, sorted: the images that need not be encoded again."""
    plain, mirrored = set(), set()
    for name, digest in zip(protected.ids, protected.sha256, strict=True):
        if digest is not None:
            (mirrored if str(name).startswith(MIRRORED) else plain).add(bytes.fromhex(digest))
    done = sorted(plain & mirrored if mirror else plain)
    return np.frombuffer(b"".join(done), np.uint8).reshape(-1, 32)


def _is_known(digest: bytes, known: np.ndarray) -> bool:
    low, high = 0, len(known)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if known[middle].tobytes() < digest else (low, middle)
    return low < len(known) and known[low].tobytes() == digest


def _read(task: Any, known: Any) -> Iterator[Any]:
    """The images of a task as tables: name, source, sha256, data (nothing where it is known), error."""
    import ray

    known = ray.get(known)
    pictures = (
        picture
        for name, path in zip(task["names"][0].as_py(), task["paths"][0].as_py(), strict=True)
        for picture in sources._reader(path)(name, path)
    )
    while some := list(islice(pictures, _FILES)):
        yield _table([_read_one(picture, known) for picture in some], ("sha256", "data"))


def _read_one(picture: sources.Picture, known: np.ndarray) -> dict[str, Any]:
    row = {"name": picture.name, "source": picture.source, "sha256": b"", "data": b"", "error": ""}
    try:
        data = picture.read()
    except Exception as error:
        return row | {"error": str(error) or type(error).__name__}
    digest = hashlib.sha256(data).digest()
    return row | {"sha256": digest, "data": b"" if _is_known(digest, known) else data}


class _Encoder:
    """A model that a worker keeps loaded."""

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
        encode = []
        for row, decoded in zip(rows, self._pool.map(self._decode, rows), strict=True):
            row |= {"latents": b"", "mirrored": b""}
            if isinstance(decoded, Exception):
                row["error"] = str(decoded) or type(decoded).__name__
            elif decoded is not None:
                encode.append(row)
                pixels.append(decoded)
            del row["data"]
        if pixels:
            self._encode(encode, pixels, "latents")
            if self._mirror:
                self._encode(encode, [picture.flip(-1) for picture in pixels], "mirrored")
        return _table(rows, ("sha256", "latents", "mirrored"))

    def _decode(self, row: dict[str, Any]) -> Tensor | Exception | None:
        if row["error"] or not row["data"]:
            return None
        try:
            return to_pixels(images._decode(row["data"]), self._space.image_size)
        except Exception as error:  # decoders raise all kinds of errors on broken files
            return error

    def _encode(self, rows: list[dict[str, Any]], pixels: list[Tensor], name: str) -> None:
        for row, latent in zip(rows, images._encode(self._space, pixels), strict=True):
            row[name] = latent.numpy().tobytes()


def _table(rows: list[dict[str, Any]], binary: Sequence[str]) -> Any:
    import pyarrow as pa

    types = {name: pa.large_binary() if name in binary else pa.string() for name in rows[0]}
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})


def _watched(ray: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches, but an error when the head is lost."""
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
                return found.put(item, timeout=_LOOK_SECONDS)
            except queue.Full:
                pass

    threading.Thread(target=fetch, daemon=True).start()
    head = _Head(ray)
    try:
        while True:
            try:
                item = found.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                head.look()
                continue
            if item is end:
                return
            if isinstance(item, Exception):
                raise RuntimeError(f"the Ray job failed: {str(item).strip().splitlines()[-1]}") from item
            yield item
    finally:
        stopped.set()


# ---- searching ----


class ClusterSet(ProtectedSet):
    """A protected set whose shards are held by actors of a cluster; made by `ProtectedSet.open(path, ray=...)`.

    Reads and searches like any other, with the same results. To change it, open it without `ray`.
    """

    def __init__(
        self,
        path: Path,
        manifest: store.Manifest,
        space: LatentSpace,
        version: int | None = None,
        address: str = "auto",
        workers: int | None = None,
        memory: int | None = None,
    ) -> None:
        """For `ProtectedSet.open`.

        Args:
            path: the folder of the set, which every machine of the cluster sees.
            manifest: of the set.
            space: of the set.
            version: as in `ProtectedSet.open`.
            address: of the cluster; see `connect`.
            workers: how many actors share the shards; None: one for each processor of the cluster.
            memory: bytes that the search of each may hold.
        """
        ray = connect(address)
        self._workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        super().__init__(path, manifest, space, version, memory)

    def _load(self, manifest: store.Manifest, version: int | None = None) -> None:
        import ray

        self._manifest = manifest
        self.version = manifest["version"] if version is None else version
        starts = np.cumsum([0, *(entry["rows"] for entry in manifest["shards"])])
        gone, versions = store.read_removed(self.path, manifest["removed"])
        if version is not None:
            gone = np.append(gone[versions <= version], np.arange(self._rows_at(version), starts[-1]))
        self._head = _Head(ray)
        # Memory is what they need; a processor of their own would keep other jobs off the cluster.
        options = {"max_restarts": -1, "max_task_retries": _RETRIES, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(num_cpus=0, **options)(_Shards)
        folder = str(self.path.resolve())
        self._parts = []
        for low, high in pairwise(_cuts(starts, self._workers)):
            part = {**manifest, "shards": manifest["shards"][low:high], "removed": None}
            here = gone[(gone >= starts[low]) & (gone < starts[high])] - starts[low]
            self._parts.append(actor.remote(folder, part, here, self._memory))
        counts = self._ask("count")
        self._starts = np.cumsum([0, *counts])
        self.ids, self.sources, self.sha256 = (_Column(self, name) for name in ("ids", "sources", "sha256"))

    @cached_property
    def radii(self) -> Tensor:
        """(K,) float64 on the CPU: radius of each row's shield, NaN where none was given."""
        return torch.from_numpy(np.concatenate([np.empty(0), *self._ask("radii")]))

    @cached_property
    def energy(self) -> float:
        """Mean of ‖z‖² over the references, 0 if there are none."""
        return float(sum(self._ask("energy")) / len(self)) if len(self) else 0.0

    @cached_property
    def _without_radius(self) -> int:
        return int(self.radii.isnan().sum())

    def vectors(self, rows: Tensor | Sequence[int]) -> Tensor:
        """As of `ProtectedSet`."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        vectors = np.empty((len(rows), *self.space.shape), np.float32)
        for places, answer in self._ask_for(rows.cpu().numpy(), "vectors"):
            vectors[places] = answer
        return torch.from_numpy(vectors).to(rows.device)

    def within(
        self,
        x0: Tensor,
        radius: float | Tensor | None = None,
        shrink: Tensor | None = None,
        nearest: int | None = None,
    ) -> Hits:
        """As of `ProtectedSet`."""
        x = self._sent(x0)
        shrink = None if shrink is None else torch.as_tensor(shrink).detach().cpu().double().numpy()
        radii = self._radius_of_parts(radius, len(x0))
        asked = [part.within.remote(x, own, shrink, nearest) for part, own in zip(self._parts, radii, strict=True)]
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for start, (query, row, distance) in zip(self._starts, _results(asked, self._head), strict=False):
            found.append((query, row + start, distance))
        pairs = tuple(np.concatenate(column) for column in zip(*found, strict=True))
        return Hits(*(_on(column, x0) for column in sorted_pairs(pairs, nearest)))

    def nearest_rows(self, x0: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """As of `ProtectedSet`."""
        if not len(self):
            raise ValueError(f"The protected set at {self.path} is empty, so nothing is nearest; add references first.")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must be between 1 and the {len(self)} rows of the set; got {k}.")
        x = self._sent(x0)
        found = _results([part.nearest.remote(x, k) for part in self._parts], self._head)
        distances = np.hstack([distance for distance, _ in found])
        rows = np.hstack([row + start for start, (_, row) in zip(self._starts, found, strict=False)])
        order = np.lexsort((rows, distances), axis=1)[:, :k]
        return tuple(_on(np.take_along_axis(column, order, 1), x0) for column in (distances, rows))

    def nearest(self, x0: Tensor, k: int = 1) -> tuple[Tensor, list[list[str | int]]]:
        """As of `ProtectedSet`."""
        distances, rows = self.nearest_rows(x0, k)
        names = self.ids.take(rows.flatten().cpu().numpy())
        return distances, [names[i : i + k] for i in range(0, len(names), k)]

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("A set that was opened with ray= is only read; open it without, to change it.")

    add = remove = compact = _refuse

    def _radius_of_parts(self, radius: float | Tensor | None, batch: int) -> list[Any]:
        """What of a radius each part needs; the set's own radii are there already."""
        if radius is None or ("radii" in self.__dict__ and radius is self.radii):
            if self._without_radius:
                raise ValueError(
                    f"{self._without_radius} of {len(self)} references have no radius of their own; pass radius=, or "
                    "add them with one."
                )
            return [None] * len(self._parts)
        radius = torch.as_tensor(radius, dtype=torch.float64).detach().cpu().numpy()
        if radius.ndim and radius.shape not in ((len(self),), (batch, len(self))):
            raise ValueError(f"radius must be one number, {(len(self),)} or {(batch, len(self))}; got {radius.shape}.")
        return [radius[..., low:high] if radius.ndim else float(radius) for low, high in pairwise(self._starts)]

    def _sent(self, x0: Tensor) -> Any:
        """The queries in the object store: each machine gets them once."""
        import ray

        self._head.look()  # without one, Ray would start a cluster of its own
        try:
            return ray.put(x0.detach().cpu().double().numpy())
        except (ray.exceptions.RayError, OSError):
            self._head.require()
            raise

    def _ask(self, name: str) -> list[Any]:
        return _results([getattr(part, name).remote() for part in self._parts], self._head) if self._parts else []

    def _ask_for(self, rows: np.ndarray, name: str, *args: Any) -> list[tuple[np.ndarray, Any]]:
        """(places in `rows`, answer) of each part that has some of them."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"The protected set has the rows 0 to {len(self) - 1}; got {rows.tolist()[:3]}.")
        part = np.searchsorted(self._starts, rows, side="right") - 1
        places = [np.flatnonzero(part == number) for number in np.unique(part)]
        asked = [
            getattr(self._parts[part[own[0]]], name).remote(rows[own] - self._starts[part[own[0]]], *args)
            for own in places
        ]
        return list(zip(places, _results(asked, self._head), strict=True))


class _Shards:
    """The actor: some of the shards, as a set of their own."""

    def __init__(self, path: str, manifest: store.Manifest, gone: np.ndarray, memory: int) -> None:
        self._arguments = Path(path), manifest, gone, memory

    @cached_property
    def _set(self) -> ProtectedSet:
        path, manifest, gone, memory = self._arguments
        with tempfile.TemporaryDirectory() as folder:
            entry = store.write_removed(Path(folder), 1, gone, np.zeros_like(gone))
            manifest = {**manifest, "removed": {**entry, "file": str(Path(folder, entry["file"]))}}
            return ProtectedSet(path, manifest, LatentSpace.from_json(manifest["space"]), memory=memory)

    def count(self) -> int:
        return len(self._set)

    def radii(self) -> np.ndarray:
        return self._set.radii.numpy()

    def energy(self) -> float:
        return self._set.energy * len(self._set)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        return self._set.vectors(rows.copy()).numpy()

    def column(self, rows: np.ndarray, name: str) -> list[Any]:
        column = getattr(self._set, name)
        return [column[row] for row in rows.tolist()]

    def within(
        self, x: np.ndarray, radius: Any, shrink: np.ndarray | None, nearest: int | None = None
    ) -> tuple[np.ndarray, ...]:
        radius = _tensor(radius) if isinstance(radius, np.ndarray) else radius
        hits = self._set.within(_tensor(x), radius, None if shrink is None else _tensor(shrink), nearest)
        return hits.query.numpy(), hits.row.numpy(), hits.distance.numpy()

    def nearest(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if not len(self._set):
            return np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
        distances, rows = self._set.nearest_rows(_tensor(x), min(k, len(self._set)))
        return distances.numpy(), rows.numpy()


class _Column(Sequence):
    """One property of every row, asked of the actors when it is needed."""

    def __init__(self, protected: ClusterSet, name: str) -> None:
        self._protected, self._name = protected, name

    def __len__(self) -> int:
        return int(self._protected._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        rows = range(len(self))[index]
        return self.take(np.array(rows, np.int64)) if isinstance(rows, range) else self.take(np.array([rows]))[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _PIECE):
            yield from self[start : start + _PIECE]

    def take(self, rows: np.ndarray) -> list[Any]:
        """The entries of the given rows, in one question to each actor."""
        values: list[Any] = [None] * len(rows)
        for places, answer in self._protected._ask_for(rows, "column", self._name):
            for place, value in zip(places.tolist(), answer, strict=True):
                values[place] = value
        return values


def _cuts(starts: np.ndarray, workers: int) -> list[int]:
    """Where to cut the shards into at most so many runs with about the same number of rows."""
    wanted = np.linspace(0, starts[-1], workers + 1)
    return sorted({int(np.abs(starts - place).argmin()) for place in wanted})


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # what comes out of the object store is read-only


def _on(array: np.ndarray, x0: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    if x0.device.type == "mps" and tensor.is_floating_point():  # Metal has no float64
        tensor = tensor.float()
    return tensor.to(x0.device)
