"""Help that fits a screen, and bad usage that is answered by one sentence and exit code 2."""

import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import shielded
from shielded.cli import app

COMMANDS = ["demo", "protect", "inspect", "check", "generate", "verify", "calibrate", "evaluate", "reproduce", "studio"]
WIDTH, LINES = 100, 30
runner = CliRunner()


def test_these_are_all_commands():
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_fits_a_screen(command):
    result = runner.invoke(app, [command, "--help"], terminal_width=WIDTH - 2)  # the margin that click leaves
    assert result.exit_code == 0
    assert f"Example: shielded {command}" in result.stdout
    lines = result.stdout.strip("\n ").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= LINES


def test_without_a_command_there_is_a_list_of_them():
    result = runner.invoke(app, [], terminal_width=WIDTH)
    assert all(command in result.output for command in COMMANDS)
    assert len(result.output.strip().splitlines()) <= LINES


def test_the_version_is_printed_without_torch():
    code = (
        "import sys\nfrom shielded.cli import app\n"
        "try:\n    app(['--version'])\nfinally:\n    print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"shielded {shielded.__version__}", "False"]


@pytest.mark.parametrize("line", ["", "gen", "generate --model no-such-model --de", "studio --device cpu --p"])
def test_a_line_is_completed_without_torch(line):
    code = "import sys\nfrom shielded.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    words = f"shielded {line}"
    asked = {"_SHIELDED_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    *found, torch_is_loaded = result.stdout.splitlines()
    assert found
    assert all(word.startswith(line.split(" ")[-1]) for word in found)
    assert torch_is_loaded == "False"


BAD = {
    "inspect": [[], ["photos"], ["nowhere"]],
    "check": [[], ["photos"], ["nowhere"]],
    "demo": [
        ["--device", "tpu"],
        ["--seed", "-1"],
        ["--radius", "-1"],
        ["--overcompensation", "0"],
        ["--out", "file"],
        ["--out", "full"],
    ],
    "protect": [["--out", "set"], ["photos"], ["photos", "--out", "full"], ["photos", "--out", "set", "--radius", "0"]],
    "generate": [
        [],
        ["owl", "-n", "0"],
        ["owl", "--radius", "nan"],
        ["owl", "--out", "full"],
        ["owl", "--on-leak", "x"],
        ["owl", "--guidance", "-1"],
        ["owl", "--radius-schedule", "x"],
        ["owl", "--calibration", "file"],
        ["owl", "--show-protected"],
        ["owl", "--model", "photos"],
        ["owl", "--model", "no-such-model"],
    ],
    "verify": [[], ["photos"], ["photos", "--protect", "set"], ["photos", "--protect", "set", "--radius", "-1"]],
    "calibrate": [["--false-alarms", "1"], ["--per-image"], ["--seeds", "0"], ["--radius", "0"], ["--out", "full"]],
    "evaluate": [[], ["photos"], ["photos", "photos", "-k", "0"], ["photos", "photos", "--features", "x"]],
    "reproduce": [
        [],
        ["nothing"],
        ["diversity", "--prompts", "no-such.txt"],
        ["diversity", "--methods", "spell"],
        ["diversity", "--features", "x"],
    ],
    "studio": [
        ["--protect", "nowhere"],
        ["--port", "0"],
        ["--port", "x"],
        ["--model", "no-such-model"],
        ["--host", "192.0.2.1"],
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(command, arguments) for command in BAD for arguments in [*BAD[command], ["--no-such-option"]]],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_bad_usage_is_answered_by_one_sentence(command, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("something")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("something")
    (tmp_path / "photos").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = runner.invoke(app, [command, *arguments])
    assert result.exit_code == 2
    assert not result.stdout
    assert "Traceback" not in result.stderr
    # Our own errors are a line; those of the parser stand below the usage, and some end with a list of what there is.
    usage, _, message = result.stderr.partition("Error: ")
    assert not usage or usage.startswith("Usage: ")
    assert re.fullmatch(r"[A-Za-z\d-].{10,450}(\n\t.*)*\n", message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_by_help_all(command):
    short = runner.invoke(app, [command, "--help"], terminal_width=WIDTH).stdout
    whole = runner.invoke(app, [command, "--help-all"], terminal_width=WIDTH)
    assert whole.exit_code == 0
    for parameter in typer.main.get_command(app).commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[-1] in short
            assert re.search(rf"^ +{parameter.opts[-1]}\b.*  \S", whole.stdout, re.MULTILINE)
