"""`shielded check` and `shielded inspect`."""

import json

import pytest
import torch
from typer.testing import CliRunner

from shielded import LatentSpace, ProtectedSet
from shielded.cli import app

SPACE = LatentSpace((2, 3, 4))


@pytest.fixture
def target(tmp_path):
    protected = ProtectedSet.create(tmp_path / "set", SPACE)
    z = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    protected.add(z, list("abcde"), [1.0, 2.0, 3.0, 4.0, 5.0], [f"{name}/owl.png" for name in "abcde"])
    protected.add(z[:1] + 1, ["open"])
    protected.remove(["b"])
    return tmp_path / "set"


def run(command, *arguments, code=0):
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_an_intact_set(target):
    assert "version 4, 5 images in 2 shards; 5 files compared, 0 damaged." in run("check", target)
    (target / "notes.txt").write_text("mine")
    assert "notes.txt is no part of the set" in run("check", target)


@pytest.mark.parametrize("name", ["set.json", "history.jsonl", "000001.safetensors", "000003.removed.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_every_damaged_file_is_named_and_the_others_are_still_checked(target, name, damage):
    content = bytearray((target / name).read_bytes())
    content[len(content) // 2] ^= 1
    (target / name).write_bytes(content) if damage == "flip" else (target / name).unlink()
    second = target / "000002.safetensors"
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    found = json.loads(run("check", target, "--json", code=1))
    expected = {"set.json"} if name == "set.json" else {name, "000002.safetensors"}
    assert set(found["problems"]) == expected


def test_inspect(target):
    text = run("inspect", target)
    assert f"{target}: 5 images, version 4" in text
    assert "radii       1 to 5, 1 without one" in text
    assert "remove 1" in text
    assert "open" not in text.replace(str(target), "")
    listed = json.loads(run("inspect", target, "--list", "--json"))["listed"]
    assert [entry["id"] for entry in listed] == ["a", "c", "d", "e", "open"]
    assert listed[-1]["radius"] is None
    assert [row["id"] for row in json.loads(run("inspect", target, "--search", "D/OWL", "--json"))["listed"]] == ["d"]
