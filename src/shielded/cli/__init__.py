"""Command line, one module per command; commands import their dependencies when they run, to keep help fast."""

from __future__ import annotations

from typing import Annotated

import typer

from shielded import __version__
from shielded.cli import (
    calibrate,
    check,
    demo,
    evaluate,
    generate,
    inspect,
    protect,
    reproduce,
    settings,
    studio,
    verify,
)
from shielded.cli.command import Command, Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help takes two thirds of the lines
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for command in (
    demo.demo,
    protect.protect,
    inspect.inspect,
    check.check,
    generate.generate,
    verify.verify,
    calibrate.calibrate,
    evaluate.evaluate,
    reproduce.reproduce,
    studio.studio,
):
    app.command(cls=Command)(command)


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

    Set defaults for options in a file, shielded.toml.
    """
    settings.used = None if context.resilient_parsing else settings.find()
    if settings.used is not None:
        try:
            defaults = settings.read_settings(settings.used, context, getattr(context.command, "commands", {}))
        except settings.SettingsError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        context.default_map = defaults
        if not defaults.get(context.invoked_subcommand or ""):
            settings.used = None


def main() -> None:
    """Run the program."""
    app(prog_name="shielded")
