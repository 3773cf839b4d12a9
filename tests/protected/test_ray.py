"""A cluster of one machine, started here: encoding and searching on it equal what one process does, whoever dies."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.in_pixels import SPACE, Actor, replace_models
from shielded import Spell
from shielded.cli import app
from shielded.latent_space import LatentSpace
from shielded.models import load
from shielded.protected import ProtectedSet, add_images, store, writer
from shielded.protected.ingest.encoding import pixels_of
from shielded.protected.ray import connection, ingest, search

WORKERS = 2
TOKEN = "0" * 32  # of clusters that live as long as this file's tests


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Cluster:
    """`ray start --head`, and all processes that come of it."""

    def __init__(self, processors):
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of sockets must be short
        self.address = f"127.0.0.1:{free_port()}"
        start = [Path(sys.executable).with_name("ray"), "start", "--head", "--node-ip-address", "127.0.0.1"]
        start += ["--port", self.address.rpartition(":")[2], "--num-cpus", str(processors), "--temp-dir", self.folder]
        start += ["--object-store-memory", str(100 << 20), "--include-dashboard", "false", "--disable-usage-stats"]
        started = subprocess.run(list(map(str, start)), capture_output=True, text=True)
        if started.returncode:
            self.stop()
            pytest.fail(started.stdout + started.stderr)

    def processes(self):
        roots = [p for p in psutil.process_iter(["cmdline"]) if self.folder in " ".join(p.info["cmdline"] or [])]
        return {process for root in roots for process in [root, *root.children(recursive=True)]} - {psutil.Process()}

    def workers(self, name):
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                    found.append(process)
        return found

    def kill_head(self):
        """Nothing else: where Ray's process of its own machine is killed, Ray ends a driver without a word."""
        (head,) = (process for process in self.processes() if process.name() == "gcs_server")
        head.kill()

    def kill(self):
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self):
        self.kill()
        psutil.wait_procs(self.processes(), timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def ray(environment):
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    started = Cluster(WORKERS)
    try:
        connection.connect(started.address)
        yield ray, started
    finally:
        ray.shutdown()
        started.stop()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """400 references in seven files, 58 of them removed, with radii of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_MAX_SHARD_BYTES", 60 * 64 * 4)
        protected = ProtectedSet.create(tmp_path_factory.mktemp("set"), LatentSpace(shape=(4, 4, 4)))
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(400, 4, 4, 4, generator=generator)
        radii = 7 + 3 * torch.rand(400, generator=generator, dtype=torch.float64)
        protected.add(latents, list(range(400)), radii, sources=[f"{i}.png" for i in range(400)])
        protected.remove(range(0, 400, 7))
    return protected


@pytest.fixture(scope="module")
def spread(ray, stored):
    return ProtectedSet.open(stored.path, ray=ray[1].address)


@pytest.fixture
def x():
    return torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def same_hits(a, b):
    return all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(astuple(a), astuple(b), strict=True))


def astuple(hits):
    return hits.query, hits.row, hits.distance, hits.radius


def test_the_set_reads_the_same(spread, stored):
    assert len(spread._reader._actors) >= WORKERS
    assert len(spread) == len(stored)
    assert list(spread.ids) == list(stored.ids)
    assert spread.sources[3:8:2] == stored.sources[3:8:2]
    assert spread.ids[-1] == stored.ids[-1]
    assert torch.equal(spread.radii, stored.radii)
    assert spread.energy == pytest.approx(stored.energy, rel=1e-12)
    rows = torch.tensor([300, 2, 2, 150])
    assert torch.equal(spread.vectors(rows), stored.vectors(rows))
    assert spread.verify() == stored.verify()
    with pytest.raises(IndexError, match="rows 0 to"):
        spread.vectors([len(stored)])


@pytest.mark.parametrize("kind", ["own", "number", "per row", "per image and row"])
def test_within_is_identical(spread, stored, x, kind):
    generator = torch.Generator().manual_seed(2)
    radius = {
        "own": None,
        "number": 9.0,
        "per row": 7 + 4 * torch.rand(len(stored), generator=generator),
        "per image and row": 7 + 4 * torch.rand(5, len(stored), generator=generator),
    }[kind]
    expected = stored.within(x, radius)
    assert len(expected) > 5
    assert same_hits(spread.within(x, radius), expected)
    shrink = torch.tensor([0.0, 1.0, 10.0, 30.0, 1000.0])
    assert same_hits(spread.within(x, radius, shrink), stored.within(x, radius, shrink))
    assert same_hits(spread.within(x, radius, shrink, nearest=3), stored.within(x, radius, shrink, nearest=3))


@pytest.mark.parametrize("k", [1, 7, 342])
def test_nearest_is_identical(spread, stored, x, k):
    distances, ids = spread.nearest(x, k)
    expected, names = stored.nearest(x, k)
    assert torch.equal(distances, expected)
    assert ids == names


def test_equal_distances_come_in_the_order_of_the_rows(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MAX_SHARD_BYTES", 2 * 4 * 4)
    protected = ProtectedSet.create(tmp_path / "set", LatentSpace(shape=(4,)))
    protected.add(torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0], [2.0]]).expand(6, 4), list("abcdef"))
    spread = ProtectedSet.open(tmp_path / "set", ray=ray[1].address)
    assert len(spread._reader._actors) == WORKERS
    assert spread.nearest(torch.zeros(1, 4), 5)[1] == [["a", "b", "c", "d", "e"]]


def test_errors_are_those_of_any_set(spread, stored, x):
    for call in (
        lambda s: s.within(x[:, :2]),
        lambda s: s.within(x * torch.nan),
        lambda s: s.within(x, torch.ones(3)),
        lambda s: s.within(x, -1.0),
        lambda s: s.nearest(x, 343),
    ):
        with pytest.raises(ValueError) as expected:  # noqa: PT011
            call(stored)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call(spread)
        assert str(error.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="only read"):
        spread.remove([1])


def test_an_earlier_version(ray, stored, x):
    spread = ProtectedSet.open(stored.path, version=2, ray=ray[1].address)
    expected = ProtectedSet.open(stored.path, version=2)
    assert len(spread) == len(expected) == 400
    assert same_hits(spread.within(x), expected.within(x))


def test_spell_takes_it_like_any_set(spread, stored, x):
    delta = Spell(stored, batch=False)(x)
    assert delta.any()
    assert torch.equal(Spell(spread, batch=False)(x), delta)


def test_a_worker_that_is_killed_is_replaced(ray, stored, spread, x):
    worker = psutil.Process(ray[0].get(spread._reader._actors[0].__ray_call__.remote(lambda _: os.getpid())))
    worker.suspend()  # so that it is killed before it has answered
    try:
        asked = [
            actor.within.remote(x.flatten(1).double().numpy(), np.array(9.0), None, None)
            for actor in spread._reader._actors
        ]
        assert ray[0].wait(asked, num_returns=len(asked), timeout=0.5)[1]
    finally:
        worker.kill()
    assert sum(len(row) for _, row, _ in connection.results(asked, spread._reader._head)) == len(stored.within(x, 9.0))
    assert same_hits(spread.within(x, 9.0), stored.within(x, 9.0))


def test_workers_that_are_always_killed_end_the_search(ray, tmp_path, monkeypatch):
    """For example by the kernel, because their shards are too large for the machine."""
    ProtectedSet.create(tmp_path, LatentSpace(shape=(4,))).add(torch.zeros(1, 4), ["a"])
    monkeypatch.setattr(search, "ShardActor", Deadly)
    monkeypatch.setattr(search, "_MAX_RETRIES", 1)
    with pytest.raises(RuntimeError, match="a worker of the Ray cluster failed"):
        ProtectedSet.open(tmp_path, ray=ray[1].address)


class Deadly:
    def __init__(self, *arguments):
        pass

    def count(self):
        os.kill(os.getpid(), signal.SIGKILL)


# ---- encoding ----


def png(seed):
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((128, 128)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, count):
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            data = png((ord(path.name[0]), i))
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def pictures(tmp_path):
    """Two archives with a name in common, single files, one of them twice, and one that is broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b"):
        write_tar(folder / f"{name}.tar", 3)
    (folder / "broken.png").write_bytes(b"no picture")
    for name in ("c", "c-again"):
        (folder / f"{name}.png").write_bytes(png(0))
    return folder


def content(protected):
    return list(zip(protected.ids, protected.sources, protected.sha256, strict=True))


class KilledOnce(Actor):
    """The first batch of all is never finished."""

    def __call__(self, table):
        done = super().__call__(table)
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return done


def test_encoding_is_the_same_and_survives_its_workers(ray, pictures, tmp_path, monkeypatch):
    # Who reads the pipe waits for somebody who writes into it: meanwhile it is killed. So is an encoder at its work.
    monkeypatch.setattr(ingest, "EncodingActor", KilledOnce)
    KilledOnce.marker = tmp_path / "killed"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    listed = tmp_path / "list"
    listed.write_text(f"{pictures / 'c.png'}\n{pipe}\n")
    killed = []

    def feed():
        with pipe.open("wb"):  # opens when the reader does
            killed.extend(process for process in ray[1].workers("Map") if reads(process, pipe))
            for process in killed:
                process.kill()
            psutil.wait_procs(killed)
        pipe.write_bytes(png(1))

    feeder = threading.Thread(target=feed)
    feeder.start()
    paths = [str(pictures), f"@{listed}"]
    protected = ProtectedSet.create(tmp_path / "spread", SPACE)
    done = ingest.add_images_on_cluster(
        protected, paths, ray[1].address, "emoji", 5.0, batch_size=2, mirror=True, progress=False
    )
    feeder.join()
    assert len(killed) == 1
    assert KilledOnce.marker.exists()
    regular = tmp_path / "regular"
    regular.mkdir()
    (regular / "pipe").write_bytes(png(1))
    listed.write_text(f"{pictures / 'c.png'}\n{regular / 'pipe'}\n")
    alone = ProtectedSet.create(tmp_path / "alone", SPACE)
    expected = add_images(alone, paths, 5.0, space=SPACE, mirror=True, progress=False)
    assert (done.added, done.present) == (expected.added, expected.present) == (16, 2)
    assert [path for path, _ in done.skipped] == [str(pictures / "broken.png")]
    assert [row for row in content(protected) if "pipe" not in row[0]] == [
        row for row in content(alone) if "pipe" not in row[0]
    ]
    assert list(protected.sha256) == list(alone.sha256)
    assert torch.equal(protected.radii, alone.radii)
    difference = protected.vectors(range(16)) - alone.vectors(range(16))
    assert difference.abs().max() <= 1e-5 * alone.vectors(range(16)).abs().max()  # batches may be others


def test_a_worker_encodes_with_the_model_that_it_loads():
    space = LatentSpace.of(load("emoji", "cpu"))
    picture = {"name": "a", "source": "a.png", "sha256": b"0" * 32, "data": png(1), "error": "", "frame": ""}
    unread = {**picture, "data": b"", "error": "it is broken"}
    table = pytest.importorskip("pyarrow").Table.from_pylist([{**picture, "passed": ""}, {**unread, "passed": ""}])
    done, skipped = ingest.EncodingActor("emoji", space.fingerprint, mirror=True)(table).to_pylist()
    pixels = pixels_of(png(1), space)
    for name, expected in (("latents", pixels), ("mirrored", pixels.flip(-1))):
        latents = torch.frombuffer(bytearray(done[name]), dtype=torch.float32)
        torch.testing.assert_close(latents, space.encode(expected[None]).flatten(), rtol=1e-4, atol=1e-4)
        assert skipped[name] == b""
    with pytest.raises(ValueError, match="is not the one that the protected set was made with"):
        ingest.EncodingActor("emoji", SPACE.fingerprint, mirror=False)


def reads(process, file):
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.path.samefile(descriptor, file):
                return True
    return False


SEARCH = """
import sys, torch
from shielded import ProtectedSet
from shielded.protected.ray import connection
connection.CHECK_SECONDS = 0.3
protected = ProtectedSet.open(sys.argv[1], ray=sys.argv[2])
x = torch.zeros(1, *protected.space.shape)
print(len(protected.within(x, 100.0)), flush=True)
input()  # until the head is lost
while True:
    protected.within(x, 100.0)
"""
PROTECT = """
from helpers.in_pixels import Actor, replace_models
from shielded.cli import main
from shielded.protected import ProtectedSet
from shielded.protected.ingest import encoding
from shielded.protected.ray import connection, ingest
connection.CHECK_SECONDS = 0.3
ingest.EncodingActor = Actor
replace_models()
encoding._SAVE_SECONDS = 0
add = ProtectedSet.add
def add_and_tell(self, *arguments):
    add(self, *arguments)
    print(len(self), flush=True)
ProtectedSet.add = add_and_tell
main()
"""


def test_without_its_head_it_says_so_and_goes_on_later(ray, stored, tmp_path, monkeypatch):
    """Both an encoding and a searching job; the repeated one goes on with what was saved, on another cluster."""
    pipe, listed, out = tmp_path / "pipe", tmp_path / "list", tmp_path / "set"
    os.mkfifo(pipe)
    write_tar(tmp_path / "d.tar", 33)  # more than a batch, which comes back while the reader of the pipe waits
    listed.write_text(f"{tmp_path / 'd.tar'}\n{pipe}\n")
    command = ["protect", f"@{listed}", "--out", str(out), "--json"]
    first, jobs = Cluster(2), []
    too_long = threading.Timer(300, lambda: [job.kill() for job in jobs])
    too_long.start()
    try:
        for arguments in ([SEARCH, stored.path, first.address], [PROTECT, *command, "--ray", first.address]):
            job = [sys.executable, "-c", *arguments]
            jobs.append(subprocess.Popen(job, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True))
        search, protect = jobs
        assert int(search.stdout.readline()) == len(stored)
        assert [protect.stdout.readline() for _ in range(33)] == [f"{n}\n" for n in range(1, 34)]
        first.kill_head()
        errors = [job.communicate("\n")[1] for job in jobs]
    finally:
        too_long.cancel()
        for job in jobs:
            job.kill()
        first.stop()
    assert "RuntimeError: the head of the Ray cluster" in errors[0]
    assert "Error: the head of the Ray cluster" in errors[1]
    assert [job.returncode for job in jobs] == [1, 1]
    kept = ProtectedSet.open(out)
    kept.verify()
    assert list(kept.ids) == [f"d/{i}" for i in range(33)]
    pipe.unlink()
    pipe.write_bytes(png(1))
    replace_models(monkeypatch.setattr)
    monkeypatch.setattr(ingest, "EncodingActor", Actor)
    finished = CliRunner().invoke(app, [*command, "--ray", ray[1].address])
    assert finished.exit_code == 0, finished.output
    assert [json.loads(finished.stdout)[name] for name in ("added", "present")] == [1, 33]
    assert list(ProtectedSet.open(out).ids) == [*(f"d/{i}" for i in range(33)), "pipe"]
    assert not (out / store.UNFINISHED).exists()


# ---- without a cluster ----


def test_without_ray_it_says_what_to_install(monkeypatch, stored, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match="the extra `ray`"):
        ProtectedSet.open(stored.path, ray="auto")


def test_an_address_of_another_kind(stored):
    with pytest.raises(RuntimeError, match="give host:port"):
        ProtectedSet.open(stored.path, ray="ray://127.0.0.1:10001")


def test_an_address_where_nothing_answers(stored, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"no Ray cluster answers at 127.0.0.1:\d+; start one with `ray start"):
        ProtectedSet.open(stored.path, ray=f"127.0.0.1:{free_port()}")
