"""The command line, a file per command. Commands import what they need when they run, so that help is immediate."""

from __future__ import annotations

from typing import Annotated

import typer

from shielded import __version__
from shielded.cli import settings
from shielded.cli.calibrate import calibrate
from shielded.cli.demo import demo
from shielded.cli.evaluate import evaluate
from shielded.cli.generate import generate
from shielded.cli.protect import protect
from shielded.cli.reproduce import reproduce
from shielded.cli.studio import studio
from shielded.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes two thirds of the lines
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (demo, protect, generate, verify, calibrate, evaluate, reproduce, studio):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"shielded {__version__}")
        raise typer.Exit


@app.callback()
def program(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Keep diffusion models away from protected images, and make their outputs differ.

    Options that you use often can stand in a file, shielded.toml.
    """
    settings.used = None if context.resilient_parsing else settings.find()
    if settings.used is not None:
        try:
            defaults = settings.read(settings.used, context, getattr(context.command, "commands", {}))
        except settings.SettingsError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        context.default_map = defaults
        if not defaults.get(context.invoked_subcommand or ""):
            settings.used = None


def main() -> None:
    """Run the program."""
    app(prog_name="shielded")
