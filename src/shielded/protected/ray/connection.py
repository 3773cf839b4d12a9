"""Join a Ray cluster, and notice when its head is lost."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

from shielded._extras import missing

CHECK_SECONDS = 2.0
"""Seconds between two checks of the head of the cluster."""

_MAX_MISSED_CHECKS = 3  # before the head is given up


def connect(address: str) -> Any:
    """Join a cluster, unless this process has joined one already.

    Args:
        address: host:port of its head, "auto" for the one that this machine belongs to, or "local" to start one for
            this process.

    Returns:
        The module `ray`.

    Raises:
        RuntimeError: Ray is not installed, or no cluster answers there.
    """
    if address.startswith("ray://"):
        raise RuntimeError(
            f"{address} is a client's address; give host:port, on a machine that belongs to the cluster."
        )
    # Ray reads these when it is imported. Errors are raised, so its log adds nothing. Ray also ends, without a word, a
    # process that has missed the head for a minute, which a long step between two searches can take: `Head` is to
    # report it instead.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
    try:
        import ray
    except ImportError:
        raise RuntimeError(missing("Clusters", "ray")) from None
    if ray.is_initialized():
        return ray
    hint = "start one with `ray start --head`, and see that RAY_AUTH_MODE and RAY_AUTH_TOKEN are what it was given"
    # Ray itself tries for minutes.
    if address.rpartition(":")[2].isdigit() and not _answers(address):
        raise RuntimeError(f"no Ray cluster answers at {address}; {hint}.")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise RuntimeError(f"the Ray cluster at {address} cannot be joined; {hint}. ({error})") from None
    return ray


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class Head:
    """Check now and then that the head of the cluster answers. Ray itself would wait, and then end the process."""

    def __init__(self) -> None:
        import ray

        self._address = ray.get_runtime_context().gcs_address
        self._missed = 0
        self._checked = time.monotonic()

    def check(self) -> None:
        """Check the head, if the last check is some seconds ago.

        Raises:
            RuntimeError: it has not answered several checks in a row.
        """
        import ray

        if self._missed < _MAX_MISSED_CHECKS and time.monotonic() - self._checked >= CHECK_SECONDS:
            self._missed = 0 if _answers(self._address) else self._missed + 1
            self._checked = time.monotonic()
            if self._missed == _MAX_MISSED_CHECKS:
                ray.shutdown()  # so that the next `connect` joins the new cluster
        if self._missed == _MAX_MISSED_CHECKS:
            raise RuntimeError(
                f"the head of the Ray cluster at {self._address} does not answer any more; what was saved is kept. "
                "Start it again and repeat the command, which goes on from there."
            )

    def require(self) -> None:
        """Wait until the head answers.

        Raises:
            RuntimeError: it does not.
        """
        while not _answers(self._address):
            time.sleep(CHECK_SECONDS)
            self.check()


def results(references: list[Any], head: Head) -> list[Any]:
    """Get the answers of workers; raise their errors as if they had happened in this process.

    Args:
        references: Ray object references.
        head: checked while waiting.

    Raises:
        RuntimeError: a worker failed for another reason than an exception, or the head is lost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    head.check()
    while ray.wait(references, num_returns=len(references), timeout=CHECK_SECONDS)[1]:
        head.check()
    try:
        return ray.get(references)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        head.require()  # workers are lost with their head
        raise RuntimeError(f"a worker of the Ray cluster failed: {error}") from None
