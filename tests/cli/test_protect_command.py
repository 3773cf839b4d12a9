"""`shielded protect` as a user calls it, and what is left of it after a kill."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.in_pixels import replace_models
from shielded.cli import app
from shielded.protected import ProtectedSet, store
from shielded.protected.ingest import encoding, job

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, ["protect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "set"


def test_add_remove_and_compact(pictures, target):
    first = run_json(pictures / "a.png", "--out", target, "--radius", 8)
    assert first == {
        "set": str(target), "size": 1, "version": 2, "removed": 0, "added": 1, "present": 0, "skipped": [],
        "found": 1, "new": 1, "not_looked_at": {}, "radius": 8.0,
    }  # fmt: skip
    second = run_json(pictures, "--out", target, "--add", "--radius", 9, "--mirror")
    assert (second["added"], second["present"], second["size"]) == (5, 0, 6)
    protected = ProtectedSet.open(target)
    assert protected.ids == ["a", "mirrored:a", "b", "mirrored:b", "c", "mirrored:c"]
    assert protected.radii.tolist() == [8.0] + [9.0] * 5
    x = protected.vectors([2])
    gone = x.half().numpy().tobytes()
    assert protected.nearest(x)[1] == [["b"]]

    assert run_json("--out", target, "--remove", "b")["removed"] == 1
    protected = ProtectedSet.open(target)
    assert protected.ids == ["a", "mirrored:a", "c", "mirrored:c"]
    assert protected.nearest(x)[1] != [["b"]]
    assert len(protected.within(x, 1e-3)) == 0
    assert [(event["action"], event.get("ids")) for event in protected.history] == [
        ("create", None),
        ("add", None),
        ("add", None),
        ("remove", ["b", "mirrored:b"]),
    ]
    assert ProtectedSet.open(target, version=3).nearest(x)[1] == [["b"]]
    assert any(gone in file.read_bytes() for file in target.iterdir())
    assert "4 in all" in run("--out", target, "--compact").stdout
    assert not any(gone in file.read_bytes() for file in target.iterdir())
    assert ProtectedSet.open(target).verify()["rows"] == 4


def test_everything_in_one_call(pictures, target):
    run(pictures / "a.png", "--out", target)
    result = run_json(pictures / "b.png", "--out", target, "--remove", "a", "--add", "--compact")
    assert (result["added"], result["removed"], result["size"]) == (1, 1, 1)
    assert ProtectedSet.open(target).ids == ["b"]


def test_latents_are_stored_as_float16(pictures, target):
    run(pictures, "--out", target)
    vectors = ProtectedSet.open(target).vectors(range(3))
    assert torch.equal(vectors, vectors.half().float())


def test_what_cannot_be_read_is_in_a_table(pictures, target):
    for number in range(images_shown := 25):
        (pictures / f"x{number:02d}.png").write_bytes(b"no picture")
    result = run(pictures, "--out", target)
    table = [line.split(maxsplit=1) for line in result.stderr.splitlines() if ".png" in line]
    assert [path for path, _ in table] == [str(pictures / f"x{number:02d}.png") for number in range(20)]
    assert all(reason == "not a picture that can be read" for _, reason in table)
    assert f"{images_shown} could not be read" in result.stderr
    assert "5 more; --json names all" in result.stderr
    assert "3 added, 0 already present, 25 skipped" in result.stdout
    assert len(run_json(pictures, "--out", target, "--add")["skipped"]) == 25
    strict = run(pictures, "--out", target, "--add", "--strict", code=1)
    assert "x00.png cannot be decoded" in strict.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "new"], 2, "nothing to do"),
        (["nowhere", "--out", "new"], 2, "No images at nowhere"),
        (["@nowhere", "--out", "new"], 2, "nowhere"),
        (["pictures", "--out", "new", "--radius", "0"], 2, "must be positive"),
        (["pictures", "--out", "pictures"], 2, "something else"),
        (["pictures", "--out", "pictures/a.png"], 2, "something else"),
        (["pictures", "--out", "set"], 2, "--add"),
        (["--out", "new", "--remove", "a"], 2, "no protected set at new"),
        (["--out", "set", "--remove", "nobody"], 2, "has no 'nobody'"),
        (["--out", "new", "--compact"], 2, "no protected set at new"),
        (["empty", "--out", "new"], 1, "none of the images could be read"),
    ],
)
def test_what_goes_wrong_is_a_sentence(pictures, target, monkeypatch, arguments, code, message):
    monkeypatch.chdir(target.parent)
    run(pictures / "a.png", "--out", "set")
    (target.parent / "empty").mkdir()
    (target.parent / "empty" / "x.png").touch()
    before = {file: file.read_bytes() for file in target.iterdir()}
    result = run(*arguments, code=code)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not result.stderr.strip().endswith('"')
    assert {file: file.read_bytes() for file in target.iterdir()} == before


def test_a_foreign_set_and_a_damaged_one(pictures, target, tmp_path):
    from shielded import LatentSpace

    ProtectedSet.create(target, LatentSpace((4, 9, 9)))
    assert "another latent space" in run(pictures, "--out", target, "--add", code=2).stderr
    (target / "set.json").write_bytes(b"{}")
    assert "is damaged" in run(pictures, "--out", target, "--add", code=1).stderr


def test_added_images_have_a_radius_if_the_others_have_one(pictures, target, tmp_path):
    run(pictures / "a.png", "--out", target, "--radius", 8)
    assert "New images get the radius 8" in run(pictures / "b.png", "--out", target, "--add").stderr
    assert ProtectedSet.open(target).radii.tolist() == [8.0, 8.0]
    run(pictures / "c.png", "--out", target, "--add", "--radius", 9)
    assert "give one for the new" in run(pictures, "--out", target, "--add", code=2).stderr
    run(pictures / "a.png", "--out", tmp_path / "open")
    assert "leave out --radius" in run(pictures, "--out", tmp_path / "open", "--add", "--radius", 8, code=2).stderr
    run(pictures, "--out", tmp_path / "open", "--add")
    assert ProtectedSet.open(tmp_path / "open").radii.isnan().all()


def test_overwrite(pictures, target):
    run(pictures, "--out", target)
    run(pictures / "c.png", "--out", target, "--overwrite")
    assert ProtectedSet.open(target).ids == ["c"]


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(pictures, target, monkeypatch):
    unique = encoding.unique_name

    def interrupted(name, taken):
        if name == "c":
            raise KeyboardInterrupt
        return unique(name, taken)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "unique_name", interrupted)
        patch.setattr(job, "add_images", partial(encoding.add_images, batch_size=1))
        stopped = run(pictures, "--out", target, code=1)
    assert "2 new images are in" in stopped.stderr
    assert "the same command goes on" in stopped.stderr
    assert ProtectedSet.open(target).ids == ["a", "b"]
    run(pictures / "a.png", "--out", target, code=2)  # another job does not slip in
    assert "1 added, 2 already present" in run(pictures, "--out", target).stdout
    assert "0 added, 3 already present" in run(pictures, "--out", target).stdout  # finished, so nothing is left to do
    run(pictures / "a.png", "--out", target, code=2)


PAUSED = """
import sys
from functools import partial
import os
from helpers.in_pixels import replace_models
from shielded.cli import main
from shielded.protected import store
from shielded.protected.ingest import encoding, job

replace_models()
encoding._SAVE_SECONDS = 0
job.add_images = partial(encoding.add_images, batch_size=4)
rename, left = os.replace, int(sys.argv.pop(1))

def paused(temporary, path):
    global left
    left -= not str(path).endswith(store.UNFINISHED)
    if not left:
        print("paused", flush=True)
        sys.stdin.read()
    rename(temporary, path)

os.replace = paused
main()
"""


@pytest.mark.parametrize(("renames", "version"), [(4, 2), (5, 2)], ids=["shard", "manifest"])
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_kill_9_in_the_middle(tmp_path, monkeypatch, renames, version):
    """Killed before a file takes its name; the same command then makes the same set, to the last bit."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"broken")
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes())
    replace_models(monkeypatch.setattr)  # another process need not load one
    monkeypatch.setattr(job, "add_images", partial(encoding.add_images, batch_size=4))
    run(folder, "--out", tmp_path / "whole", "--radius", 5, "--mirror")

    target = tmp_path / "set"
    command = ["protect", str(folder), "--out", str(target), "--radius", "5", "--mirror"]
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, str(renames), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"paused\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()

    seen = ProtectedSet.open(target)
    assert seen.verify()["version"] == seen.version == version
    assert len(seen) == 4
    assert list(target.glob("*.tmp"))
    run(*command[1:])
    whole, resumed = ProtectedSet.open(tmp_path / "whole"), ProtectedSet.open(target)
    assert len(whole) == 14
    assert resumed.ids == whole.ids
    assert resumed.sources == whole.sources
    assert resumed.sha256 == whole.sha256
    assert torch.equal(resumed.radii, whole.radii)
    assert torch.equal(resumed.vectors(range(14)), whole.vectors(range(14)))
    resumed.verify()
    resumed.compact()
    assert not list(target.glob("*.tmp"))
    assert not (target / store.UNFINISHED).exists()


def test_a_copy_threshold_is_kept_in_the_set(pictures, target):
    made = run(pictures, "--out", target, "--descriptor", "shielded")
    own = ProtectedSet.open(target).copy_threshold
    assert f"copies from a similarity of {own:g} on; `shielded calibrate` suggests" in made.stdout
    changed = run_json("--out", target, "--copy-threshold", 0.75)
    assert (changed["copy_threshold"], changed["size"], changed["version"]) == (0.75, 3, 3)
    assert run_json("--out", target, "--copy-threshold", 0.75)["version"] == 3  # nothing to change
    assert ProtectedSet.open(target).copy_threshold == 0.75
    assert ProtectedSet.open(target, version=2).copy_threshold == own
    run_json(pictures, "--out", target, "--overwrite", "--descriptor", "shielded", "--copy-threshold", 0.8)
    assert ProtectedSet.open(target).copy_threshold == 0.8


def test_a_copy_threshold_that_cannot_be_is_refused_before_anything_is_encoded(pictures, target):
    run(pictures / "a.png", "--out", target)
    for value, why in ((1.5, "between -1 and 1"), ("near", "takes a number"), (0.9, "has no descriptor")):
        result = run(pictures, "--out", target, "--add", "--copy-threshold", value, code=2)
        assert why in result.stderr.replace("\n", " ")
    assert len(ProtectedSet.open(target)) == 1
    new = run(pictures, "--out", target.with_name("new"), "--copy-threshold", 0.9, code=2)
    assert "--descriptor shielded" in new.stderr.replace("\n", " ")
    assert not target.with_name("new").exists()


def test_compact_says_what_it_deleted(pictures, target):
    run(pictures, "--out", target)
    assert "Deleted" not in run("--out", target, "--remove", "b").stdout
    result = run_json("--out", target, "--compact")
    assert (result["deleted"], result["removed"], result["size"]) == (1, 0, 2)
    assert "Deleted from disk: 0 removed images." in run("--out", target, "--compact").stdout
    assert "Deleted from disk: 1 removed image (" in run("--out", target, "--remove", "a", "--compact").stdout


def test_the_id_that_stands_for_a_duplicate_is_named(pictures, target):
    (pictures / "twin.png").write_bytes((pictures / "b.png").read_bytes())
    first = run_json(pictures, "--out", target)
    assert [first[name] for name in ("found", "new", "present", "added")] == [4, 3, 1, 3]
    again = run_json(pictures, "--out", target, "--add")
    assert [again[name] for name in ("found", "new", "present", "added")] == [4, 0, 4, 0]
    for name in ("twin", pictures / "twin.png"):
        error = run("--out", target, "--remove", name, code=2).stderr
        assert f"{name} has the same content as b, which stands for both; --remove b." in error
    assert ProtectedSet.open(target).ids == ["a", "b", "c"]


def test_the_grid_of_a_run_is_no_picture_of_it(pictures, target):
    run_folder = pictures.parent / "run"
    for side in ("without", "with"):
        (run_folder / side).mkdir(parents=True)
    for name, source in (("without/owl-0.png", "a"), ("with/owl-0.png", "b"), ("grid.png", "c")):
        (run_folder / name).write_bytes((pictures / f"{source}.png").read_bytes())
    (run_folder / "report.json").write_text("{}")
    result = run_json(run_folder, "--out", target)
    assert (result["found"], result["added"]) == (2, 2)
    assert result["not_looked_at"]["picture grids of a run"] == 1
    assert "grid" not in ProtectedSet.open(target).ids
    (pictures / "grid.png").write_bytes((pictures / "c.png").read_bytes() + b" ")
    assert "grid" in ProtectedSet.open(target).ids or run_json(pictures, "--out", target, "--add")["added"] == 2
