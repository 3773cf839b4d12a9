"""The command `shielded`, also as `python -m shielded`."""

from __future__ import annotations

import sys

from shielded._extras import missing


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from shielded.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "typer"):
            raise
        sys.exit(missing("Commands", "cli"))
    run()


if __name__ == "__main__":
    main()
