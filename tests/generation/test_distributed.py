"""Several processes make the images that one makes. They are started here and exchange tensors by gloo."""

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.ideal import Ideal
from shielded import LatentSpace, ProtectedSet, RepelledDenoiser, Spell
from shielded.cli import app
from shielded.generation import distributed, generate
from shielded.models import PRESETS, load

SEEDS = [0, 1, 2, 3, 4]  # of which no batch can be split evenly
PROMPTS = ["pizza", "red heart", "red heart", "pizza", "cat face"]
TOLERANCE = 1e-3  # latents have norm 33; convolutions round differently in batches of another size
COUNTS = (1, 4, 7)
NUMBERS = (2, 4)  # of processes
STEPS = 2
# The scripts that this file starts import the helpers, too.
TESTS = str(Path(__file__).parents[1])
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))}
COMMAND = ["generate", "red heart", "-n", "3", "--steps", str(STEPS), "--json"]

# ---- what both do ----


def sampled(share, groups=None):
    """Euler steps with a denoiser that treats rows one by one, so that bits can be compared; two runs, with history."""
    spell = Spell(radius=8.0, history=True, groups=groups)
    correct = distributed.Gathered(spell, share)

    def row_by_row(x, sigma):
        return torch.cat([Ideal()(row[None], sigma) for row in x])

    denoise = RepelledDenoiser(row_by_row, correct)
    sigmas = torch.linspace(10, 0.05, 5).tolist()
    finished = []
    for run in range(2):
        noise = torch.randn(share.count, 3, 4, 4, generator=torch.Generator().manual_seed(run))
        x = sigmas[0] * share.take(noise)
        correct.start()
        for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            x0 = denoise(x, sigma)
            x = x0 + following / sigma * (x - x0)
        finished.append(share.gather(correct.finish(x)))
    return torch.cat(finished), len(spell.history), spell.trace


def all_sampled():
    """Batches of fewer images than there are processes, of as many, and of more that cannot be split evenly."""
    tensors, told = {}, {}
    for count in COUNTS:
        for groups in (None, torch.arange(count) % 2):
            name = f"{count}{'' if groups is None else ' in groups'}"
            tensors[name], *told[name] = sampled(distributed.Share.of(count), groups)
    return tensors, told


def everything(folder, processes):
    """All results of one or of several processes, in a folder; the set of protected images is there already."""
    tensors, told = {}, {}
    pipe = load("emoji", "cpu")
    options = {"steps": STEPS, "guidance_scale": PRESETS["emoji"].guidance, "progress": False, "processes": processes}
    protected = ProtectedSet.open(folder / "set")
    spells = {
        "plain": (None, slice(5)),
        "batch": (Spell(radius=30.0, history=True), slice(5)),
        "protected": (Spell(protected, batch=False), slice(5)),
        "one image": (Spell(protected, batch=False), slice(1, 2)),  # of which the second process makes none
    }
    for name, (spell, chosen) in spells.items():
        leaks = {} if spell is None or spell.batch else {"on_leak": "restart", "attempts": 2}
        log = []
        made = generate(
            pipe,
            PROMPTS[chosen],
            SEEDS[chosen],
            spell,
            batch_size=3,
            log=lambda event, log=log, **content: log.append([event, content]),
            **leaks,
            **options,
        )
        tensors[name] = made.latents
        tensors[f"{name} images"] = torch.stack([torch.from_numpy(np.array(image)) for image in made.images])
        told[name] = [made.attempts, made.repair, made.refused, spell and spell.trace, log]
    told["histories"] = len(spells["batch"][0].history)
    return tensors, told


def one_of_two(rank, processes, folder):
    """What `accelerate launch` starts; `main` has told each its rank and where the others are."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    sys.stdout = (folder / f"{rank} printed").open("w")
    distributed.join("cpu")
    tensors, told = everything(folder, processes=True)
    save_file(tensors, folder / f"{distributed.is_main():d}.safetensors")
    (folder / f"{distributed.is_main():d}.json").write_text(json.dumps(told))
    app([*COMMAND, "--out", str(folder / "out"), "--protect", str(folder / "set")], standalone_mode=False)
    distributed.leave()  # what the command has joined, too, is left now
    assert distributed.is_main() == (os.environ["RANK"] == "0")
    with pytest.raises(RuntimeError, match="left the others already"):
        distributed.join("cpu")
    sys.stdout.close()


def one_of_many(rank, processes, folder):
    join_many(rank, processes, folder)
    tensors, told = all_sampled()
    save_file(tensors, folder / f"{rank} of {processes}.safetensors")
    (folder / f"{rank} of {processes}.json").write_text(json.dumps(told))
    distributed.leave()


def one_of_many_that_dies(rank, processes, folder):
    """The last process is killed in the middle of a trajectory, the others say what they then see."""
    join_many(rank, processes, folder)
    share = distributed.Share.of(8)
    take, taken = distributed.Share.take, []

    def take_or_die(self, tensor):
        taken.append(None)
        if rank == processes - 1 and len(taken) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, tensor)

    distributed.Share.take = take_or_die
    try:
        sampled(share)
    except RuntimeError as error:
        (folder / f"{rank} alone").write_text(str(error))


def join_many(rank, processes, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/{processes} met", rank=rank, world_size=processes)


def forked(folder, job, processes):
    """Run a job in so many processes, which need not import anything again; returns how each ended."""
    started = [mp.get_context("fork").Process(target=job, args=(i, processes, folder)) for i in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def main(folder):
    torch.set_num_threads(1)
    for processes in NUMBERS:
        assert not any(forked(folder, one_of_many, processes))
    assert forked(folder, one_of_many_that_dies, 4)[:-1] == [0] * 3
    if importlib.util.find_spec("accelerate"):
        load("emoji", "cpu")  # imports what both need
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        assert not any(forked(folder, one_of_two, 2))


# ---- and what comes of it ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a protected set of two of the images that the plain model makes."""
    folder = tmp_path_factory.mktemp("processes")
    pipe = load("emoji", "cpu")
    plain = generate(
        pipe, ["red heart"] * 2, SEEDS[1:3], steps=STEPS, guidance_scale=PRESETS["emoji"].guidance, progress=False
    )
    protected = ProtectedSet.create(folder / "set", LatentSpace.of(pipe))
    protected.add(LatentSpace.of(pipe).encode(plain.images), ["one", "two"], 16.0)
    return folder


@pytest.fixture(scope="module")
def one(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield everything(folder, processes=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def many(folder):
    """The folder, after several processes have done what they do, in a script that is forked."""
    command = [sys.executable, __file__, folder]
    subprocess.run(command, check=True, timeout=500, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.fixture(scope="module")
def two(many, folder):
    pytest.importorskip("accelerate")
    printed = [(folder / f"{rank} printed").read_text() for rank in range(2)]
    results = [
        (load_file(folder / f"{main}.safetensors"), json.loads((folder / f"{main}.json").read_text()))
        for main in (1, 0)
    ]
    return results, printed


def test_a_sampler_makes_the_same_bits(many):
    """No matter how many processes share a batch: corrections, trace and history are those of the whole batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected, told = all_sampled()
    torch.set_num_threads(threads)
    assert any(row["active"] for row in told["7"][1])
    assert not torch.equal(expected["7"], expected["7 in groups"])
    for rank, processes in ((rank, number) for number in NUMBERS for rank in range(number)):
        tensors = load_file(many / f"{rank} of {processes}.safetensors")
        assert tensors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
        assert json.loads((many / f"{rank} of {processes}.json").read_text()) == json.loads(json.dumps(told))


def test_nobody_waits_for_a_process_that_was_killed(many):
    for rank in range(3):
        assert (many / f"{rank} alone").read_text().startswith("another process has ended")


@pytest.mark.parametrize("name", ["plain", "batch", "protected", "one image"])
def test_generate_makes_the_same_images(one, two, name):
    expected, (attempts, repair, refused, _, log) = one[0], one[1][name]
    for tensors, told in two[0]:
        assert len(tensors[name]) == (1 if name == "one image" else len(SEEDS))
        torch.testing.assert_close(tensors[name], expected[name], atol=TOLERANCE, rtol=0)
        difference = tensors[f"{name} images"].int() - expected[f"{name} images"].int()
        assert difference.abs().max() <= 1
        assert told[name][:2] == [attempts, repair]
        assert [reason is None for reason in told[name][2]] == [reason is None for reason in refused]
    # The log is of all images in the main process, and events of one image are in their order.
    for seed in SEEDS:
        ours = [event for event, content in two[0][0][1][name][4] if content["seed"] == seed]
        assert ours == [event for event, content in log if content["seed"] == seed]


def test_what_is_repaired_is_the_same(one):
    """Otherwise the test above shows nothing of repairs, nor that images of a batch see each other."""
    for name in ("protected", "one image"):
        assert {"restart", "push"} & set(one[1][name][1])
    assert not torch.equal(one[0]["plain"], one[0]["batch"])


def test_there_is_one_history_and_one_trace(one, two):
    assert one[1]["histories"] == len(SEEDS)
    for _, told in two[0]:
        assert told["histories"] == len(SEEDS)
        # Batches of 3 and 2 in one process and in two: the trace is of the last one.
        pairs = list(zip(told["batch"][3], one[1]["batch"][3], strict=True))
        assert pairs
        for ours, theirs in pairs:
            assert [ours[key] for key in ("run", "step", "image", "active")] == [
                theirs[key] for key in ("run", "step", "image", "active")
            ]
            assert ours["push"] == pytest.approx(theirs["push"], abs=TOLERANCE)
    # Images that do not see each other: batches of 3 in each process, so one of all.
    trace = two[0][0][1]["protected"][3]
    assert [(row["step"], row["image"]) for row in trace] == [
        (step, image) for step in range(STEPS) for image in range(5)
    ]
    assert two[0][1][1]["protected"][3] == trace


def test_the_command_writes_one_report(folder, two):
    printed = sorted(two[1], key=len)
    assert printed[0] == ""
    report = json.loads(printed[1])
    assert report == json.loads((folder / "out" / "report.json").read_text())
    assert report["n"] == 3
    kept = [certificate["image"] for certificate in report["certificates"]]
    assert sorted(path.name for path in (folder / "out" / "with").glob("*.png")) == sorted(kept)
    assert len(kept) + len(report["refused"]) == 3
    for name in kept:
        Image.open(folder / "out" / "with" / name).verify()
    rows = list(csv.DictReader((folder / "out" / "trace.csv").open()))
    assert [(int(row["step"]), int(row["image"])) for row in rows] == [(s, i) for s in range(STEPS) for i in range(3)]


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.join() is None
    assert distributed.is_main()
    share = distributed.Share.of(3)
    assert (share.rows, share.kept) == ([0, 1, 2], 3)


def test_shares_cover_a_batch_once(monkeypatch):
    for processes in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "_processes", lambda n=processes: n)
        for count in (1, 2, 5, 8, 9):
            rows = []
            for index in range(processes):
                monkeypatch.setattr(distributed, "_rank", lambda i=index: i)
                share = distributed.Share.of(count)
                assert len(share.rows) == -(-count // processes)
                assert set(share.rows) <= set(range(count))
                rows += share.rows[: share.kept]
            assert rows == list(range(count))


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RuntimeError, match=r"extra `accelerate`: pip install -e"):
        distributed.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
