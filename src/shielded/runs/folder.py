"""The folder of a run: finished images and the audit log at once, certificates and the report at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from shielded.certificates.audit import LOG, AuditLog, log_sha256, read_log
from shielded.certificates.certificate import attach_certificate, beside, certificate_sha256, file_sha256
from shielded.files import replacing, write_json
from shielded.generation import Generated
from shielded.protected import ProtectedSet, parts_of
from shielded.runs.report import Diversity, diversity_grid, protection_grid, write_report
from shielded.runs.report.rows import Row
from shielded.runs.results import PairReport
from shielded.runs.unfinished import Stage, Unfinished


class RunFolder:
    """Where a pair of runs writes its images, certificates, audit log and report.

    Args:
        path: the folder; files of an earlier run are replaced.
        write: whether this process writes. The other processes of `accelerate launch` write nothing.
        resume: whether the folder holds a stopped run that goes on.
    """

    def __init__(self, path: Path, write: bool = True, resume: bool = False) -> None:
        self.path = path
        self.without = path / "without"
        self.with_ = path / "with"
        self.resumed = resume
        self._write = write
        self._audit: AuditLog | None = None
        self._unfinished: Unfinished | None = None

    # While the run is under way -------------------------------------------------------------------------------------

    def start(self, request: dict[str, Any]) -> None:
        """Keep finished batches from now on, so that the run can go on after a stop.

        Args:
            request: everything that decides about the images, in JSON types.

        Raises:
            RequestError: the run that is to go on was another one.
        """
        if not self._write:
            return
        self._unfinished = Unfinished(self.path)
        if self.resumed:
            self._unfinished.require(request)
        else:
            self._unfinished.start(request)

    @property
    def how_to_go_on(self) -> str:
        """A sentence behind others on a stopped run; empty where it cannot go on."""
        return "" if self._unfinished is None else " The same command with --resume goes on with it."

    def kept(self, stage: Stage) -> list[tuple[Generated, list[dict[str, Any]]]]:
        """Read the batches that the stopped run had finished, with their traces."""
        return self._unfinished.batches(stage) if self._unfinished is not None and self.resumed else []

    def add(self, stage: Stage, made: Generated, names: Sequence[str], trace: Sequence[dict[str, Any]] = ()) -> None:
        """Write the images of a finished batch. Refused images are not handed out.

        Args:
            stage: folder to write to.
            made: the batch.
            names: of its files.
            trace: of the batch, for a run that goes on later.
        """
        if not self._write:
            return
        folder = self.with_ if stage == "with" else self.without
        folder.mkdir(parents=True, exist_ok=True)
        for i in made.kept:
            save_image(made.images[i], folder / names[i])
        if self._unfinished is not None:
            self._unfinished.add(stage, made, list(trace))

    def start_log(self, settings: dict[str, Any], protected: ProtectedSet | None) -> None:
        """Begin the audit log beside the images with SPELL.

        An earlier log is deleted with the images that it lists; that of a stopped run is kept, and the new one holds
        its digest.
        """
        if not self._write:
            return
        self.with_.mkdir(parents=True, exist_ok=True)
        log, earlier = self.with_ / LOG, None
        if not self.resumed:
            _delete_run(self.with_)
        elif log.is_file():
            earlier = log.with_name(f"{log.stem}-{len(_earlier_logs(self.with_)) + 1}{log.suffix}")
            log.replace(earlier)
        self._audit = AuditLog(log)
        sets = [] if protected is None else parts_of(protected)
        known = [{"set": str(one.path), "version": one.version} for one in sets]
        named = {"sets": known} if len(known) > 1 else known[0] if known else {}
        self._audit.append("start", **named, settings=settings)
        if earlier is not None:
            self._audit.append("resumed", earlier=earlier.name, earlier_sha256=log_sha256(earlier))

    def log(self, event: str, **content: Any) -> None:
        """Append a line to the audit log, if this process writes it."""
        if self._audit is not None:
            self._audit.append(event, **content)

    def abandon(self) -> None:
        """Delete what `start` and `start_log` wrote for a run that ends before a batch is finished.

        The same command can then be given again, and another one. A run that goes on with a stopped one keeps all.
        """
        if not self._write or self.resumed:
            return
        if self._audit is not None:
            (self.with_ / LOG).unlink(missing_ok=True)
            self._audit = None
        if self._unfinished is not None:
            self._unfinished.delete()
        for folder in (self.with_, self.path):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

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
        try:
            report = replace(report, rows=[self._certified(row) for row in report.rows])
        except FileNotFoundError as error:
            raise OSError(f"{error.filename} is gone: somebody changed {self.path} during the run.") from error
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
            finished = f"{len(report.rows)} of {report.requested} images are finished: {page}."
            report.stopped.add_note(finished + self.how_to_go_on)
            raise report.stopped
        if self._unfinished is not None:
            self._unfinished.delete()
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


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all."""
    with replacing(path) as draft:
        image.save(draft, format="PNG")


def _delete_run(folder: Path) -> None:
    """Delete the audit log of an earlier run, and the images and certificates that it lists."""
    if not (folder / LOG).is_file():
        return
    for log in _earlier_logs(folder):
        log.unlink()
    for record in read_log(folder / LOG)[0]:
        if record.get("event") == "certified":
            image = folder / Path(str(record.get("image"))).name
            image.unlink(missing_ok=True)
            beside(image).unlink(missing_ok=True)
    (folder / LOG).unlink()


def _earlier_logs(folder: Path) -> list[Path]:
    """List the logs of a run before it was stopped."""
    log = Path(LOG)
    return sorted(folder.glob(f"{log.stem}-*{log.suffix}"))
