"""Read pictures out of tar archives: everything behind a damaged place too, and say what is damaged."""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NoReturn

from shielded.protected.ingest.contents import HEAD_BYTES, decompressed, kind_of, not_read, without_pictures
from shielded.protected.ingest.pictures import IMAGE_SUFFIXES, Passed, Picture

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


class _Header(tarfile.TarInfo):
    """A member's header, which notes in its archive what `tarfile` passes over in silence."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        archive: _Archive = tarfile
        try:
            member = super().fromtarfile(tarfile)
        except _EndMarker:
            archive.ended = True
            raise
        except _Truncated:
            archive.cut = True
            raise
        except _Invalid:
            archive.first_lost = archive.first_lost if archive.lost else archive.offset
            archive.lost += 1
            raise
        archive.ended = False
        return member


_EndMarker, _Truncated, _Invalid = (
    getattr(tarfile, f"{kind}HeaderError") for kind in ("EOF", "Truncated", "Invalid")
)  # not in the types of tarfile


class _Archive(tarfile.TarFile):
    """A tar archive that goes on behind damaged headers, and behind an end marker as joined archives have it."""

    tarinfo = _Header
    ended = cut = False
    lost = first_lost = 0

    def damage(self) -> str | None:
        """Say what was found to be damaged, after the last member."""
        if self.lost:
            return f"{self.lost} blocks cannot be read as headers, from byte {self.first_lost} on; their files are lost"
        if self.cut or not self.ended:
            return "its end marker is missing, so it may have been cut off"
        return None


def tar_pictures(name: str, path: str) -> Iterator[Picture]:
    """Yield the pictures of a tar archive (webdataset), one member after the other.

    Args:
        name: prefix of the pictures' names.
        path: the archive, compressed or not. What is damaged is a picture that cannot be read, at the end.
    """
    try:
        with _opened(path) as file, _Archive.open(fileobj=file, mode="r|", ignore_zeros=True) as tar:
            seen: set[str] = set()
            for member in _members(tar):
                seen.add(member.name)
                yield _picture(tar, member, name, path, seen)
            damage = tar.damage()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        damage = str(error) or type(error).__name__
    if damage is not None:
        yield Picture(name, path, partial(_fail, f"the archive is damaged: {damage}"))


def tar_files(path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of an archive whose names end so, in any case.

    Raises:
        ValueError: the archive is damaged.
    """
    try:
        with _opened(path) as file, _Archive.open(fileobj=file, mode="r|", ignore_zeros=True) as tar:
            for member in _members(tar):
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None and member.name.lower().endswith(suffixes):
                    yield member.name, content.read()
            damage = tar.damage()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        damage = str(error) or type(error).__name__
    if damage is not None:
        raise ValueError(f"{path} is damaged: {damage}.")


def count_tar_pictures(path: str) -> int | None:
    """Count the pictures of a tar archive; None if it would have to be decompressed, or is damaged."""
    try:
        with open(path, "rb") as file:
            if decompressed(path, file.read(8)) is not None:
                return None
            file.seek(0)
            with _Archive.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                number = sum(_picture(tar, member, "", "", set()).passed is None for member in _members(tar))
                return number if tar.damage() is None else None
    except (OSError, EOFError, tarfile.TarError, ValueError):
        return None  # reading it reports what is wrong


def _opened(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        head = file.read(8)
    return decompressed(path, head) or open(path, "rb")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        # tarfile remembers every member, a kilobyte each; its types do not name the list.
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if not member.isdir():
            yield member


def _picture(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, path: str, seen: set[str]) -> Picture:
    """Make a picture of a member; the file is read where it may be one."""
    source = f"{path}/{member.name}"
    picture = partial(Picture, f"{name}/{os.path.splitext(member.name)[0]}", source)
    if member.issym() or member.islnk():
        target = os.path.normpath(os.path.join(os.path.dirname(member.name) if member.issym() else "", member.linkname))
        known = target in seen
        return picture(
            _no_bytes, Passed("links to files of the archive" if known else "links out of an archive", known)
        )
    file = tar.extractfile(member) if member.isfile() else None
    if file is None:
        return picture(_no_bytes, Passed("pipes and devices", False))
    if member.name.lower().endswith(IMAGE_SUFFIXES):
        return picture(partial(bytes, file.read()))
    head = file.read(HEAD_BYTES)
    text = without_pictures(head)
    if text is not None:
        return picture(_no_bytes, Passed(text, True))
    reason = not_read(head) or ("a table in an archive; unpack it first" if kind_of(head) == "table" else None)
    return picture(partial(_fail, reason) if reason else partial(bytes, head + file.read()))


def _no_bytes() -> bytes:
    return b""


def _fail(reason: str) -> NoReturn:
    raise ValueError(reason)
