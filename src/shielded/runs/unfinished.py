"""What a run has finished, kept on disk until its report is written, so that a stopped run can go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from shielded._extras import RequestError
from shielded.files import replacing, write_json
from shielded.generation import Generated
from shielded.generation.packing import pack, unpack

Stage = Literal["without", "with"]


class Unfinished:
    """The finished batches of a run in the folder `unfinished` of its results.

    Args:
        out: folder of the results.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / "unfinished"

    @property
    def exists(self) -> bool:
        """Whether there is a run to go on with."""
        return (self._path / "request.json").is_file()

    def start(self, request: dict[str, Any]) -> None:
        """Begin a run; what another one has left is deleted.

        Args:
            request: everything that decides about its images, in JSON types.
        """
        self.delete()
        self._path.mkdir(parents=True, exist_ok=True)
        write_json(self._path / "request.json", request)

    def require(self, request: dict[str, Any]) -> None:
        """Refuse another request than that of the run.

        Raises:
            RequestError: naming what differs.
        """
        earlier = json.loads((self._path / "request.json").read_bytes())
        now = json.loads(json.dumps(request))
        names = sorted(name for name in {*earlier, *now} if earlier.get(name) != now.get(name))
        if names:
            raise RequestError(
                f"the run in {self._path.parent} was another one ({', '.join(names)} differ); repeat its command with "
                "--resume alone added, or give another --out."
            )

    def add(self, stage: Stage, made: Generated, trace: list[dict[str, Any]]) -> None:
        """Keep a finished batch and its trace."""
        number = len(list(self._path.glob(f"{stage}-*.safetensors")))
        with replacing(self._path / f"{stage}-{number:05d}.safetensors") as draft:
            draft.write_bytes(pack(made, trace=trace))

    def batches(self, stage: Stage) -> list[tuple[Generated, list[dict[str, Any]]]]:
        """Read the batches that `add` has kept, in their order."""
        kept = [unpack(path.read_bytes()) for path in sorted(self._path.glob(f"{stage}-*.safetensors"))]
        return [(made, more["trace"]) for made, more in kept]

    def delete(self) -> None:
        """Delete all of it."""
        if self._path.is_dir():
            shutil.rmtree(self._path)
