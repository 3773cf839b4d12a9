"""shielded.toml: options that need not be typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from shielded.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder, and an empty folder for the user's configuration beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(typer, "get_app_dir", lambda name: str(tmp_path / "config"))


def asked(*arguments):
    """What a run would be asked for."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shielded.runs.job.run", lambda *given, **named: calls.append((given, named)))
        result = runner.invoke(app, ["generate", "owl", *arguments])
    assert result.exit_code == 0, result.output
    (out, _, seeds, call), named = calls[0]
    return {"out": out, "n": len(seeds), "seed": seeds[0], "steps": call.steps, **named}


def write(text, path="shielded.toml"):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def test_the_command_line_counts_before_the_command_before_all_commands():
    write(
        'steps = 9\nradius = 3\nseed = 5\non-leak = "push"\n[generate]\nn = 7\nradius = 12.5\n[calibrate]\nseeds = 2\n'
    )
    found = asked("--seed", "6")
    assert (found["steps"], found["n"], found["radius"], found["seed"]) == (9, 7, 12.5, 6)
    assert found["on_leak"] == "push"
    assert found["out"] == Path("images")


def test_the_example_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    write(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    found = asked()
    assert (found["steps"], found["n"], found["radius"], found["on_leak"]) == (30, 8, 12.5, "push")


def test_flags_and_options_with_a_short_name_alone():
    write("[generate]\nn = 2\njson = true\n")
    assert (asked()["n"], asked()["progress"]) == (2, False)


def test_the_file_of_the_working_folder_counts_alone(tmp_path):
    write("steps = 4\nseed = 3\n", tmp_path / "config" / "shielded.toml")
    assert (asked()["steps"], asked()["seed"]) == (4, 3)
    write("steps = 5\n")
    assert (asked()["steps"], asked()["seed"]) == (5, 0)


def test_a_required_option_may_come_from_it():
    write('[protect]\nout = "set"\n')
    result = runner.invoke(app, ["protect", "nowhere"])
    assert "No images at nowhere" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 9\nsteps = 8", "cannot be read as TOML"),
        ("step = 9", "there is no option 'step'; did you mean 'steps'?"),
        ("on_leak = 'push'", "did you mean 'on-leak'?"),
        ("wonder = 9", "called as on the command line"),
        ("[generte]\nn = 2", "there is no command 'generte'; did you mean 'generate'?"),
        ("[verify]\nn = 2", "verify has no option 'n'"),
        ("steps = 'many'", "steps = 'many' does not work"),
        ("steps = 2.5", "steps = 2.5 does not work"),
        ("steps = 0", "steps = 0 does not work"),
        ("steps = true", "steps takes a number or text, not True"),
        ("steps = [1, 2]", "steps takes a number or text"),
        ("radius = -1", "must be positive and finite"),
        ("json = 1", "true and false, not 1"),
        ("model = 'none'", "unknown model 'none'"),
        ("overwrite = true", "give it on the command line"),
        ("[protect]\nremove = ['a']", "give it on the command line"),
    ],
)
def test_what_is_wrong_with_it_is_a_sentence(text, message):
    write(text)
    result = runner.invoke(app, ["generate", "owl"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: shielded.toml")
    assert result.stderr.count("\n") == 1


def test_an_error_of_options_that_were_not_typed_names_the_file():
    write("[calibrate]\nfalse-alarms = 2\n")
    assert "come from shielded.toml" in runner.invoke(app, ["calibrate"]).stderr
    write("")
    result = runner.invoke(app, ["calibrate", "--false-alarms", "2"])
    assert result.exit_code == 2
    assert "come from" not in result.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [("gen", "generate"), ("generate --guid", "--guidance"), ("generate x --on-leak re", "restart"), ("", "studio")],
)
def test_completion(words, completed):
    """What bash is told to complete; also where there is a broken settings file."""
    write("broken")
    whole = f"shielded {words}"
    environment = {"_SHIELDED_COMPLETE": "complete_bash", "COMP_WORDS": whole, "COMP_CWORD": str(whole.count(" "))}
    program = [sys.executable, "-m", "shielded"]
    result = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True)
    assert completed in result.stdout.split()


def test_completion_can_be_installed(tmp_path):
    # The shell is named and not looked for among the parents of a process that may have none.
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    program = [sys.executable, "-m", "shielded"]
    shown = subprocess.run([*program, "--show-completion", "bash"], env=environment, capture_output=True, text=True)
    assert "complete -o default -F _shielded_completion shielded" in shown.stdout
    done = subprocess.run([*program, "--install-completion", "bash"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any("_shielded_completion" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
