"""Defaults of options from a TOML file; the command line takes precedence."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from shielded.cli.command import sentence

NAME = "shielded.toml"
_COMMAND_LINE_ONLY = {"help", "overwrite", "remove", "compact"}  # deletions are confirmed for each run

used: Path | None = None  # file that gave defaults to the running command


class SettingsError(ValueError):
    """Settings file with unknown names or unusable values."""


def find() -> Path | None:
    """Find the settings file in the working folder, else in the user's configuration folder."""
    folders = Path(), Path(typer.get_app_dir("shielded"))
    return next((folder / NAME for folder in folders if (folder / NAME).is_file()), None)


def read_settings(path: Path, context: typer.Context, commands: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Read the defaults of each command.

    Options outside of tables apply to every command that has them; a table with a command's name applies to it alone.

    Args:
        path: TOML file.
        context: context of the program.
        commands: commands by name.

    Returns:
        A dictionary per command, as `Context.default_map` takes it.

    Raises:
        SettingsError: the file is not TOML, has unknown names, or a value that the option refuses.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{path} cannot be read as TOML: {error}.") from None
    known = {name: _options(command) for name, command in commands.items()}
    everywhere = {key: value for key, value in content.items() if not isinstance(value, dict)}
    everybody = {key for options in known.values() for key in options}
    for key in everywhere:
        if key not in everybody:
            raise SettingsError(f"{path}: there is no option {key!r}{_meant(key, everybody)}")
    for name in content.keys() - everywhere.keys() - known.keys():
        raise SettingsError(f"{path}: there is no command {name!r}{_meant(name, known)}")
    result: dict[str, dict[str, Any]] = {}
    for name, options in known.items():
        given = {key: value for key, value in everywhere.items() if key in options}
        for key, value in content.get(name, {}).items():
            if key not in options:
                raise SettingsError(f"{path}: {name} has no option {key!r}{_meant(key, options)}")
            given[key] = value
        result[name] = {options[key].name: _checked(path, context, options[key], key, given[key]) for key in given}
    return result


def _options(command: Any) -> dict[str, Any]:
    """Map the options of a command by their long name, else the short one, without dashes."""
    options = {}
    for parameter in command.params:
        name = max(parameter.opts, key=len).lstrip("-")
        if parameter.param_type_name == "option" and name not in _COMMAND_LINE_ONLY:
            options[name] = parameter
    return options


def _meant(given: str, known: Iterable[str]) -> str:
    if given in _COMMAND_LINE_ONLY:
        return "; give it on the command line."
    close = difflib.get_close_matches(given.replace("_", "-"), sorted(known), 1)
    return f"; did you mean {close[0]!r}?" if close else "; options are called as on the command line, without dashes."


def _checked(path: Path, context: typer.Context, option: Any, key: str, value: Any) -> Any:
    """Return the value as the command line would give it."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise SettingsError(f"{path}: {key} is switched on and off by true and false, not {value!r}.")
        return value
    values = value if option.multiple and isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise SettingsError(f"{path}: {key} takes a number or text, not {value!r}.")
    typed = [str(one) for one in values]
    result = typed if option.multiple else typed[0]
    try:
        option.process_value(context, result)
    except typer.BadParameter as error:
        raise SettingsError(f"{path}: {key} = {value!r} does not work: {sentence(error)}.") from None
    return result
