"""shielded studio"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from shielded._extras import missing
from shielded.cli.options import Debug, Device, Models, UsageError, errors
from shielded.models import DEFAULT_MODEL


def studio(
    model: Models = None,
    protect: Annotated[
        list[Path] | None, typer.Option(metavar="SET", help="Protected set to choose on the page; may be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on; 127.0.0.1 is this machine alone.")
    ] = "127.0.0.1",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Generate, protect and compare on a page in the browser.

    Example: shielded studio --port 7860
    """
    with errors(debug):
        try:
            from shielded.studio import serve
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise UsageError(missing("The pages of the studio", "studio")) from None
        try:
            with socket.create_server((host, port)):
                pass
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error.strerror
            raise UsageError(f"{host}:{port} cannot be listened on: {reason}; give another --port.") from None
        serve(model or DEFAULT_MODEL, port, host, device, protect or ())
