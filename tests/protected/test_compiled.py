"""Compiled kernels are found again by the next process, and a cache that is of no use costs a compilation."""

import numpy as np
import pytest
from numba.core import caching

from shielded.protected.search.indexed import compiled


def added(a, b):
    return a + 2 * b


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Keep kernels in a folder of the test."""
    monkeypatch.setattr(caching.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def run():
    """Compile as a process does that has not done so before; return how often it compiled."""
    kernel = compiled.kernel(added)
    assert kernel(1, 3) == 7
    assert kernel(0.5, 0.25) == 1.0
    return sum(kernel.stats.cache_misses.values())


def damage(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_second_process_compiles_nothing(folder):
    assert [run(), run()] == [2, 0]


@pytest.mark.parametrize(("suffix", "share"), [("nbi", 0.0), ("nbi", 0.5), ("nbc", 0.0), ("nbc", 0.5), ("nbc", 0.99)])
def test_a_damaged_file_is_made_anew(folder, suffix, share):
    run()
    for path in folder.rglob(f"*.{suffix}"):
        damage(path, int(share * path.stat().st_size))
    assert run() > 0
    assert run() == 0


def test_cut_and_missing_files_are_made_anew(folder):
    run()
    data = sorted(folder.rglob("*.nbc"))
    data[0].write_bytes(b"")
    data[1].unlink()
    assert run() == 2
    for path in folder.rglob("*.nbi"):
        path.write_bytes(b"\x80")
    assert run() == 2
    assert run() == 0


def test_a_change_in_another_module_of_the_kernels_counts(folder, monkeypatch):
    run()
    monkeypatch.setattr(compiled, "_sources_sha256", lambda: "another")
    assert run() == 2


def test_nothing_is_kept_where_no_folder_can_be_written(monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)
    assert [run(), run()] == [2, 2]
    assert not compiled.kernel(added).stats.cache_path


def test_a_full_disk_is_no_error(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(compiled._KernelFiles, "_save_data", full)
    assert [run(), run()] == [2, 2]


def test_the_kernels_of_the_search_can_be_kept(folder):
    from shielded.protected.search.indexed import kernels

    kernel = compiled.kernel(kernels.partial_distances.py_func)
    rows, lanes = np.zeros(64, np.float32), kernels.LANES
    codes, terms = np.zeros((64, 64), np.int8), np.zeros((2, lanes), np.float32)
    queries = np.zeros((2, 1, lanes, 64), np.int8)
    arguments = (
        kernels.IndexedRows(codes, codes, rows, rows + 3, rows, rows),
        kernels.RowProducts(np.zeros((64, lanes), np.float32), np.zeros(64, np.uint8)),
        kernels.PrefixQueries(queries, np.zeros((2, lanes), np.int32), np.ones(lanes, np.float32)),
        kernels.BoundTerms(terms[None], terms, terms, terms),
    )
    out = np.zeros((64, lanes), np.float32)
    for compile_again in (kernel, compiled.kernel(kernels.partial_distances.py_func)):
        compile_again(*arguments, out)
        assert (out == 3).all()
        out[:] = 0
    assert sum(compile_again.stats.cache_hits.values()) == 1
