"""Help that fits a screen, and bad usage that is answered by one sentence and exit code 2."""

import re

import pytest
import typer
from typer.testing import CliRunner

from shielded.cli import app

COMMANDS = ["demo", "protect", "generate", "verify", "calibrate", "evaluate", "reproduce", "studio"]
WIDTH, LINES = 100, 30
SCREEN = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "NO_COLOR": "1"}
runner = CliRunner(env=SCREEN)


def test_these_are_all_commands():
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_fits_a_screen(command):
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: shielded {command}" in result.stdout
    lines = result.stdout.strip("\n ").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) <= LINES


def test_without_a_command_there_is_a_list_of_them():
    result = runner.invoke(app, [])
    assert all(command in result.output for command in COMMANDS)
    assert len(result.output.strip().splitlines()) <= LINES


BAD = {
    "demo": [["--radius", "-1"], ["--overcompensation", "0"], ["--out", "file"], ["--out", "full"]],
    "protect": [["--out", "set"], ["photos"], ["photos", "--out", "full"], ["photos", "--out", "set", "--radius", "0"]],
    "generate": [
        [],
        ["owl", "-n", "0"],
        ["owl", "--radius", "nan"],
        ["owl", "--out", "full"],
        ["owl", "--on-leak", "x"],
    ],
    "verify": [[], ["photos"], ["photos", "--protect", "set", "--radius", "-1"]],
    "calibrate": [["--false-alarms", "1"], ["--per-image"], ["--seeds", "0"], ["--radius", "0"], ["--out", "full"]],
    "evaluate": [[], ["photos"], ["photos", "photos", "-k", "0"]],
    "reproduce": [[], ["nothing"], ["diversity", "--prompts", "no-such.txt"], ["diversity", "--methods", "spell"]],
    "studio": [["--port", "0"], ["--port", "x"]],
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
    # Our own errors are a line; those of the parser stand in a box below the usage, some without a full stop.
    lines = [line.strip("│ ") for line in result.stderr.splitlines() if re.match(r"Error: |│", line)]
    assert 1 <= len(lines) <= 5
    assert re.fullmatch(r"[A-Z].{10,200}", " ".join(lines))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = runner.invoke(app, ["generate", "owl", "--model", "no-such-model", "--out", str(tmp_path / "out")])
    assert result.exit_code in (1, 2)
    assert "no-such-model" in result.stderr
    assert "emoji" in result.stderr
