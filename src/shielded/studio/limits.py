"""What one session and the whole server may hold, and whom the server answers."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MEGABYTE = 1 << 20
NAMES = {
    "pixels": "million pixels decoded",
    "pictures": "protected pictures",
    "files": "files uploaded",
    "disk": "megabytes on disk",
}
UNITS = {"pixels": 1_000_000, "pictures": 1, "files": 1, "disk": MEGABYTE}
PER_SESSION = {"pixels": 2_000_000_000, "pictures": 512, "files": 1024, "disk": 512 * MEGABYTE}
PER_SERVER = {"pixels": 50_000_000_000, "pictures": 8192, "files": 65536, "disk": 4096 * MEGABYTE}
MOST_SESSIONS = 64
MOST_UPLOAD_BYTES = 256 * MEGABYTE  # waiting in the upload folder, of all visitors


class Server:
    """Counts what all sessions of a server hold.

    Args:
        per_session: limit of each of `NAMES` for one session.
        per_server: limit for all of them together.
    """

    def __init__(self, per_session: dict[str, int] | None = None, per_server: dict[str, int] | None = None) -> None:
        self.per_session = {**PER_SESSION, **(per_session or {})}
        self.per_server = {**PER_SERVER, **(per_server or {})}
        self.decoding = threading.Lock()  # one upload is decoded at a time
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()
        self._sessions = 0

    def open(self) -> Usage:
        """Count a new session.

        Raises:
            ValueError: there are too many.
        """
        with self._lock:
            if self._sessions >= MOST_SESSIONS:
                raise ValueError(f"{MOST_SESSIONS} visitors are here already, which is all that fit; come back later.")
            self._sessions += 1
        return Usage(self)

    def change(self, own: Counter[str], what: str, amount: int) -> None:
        """Add to what a session and the server hold, or take from it."""
        with self._lock:
            for held, limit, whose in (
                (own[what], self.per_session[what], "this session"),
                (self._held[what], self.per_server[what], "this server"),
            ):
                if amount > 0 and held + amount > limit:
                    raise ValueError(
                        f"{limit // UNITS[what]} {NAMES[what]} are the most that {whose} takes; protect nothing, or "
                        "open a new session, to start again."
                    )
            own[what] += amount
            self._held[what] += amount

    def close(self, own: Counter[str]) -> None:
        """Forget a session."""
        with self._lock:
            self._held.subtract(own)
            self._sessions -= 1
        own.clear()


class Usage:
    """What one session holds."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._held: Counter[str] = Counter()
        self._open = True

    def take(self, what: str, amount: int) -> None:
        """Hold more.

        Raises:
            ValueError: that is more than the session or the server may hold; nothing is taken.
        """
        self.server.change(self._held, what, amount)

    def set(self, what: str, amount: int) -> None:
        """Hold exactly so much.

        Raises:
            ValueError: that is more than the session or the server may hold.
        """
        self.server.change(self._held, what, amount - self._held[what])

    def close(self) -> None:
        """Give everything back; once."""
        if self._open:
            self._open = False
            self.server.close(self._held)


def folder_bytes(folder: Path) -> int:
    """Add up the sizes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Whom the server answers ----------------------------------------------------------------------------------------------


class OwnHostOnly:
    """ASGI middleware: refuse requests for other hosts (DNS rebinding), from pages of other origins, or too large.

    Args:
        app: what answers the others.
        host: address that the server listens on.
        port: its port.
        uploads: folder of uploads, whose size is bounded; None: not bounded.
    """

    def __init__(self, app: Any, host: str, port: int, uploads: Path | None = None) -> None:
        self.app, self.host, self.port, self.uploads = app, host, port, uploads

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        why = self.refused(headers)
        if why is None and scope.get("method") == "POST" and scope.get("path", "").rstrip("/").endswith("/upload"):
            why = self._too_large(dict(headers))
        if why is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = why
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text.encode()})

    def refused(self, headers: list[tuple[str, str]]) -> tuple[int, str] | None:
        """Return status and reason if a request with these headers is refused."""
        hosts = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        if len(hosts) != 1 or not self.is_own(hosts[0]):
            return 421, "This server does not answer for that host."
        own = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}
        if any(origin.lower() not in own for origin in origins):
            return 403, "Pages of other sites may not use this server."
        return None

    def is_own(self, host: str) -> bool:
        """Tell whether a Host header names this server."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = (parts.hostname or "").lower(), parts.port or 80
        except ValueError:
            return False
        if port != self.port or set(host) & set("/?#@"):
            return False
        listens = self.host.strip("[]").lower()
        if name == listens or (name in ("localhost", "127.0.0.1", "::1") and _is_local(listens)):
            return True
        if not _is_everywhere(listens):
            return False
        return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())

    def _too_large(self, headers: dict[str, str]) -> tuple[int, str] | None:
        if self.uploads is None:
            return None
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "An upload has to say how long it is."
        waiting = folder_bytes(self.uploads) if self.uploads.is_dir() else 0
        if waiting + int(length) > MOST_UPLOAD_BYTES:
            return 413, "The server has no room for this upload now."
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_everywhere(host: str) -> bool:
    return host == "" or (_is_address(host) and ipaddress.ip_address(host).is_unspecified)


def _is_local(host: str) -> bool:
    return host == "localhost" or _is_everywhere(host) or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
