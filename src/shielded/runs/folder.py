"""The folder of a run: finished images and the audit log at once, certificates and the report at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from shielded.certificates.audit import LOG, AuditLog, read_log
from shielded.certificates.certificate import attach_certificate, beside, certificate_sha256, file_sha256
from shielded.files import replacing, write_json
from shielded.generation import Generated
from shielded.protected import ProtectedSet
from shielded.runs.report import Diversity, diversity_grid, protection_grid, write_report
from shielded.runs.report.rows import Row
from shielded.runs.results import PairReport


class RunFolder:
    """Where a pair of runs writes its images, certificates, audit log and report.

    Args:
        path: the folder; files of an earlier run are replaced.
        write: whether this process writes. The other processes of `accelerate launch` write nothing.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path = path
        self.without = path / "without"
        self.with_ = path / "with"
        self._write = write
        self._audit: AuditLog | None = None

    # While the run is under way -------------------------------------------------------------------------------------

    def add(self, folder: Path, made: Generated, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Write the images of a finished batch to `without` or `with_`. Refused images are not handed out."""
        if self._write:
            folder.mkdir(parents=True, exist_ok=True)
            for i in made.kept:
                save_image(made.images[i], folder / image_name(prompts[i], seeds[i]))

    def start_log(self, settings: dict[str, Any], protected: ProtectedSet | None) -> None:
        """Begin the audit log beside the images with SPELL. An earlier log is deleted with the images that it lists."""
        if not self._write:
            return
        self.with_.mkdir(parents=True, exist_ok=True)
        _delete_run(self.with_)
        self._audit = AuditLog(self.with_ / LOG)
        known = {} if protected is None else {"set": str(protected.path), "version": protected.version}
        self._audit.append("start", **known, settings=settings)

    def log(self, event: str, **content: Any) -> None:
        """Append a line to the audit log, if this process writes it."""
        if self._audit is not None:
            self._audit.append(event, **content)

    # When it has ended ----------------------------------------------------------------------------------------------

    def finish(
        self,
        report: PairReport,
        call: Mapping[str, Any],
        *,
        extra: Mapping[str, Any] | None = None,
        diversity: Diversity | None = None,
    ) -> dict[str, Any]:
        """Attach the certificates, close the audit log, and write grid, trace, `report.html` and `report.json`.

        Args:
            report: of the pair whose images `add` has written.
            call: keyword arguments of `Spell`, for the page.
            extra: further or other content of `report.json`.
            diversity: a batch without and with SPELL between its images, for a grid and the page.

        Returns:
            the content of `report.json`.

        Raises:
            BaseException: the exception that ended the run early, after all of this is written.
        """
        report = replace(report, rows=[self._certified(row) for row in report.rows])
        content = {**report.to_json(), "audit_log": {"file": f"with/{LOG}", "sha256": self._close_log(report)}}
        content |= extra or {}
        report.spell.write_trace(self.path / "trace.csv")
        shields = None if report.protected is None else report.radius
        save_image(protection_grid(report.rows, shields), self.path / "grid.png")
        if diversity is not None:
            save_image(diversity_grid(diversity), self.path / "diversity.png")
        page = self.path / "report.html"
        write_report(page, content, report.rows, diversity, report.spell.trace, call, report.settings)
        write_json(self.path / "report.json", content)
        if report.stopped is not None:
            report.stopped.add_note(f"{len(report.rows)} of {report.requested} images are finished: {page}")
            raise report.stopped
        return content

    def _certified(self, row: Row) -> Row:
        """Write a row's certificate into and beside its image, and note the digests of both image files."""
        before, after = row.certificate_without, row.certificate_with
        if before is not None:
            before = replace(before, sha256=file_sha256(self.without / before.image))
        if after is not None:
            after = attach_certificate(self.with_ / after.image, after)
            self.log(
                "certified",
                image=after.image,
                sha256=after.sha256,
                certificate_sha256=certificate_sha256(after),
                inside=after.inside,
            )
        return replace(row, certificate_without=before, certificate_with=after)

    def _close_log(self, report: PairReport) -> str:
        assert self._audit is not None, "start_log comes before finish"
        for entry in report.to_json()["refused"]:
            self.log("refused", **entry)
        self._audit.close()
        return self._audit.sha256


def image_name(prompt: str, seed: int) -> str:
    """Name the file of an image by the words of its prompt and its seed.

    >>> image_name("a red apple, ripe", 3)
    'a-red-apple-ripe-3.png'
    """
    words = "".join(c if c.isalnum() else " " for c in prompt).split()
    return f"{'-'.join(words)[:60] or 'image'}-{seed}.png"


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with replacing(path) as draft:
        image.save(draft, format="PNG")


def _delete_run(folder: Path) -> None:
    """Delete the audit log of an earlier run, and the images and certificates that it lists."""
    if not (folder / LOG).is_file():
        return
    for record in read_log(folder / LOG)[0]:
        if record.get("event") == "certified":
            image = folder / Path(str(record.get("image"))).name
            image.unlink(missing_ok=True)
            beside(image).unlink(missing_ok=True)
    (folder / LOG).unlink()
