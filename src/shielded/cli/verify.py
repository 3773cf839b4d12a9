"""shielded verify"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shielded.cli.options import AsJson, Debug, Device, Model, errors, positive, say_tiers, show, show_skipped
from shielded.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from shielded.certificates import Verified


def verify(
    paths: Annotated[list[str], typer.Argument(help="Image files, folders or globs.")],
    protect: Annotated[Path, typer.Option(metavar="SET", help="The protected set to measure against.")],
    model: Model = DEFAULT_MODEL,
    radius: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            callback=positive,
            help="Shield radius; default: the set's radii, or the certificate's.",
        ),
    ] = None,
    certified: Annotated[
        bool, typer.Option("--certified", metavar="", help="Fail on images without a certificate.")
    ] = False,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure images against a protected set, and check their certificates and audit log.

    Exit code 1 if an image lies inside a shield or is a copy, or a certificate or a log does not hold.

    Example: shielded verify images/with --protect my-set
    """
    with errors(debug):
        from shielded.certificates import verify_images
        from shielded.latent_space import LatentSpace
        from shielded.models import load
        from shielded.protected import ProtectedSet, load_images

        passed: Counter[str] = Counter()
        loaded, skipped = load_images(paths, strict=False, not_looked_at=passed)
        show_skipped(skipped, passed)
        if not loaded:
            raise ValueError("none of the images could be read.")
        protected = ProtectedSet.open(protect)
        say_tiers([protected])
        space = protected.space
        if space.pixel_range is None:  # pixels need no model
            space = LatentSpace.of(load(model, device), *(space.image_size or ()))
            protected.require_space(space)
        files = [(Path(source), image) for _, image, source, _ in loaded]
        verified, logs = verify_images(files, space, protected, radius)
        if certified:
            for image in verified:
                if not image.certified and not image.problems:
                    image.problems.append("it has no certificate")
        bad_logs = {path: problems for path, problems in logs.items() if problems}
        lines = []
        for image in verified:
            where = f"{'inside' if image.inside else 'outside'}, {image.distance:.2f} from {image.nearest_id}"
            lines.append(f"{image.image}: {where} (radius {image.radius:g}){_copy(image)}; {_finding(image)}")
        lines += [f"{path}: {'; '.join(problems) or 'holds'}" for path, problems in logs.items()]
        verdict = _verdict(verified, bad_logs, len(skipped))
        lines.append(verdict)
        result = {
            "verdict": verdict,
            "n": len(verified),
            "leaks": sum(image.inside for image in verified),
            "copies": sum(image.copy or False for image in verified),
            "failed_certificates": sum(bool(image.problems) for image in verified),
            "skipped": [path for path, _ in skipped],
            "not_looked_at": dict(passed),
            "images": [vars(image) for image in verified],
            "logs": logs,
        }
        show(result, as_json, "\n".join(lines))
        if result["leaks"] or result["copies"] or result["failed_certificates"] or bad_logs or skipped:
            raise typer.Exit(1)


def _copy(image: Verified) -> str:
    """Say how similar the descriptor finds the image to a protected one, if the set has a descriptor."""
    if image.copy_similarity is None:
        return ""
    verdict = {None: "most similar to", False: "no copy, most similar to", True: "a copy of"}[image.copy]
    return f"; {verdict} {image.copy_id} ({image.copy_similarity:.3f})"


def _finding(image: Verified) -> str:
    found = "; ".join(image.problems) or ("certificate holds" if image.certified else "no certificate")
    return f"{found}; not checked: {', '.join(image.not_checked)}" if image.not_checked else found


def _verdict(verified: list[Verified], bad_logs: dict[str, list[str]], skipped: int) -> str:
    """Write the line that ends the command's output."""
    from shielded.runs.report.summary import counted

    copies = sum(image.copy or False for image in verified)
    inside, failed = sum(image.inside for image in verified), sum(bool(image.problems) for image in verified)
    bare = sum(not image.certified for image in verified)
    partly = sum(bool(image.not_checked) for image in verified)
    faults = [
        f"{inside} inside a shield" if inside else "",
        f"{counted(copies, 'copy', 'copies')}" if copies else "",
        f"{failed} with a certificate or file that does not hold" if failed else "",
        f"{counted(len(bad_logs), 'audit log')} that does not hold" if bad_logs else "",
        f"{counted(skipped, 'file')} skipped" if skipped else "",
    ]
    notes = [f"{bare} without a certificate" if bare else "", f"{partly} not checked in full" if partly else ""]
    measured = f"{counted(len(verified), 'image')} measured"
    if any(faults):
        return f"Verdict: does not hold. Of {measured}: {', '.join(filter(None, [*faults, *notes]))}."
    if not bare:
        what = "all outside every shield, all certificates hold"
    else:
        what = "all outside every shield" + (", the certificates hold" if bare < len(verified) else "")
    return f"Verdict: holds. {measured}, {', '.join(filter(None, [what, *notes]))}."
