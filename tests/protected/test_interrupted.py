"""Commands that are killed between any two of their steps, and processes that add to one set at the same time."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.averages import SPACE, encode_by_averages
from shielded import ProtectedSet
from shielded.cli import app
from shielded.protected import add_images, store
from shielded.protected.ingest import job


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    encode_by_averages(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and no power fails here


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


class Killed(BaseException):
    pass


# What a process does to its folder, in the order in which a kill may come between.
STEPS = ["replace", "fsync", "unlink"]


def killed_at(monkeypatch, moment, arguments):
    """Run a command up to its step number `moment`; tell whether it ended before."""
    calls = iter(range(10**6))

    def interrupted(function):
        def call(*args, **kwargs):
            if next(calls) >= moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, interrupted(getattr(os, name)))
        try:
            run(arguments)
        except Killed:
            return False
    return True


def run(arguments):
    result = CliRunner().invoke(app, ["protect", *map(str, arguments), "--json"])
    if isinstance(result.exception, Killed):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


COMMANDS = {
    "protect": lambda p, s: [p, "--out", s, "--radius", 2],
    "overwrite": lambda p, s: [p, "--out", s, "--radius", 2, "--overwrite"],
    "protect and compact": lambda p, s: [p, "--out", s, "--radius", 2, "--mirror", "--compact"],
    "remove": lambda p, s: ["--out", s, "--remove", "3"],
    "remove and compact": lambda p, s: ["--out", s, "--remove", "3", "--remove", "5", "--compact"],
    "remove and add": lambda p, s: [p, "--out", s, "--remove", "1", "--add", "--compact", "--radius", 3],
    "add": lambda p, s: [p, "--out", s, "--add", "--mirror"],
    "compact": lambda p, s: ["--out", s, "--compact"],
}


def contents(path):
    """Ids, radii and vectors, by id."""
    protected = ProtectedSet.open(path)
    protected.verify()
    vectors = protected.vectors(range(len(protected)))
    radii = [round(radius, 6) for radius in protected.radii.nan_to_num(-1).tolist()]
    return sorted(zip(protected.ids, radii, vectors.flatten(1).tolist(), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_repeated_after_kills_at_any_moment(pictures, tmp_path, monkeypatch, command):
    monkeypatch.setattr(job, "add_images", lambda *a, **k: add_images(*a, batch_size=3, **k))
    monkeypatch.setattr("shielded.protected.ingest.encoding._SAVE_SECONDS", 0.0)

    def prepared(name):
        target = tmp_path / name
        if command not in ("protect", "protect and compact"):
            run([pictures / "1.png", pictures / "3.png", pictures / "5.png", "--out", target, "--radius", 3])
        if command == "compact":
            ProtectedSet.open(target).remove(["3"])
        return target

    arguments = COMMANDS[command]
    whole = prepared("whole")
    run(arguments(pictures, whole))
    expected = contents(whole)
    for moment in [*range(8), *range(8, 60, 6), 1000]:
        target = prepared(f"set {moment}")
        finished = killed_at(monkeypatch, moment, arguments(pictures, target))
        if finished:
            break
        if (target / store.MANIFEST).exists():
            contents(target)
        killed_at(monkeypatch, moment // 2, arguments(pictures, target))  # and again while it is repeated
        run(arguments(pictures, target))
        assert contents(target) == expected
        if "compact" in command:
            assert not list(target.glob("*.removed.safetensors"))
    assert finished
    assert moment > 3


def test_the_vectors_of_a_removed_image_are_gone_after_the_rerun(pictures, tmp_path, monkeypatch):
    target = tmp_path / "set"
    run([pictures, "--out", target])
    gone = ProtectedSet.open(target).vectors([2]).half().numpy().tobytes()
    with monkeypatch.context() as patch:
        patch.setattr(ProtectedSet, "compact", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(["--out", target, "--remove", "2", "--compact"])
    assert any(gone in file.read_bytes() for file in target.glob("*.safetensors"))
    run(["--out", target, "--remove", "2", "--compact"])
    assert not any(gone in file.read_bytes() for file in target.glob("*.safetensors"))


@pytest.mark.parametrize("note", [b"", b'{"paths": ["x', b"\0" * 50, b"[]"])
def test_a_note_that_was_cut_off_does_not_stop_the_job(pictures, tmp_path, note):
    target = tmp_path / "set"
    run([pictures / "2.png", "--out", target, "--radius", 2])
    (target / store.UNFINISHED).write_bytes(note)
    run([pictures, "--out", target, "--radius", 2])
    assert len(ProtectedSet.open(target)) == 7
    assert not (target / store.UNFINISHED).exists()


def test_a_finished_job_is_repeated_only_if_nothing_else_changed_the_set(pictures, tmp_path):
    target = tmp_path / "set"
    run([pictures, "--out", target])
    run([pictures, "--out", target])
    run(["--out", target, "--remove", "2"])
    result = CliRunner().invoke(app, ["protect", str(pictures), "--out", str(target)])
    assert result.exit_code == 2  # it would bring back what was removed
    assert "2" not in ProtectedSet.open(target).ids


def test_an_empty_job_deletes_no_set_that_was_there(pictures, tmp_path):
    target = tmp_path / "set"
    run([pictures / "2.png", "--out", target])
    run(["--out", target, "--remove", "2"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["protect", str(tmp_path / "broken.png"), "--out", str(target), "--add"])
    assert result.exit_code == 1
    assert len(ProtectedSet.open(target).history) == 3


@pytest.mark.parametrize("order", ["same", "reversed", "overlapping"])
def test_two_processes_add_the_same_pictures(pictures, tmp_path, monkeypatch, order):
    """Threads with sets that they opened before either began, saving after every picture."""
    monkeypatch.setattr("shielded.protected.ingest.encoding._SAVE_SECONDS", 0.0)
    ProtectedSet.create(tmp_path / "set", SPACE)
    files = sorted(pictures.iterdir())
    given = {"same": [files, files], "reversed": [files, files[::-1]], "overlapping": [files[:5], files[3:]]}[order]
    opened = [ProtectedSet.open(tmp_path / "set") for _ in given]
    results, start = [None, None], threading.Barrier(2)

    def add(number):
        start.wait()
        results[number] = add_images(opened[number], given[number], 2.0, batch_size=1, space=SPACE, progress=False)

    threads = [threading.Thread(target=add, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.added + r.present for r in results] == [len(paths) for paths in given]
    assert sum(r.added for r in results) == 7
    protected = ProtectedSet.open(tmp_path / "set")
    assert sorted(protected.ids) == [str(number) for number in range(7)]
    protected.verify()


def test_two_processes_add_other_pictures_of_the_same_names(pictures, tmp_path):
    first = ProtectedSet.create(tmp_path / "set", SPACE)
    second = ProtectedSet.open(tmp_path / "set")
    assert add_images(first, pictures, space=SPACE, progress=False).added == 7
    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 9, 9)).save(other / f"{number}.png")
    (other / "4.png").write_bytes((pictures / "4.png").read_bytes())
    latents = SPACE.encode(torch.zeros(4, 3, 16, 16))
    from shielded.files import file_sha256

    digests = [file_sha256(path) for path in sorted(other.iterdir())]
    present = []
    second.add(latents, ["0", "1", "2", "4"], 1.0, ["x"] * 4, digests, present)
    assert present == [3]
    assert ProtectedSet.open(tmp_path / "set").ids == [*map(str, range(7)), "0-2", "1-2", "2-2"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_writer_that_waits_goes_on_when_the_other_is_killed(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    code = (
        "import sys\nfrom pathlib import Path\nfrom shielded.protected import store\n"
        "with store.writing(Path(sys.argv[1])):\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout.readline() == b"writing\n"
    killer = threading.Timer(0.1, other.kill)
    killer.start()
    protected.add(torch.zeros(1, 4, 2, 2), ["a"], None, [None], ["1" * 64], [])
    assert protected.ids == ["a"]
    other.communicate()
