"""The command line, a file per command. Commands import what they need when they run, so that help is immediate."""

from __future__ import annotations

import typer

from shielded.cli.calibrate import calibrate
from shielded.cli.demo import demo
from shielded.cli.evaluate import evaluate
from shielded.cli.generate import generate
from shielded.cli.protect import protect
from shielded.cli.reproduce import reproduce
from shielded.cli.studio import studio
from shielded.cli.verify import verify

app = typer.Typer(
    help="Keep diffusion models away from protected images, and make their outputs differ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, protect, generate, verify, calibrate, evaluate, reproduce, studio):
    app.command()(command)


def main() -> None:
    app(prog_name="shielded")
