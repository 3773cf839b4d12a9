"""Numba's compiler, whose results are kept on disk for the next process where a folder can be written.

Numba's own cache on disk (`njit(cache=True)`) raises where no folder can be written, where the disk is full and where a
file is damaged, and it does not notice a change in another file than the function's own. Here that costs a compilation.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

from shielded.files import sha256

_DIGEST_BYTES = 64  # behind the content of a file


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, without the interpreter's lock while it runs, and keep the result for the next process."""
    dispatcher: Any = njit(nogil=True)(function)
    with suppress(RuntimeError, OSError):  # no folder can be written
        dispatcher._cache = _KernelCache(function)
    return dispatcher


class _KernelFiles(IndexDataCacheFile):
    """Files of a kernel, with a digest: damaged machine code would run all the same."""

    def _dump(self, obj: Any) -> bytes:
        content = super()._dump(obj)
        return content + sha256(content).encode()

    def _load_data(self, name: str) -> Any:
        data = Path(self._data_path(name)).read_bytes()
        content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if sha256(content).encode() != digest:
            raise ValueError(f"{name} is damaged")
        return pickle.loads(content)  # Numba's own format, as trusted as Python's cache of compiled modules beside it


class _KernelCache(FunctionCache):
    """Numba's cache of a function, which is only ever of no use, never an error."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _KernelFiles(self.cache_path, self._impl.filename_base, _sources_sha256())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of any kind, since a damaged pickle may raise any
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


def _sources_sha256() -> str:
    """Compute a digest of all that kernels are compiled from: the modules of this folder."""
    return sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
