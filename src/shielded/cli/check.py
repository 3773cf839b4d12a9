"""shielded check"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shielded.cli.options import AsJson, Debug, errors, show


def check(
    protected: Annotated[Path, typer.Argument(metavar="SET", help="The protected set.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare every file of a protected set with its checksum: manifest, history, shards, descriptors and indexes.

    Exit code 1 if one is damaged or missing.

    Example: shielded check my-set
    """
    with errors(debug):
        from shielded.protected.check import check_set

        found = check_set(protected)
        result = vars(found) | {"problems": {name: str(error) for name, error in found.problems.items()}}
        lines = [
            f"{protected}: version {found.version}, {found.rows} images in {found.shards} shards; "
            f"{len(found.files)} files compared, {len(found.problems)} damaged."
        ]
        lines += [f"  {error}" for error in found.problems.values()]
        lines += [f"  {name} is no part of the set" for name in found.unknown]
        show(result, as_json, "\n".join(lines))
        if found.problems:
            raise typer.Exit(1)
