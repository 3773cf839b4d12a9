"""Attack the package: random queries from threads, kills, damaged files. Every figure should be 0 failures.

python benchmarks/attack.py queries            # 10⁵ queries in one thread, 10⁴ in four, against float64
python benchmarks/attack.py kills              # 200 kills over protect, add, remove, compact, generate
python benchmarks/attack.py damage             # 500 damaged files of a set
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shielded import LatentSpace, ProtectedSet, cli, models
from shielded.protected import store
from shielded.protected.ingest import encoding

SHAPE = (4, 4, 8)
ROWS = 20_000
BATCH = 40


# Queries --------------------------------------------------------------------------------------------------------------


def queries(single: int, threaded: int, threads: int = 4) -> dict[str, int]:
    """Compare `within` and `nearest_rows` with float64 distances, for random queries."""
    with tempfile.TemporaryDirectory() as folder:
        protected = ProtectedSet.create(Path(folder) / "set", LatentSpace(SHAPE))
        z = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))
        protected.add(z, range(ROWS), 5.0)
        exact = z.double().flatten(1).numpy()
        norms = np.square(exact).sum(1)
        wrong = {"one thread": _ask(protected, exact, norms, single, 1)}
        found: list[int] = []
        asked = [
            threading.Thread(
                target=lambda n=n: found.append(_ask(protected, exact, norms, threaded // threads, 10 + n))
            )
            for n in range(threads)
        ]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()
        wrong[f"{threads} threads"] = sum(found) + (threads - len(found)) * threaded
        return wrong


def _ask(protected: ProtectedSet, z: np.ndarray, norms: np.ndarray, count: int, seed: int) -> int:
    """Ask `count` queries; return how many were answered otherwise than float64 answers them."""
    rng, wrong = np.random.default_rng(seed), 0
    for step in range(count // BATCH):
        x = rng.uniform(0, 1.2) * z[rng.integers(0, len(z), BATCH)]
        x = (x + rng.choice([0.01, 0.3, 1.0]) * rng.standard_normal(x.shape)).astype(np.float32)
        wide = x.astype(np.float64)
        # Rounding of the product is far below the distance of two candidates; those near the limit are subtracted.
        squared = np.square(wide).sum(1)[:, None] + norms - 2 * wide @ z.T
        radius = float(np.sqrt(max(np.quantile(squared[:4], rng.choice([0.0001, 0.005])), 1e-6)))
        given = torch.from_numpy(x).view(-1, *SHAPE)
        if step % 2:
            hits = protected.within(given, radius)
            answer = set(zip(hits.query.tolist(), hits.row.tolist(), strict=True))
            query, row = np.nonzero(squared < radius**2 + 1e-6)
            distance = np.sqrt(np.square(wide[query] - z[row]).sum(1))
            right = {(int(q), int(r)) for q, r, d in zip(query, row, distance, strict=True) if d < radius}
            wrong += len({q for q, _ in answer ^ right})
        else:
            distances, rows = protected.nearest_rows(given, 3)
            near = np.argpartition(squared, 12, axis=1)[:, :12]
            exact = np.sqrt(np.square(wide[:, None] - z[near]).sum(2))
            order = np.lexsort((near, exact))[:, :3]
            same = np.take_along_axis(near, order, 1) == rows.numpy()
            close = np.abs(np.take_along_axis(exact, order, 1) - distances.numpy()) < 1e-9
            wrong += int((~(same & close).all(1)).sum())
    return wrong


# Kills ----------------------------------------------------------------------------------------------------------------


def kills(count: int) -> dict[str, int]:
    """Kill commands at random moments: the set opens, and the same command, repeated, ends well."""
    rng, outcome = random.Random(0), Counter(killed=0, failed=0)
    torch.set_num_threads(1)
    pipe = models.load()
    models.load = lambda *_, **__: pipe
    encoding._SAVE_SECONDS = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        for number in range(40):
            pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
        _run(["protect", folder / "pictures", "--out", folder / "whole", "--radius", "5"])
        few = [folder / "pictures" / f"{number}.png" for number in range(10)]
        _run(["protect", *few, "--out", folder / "few", "--radius", "5"])
        seconds: dict[str, float] = {}
        for number in itertools.count():
            if outcome["killed"] == count:  # some commands end before the kill
                break
            action = ("protect", "add", "remove", "compact", "generate")[number % 5]
            target, out = folder / "set", folder / "out"
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            pictures = folder / "pictures"
            if action != "protect":
                shutil.copytree(folder / ("few" if action == "add" else "whole"), target)
            if action == "compact":
                ProtectedSet.open(target).remove(["3", "7"])
            command = {
                "protect": ["protect", pictures, "--out", target, "--radius", "5", "--json"],
                "add": ["protect", pictures, "--out", target, "--add", "--radius", "5", "--json"],
                "remove": ["protect", "--out", target, "--remove", "3", "--remove", "7", "--compact", "--json"],
                "compact": ["protect", "--out", target, "--compact", "--json"],
                "generate": ["generate", "owl", "-n", "1", "--steps", "2", "--protect", target, "--out", out, "--json"],
            }[action]
            if action not in seconds:
                begun = time.monotonic()
                copy = [folder / "timed" if part == target else part for part in command]
                if target.exists():
                    shutil.copytree(target, folder / "timed")
                _run([folder / "timed out" if part == out else part for part in copy])
                seconds[action] = time.monotonic() - begun
                shutil.rmtree(folder / "timed", ignore_errors=True)
            outcome["killed"] += _run(command, seconds[action] * rng.uniform(0.02, 0.95)) is None
            problem = _after(target, command, action, out)
            outcome["failed"] += problem is not None
            if problem is not None:
                print(f"{action}: {problem}", file=sys.stderr)
    return dict(outcome)


def _after(target: Path, command: list, action: str, out: Path) -> str | None:
    """Repeat a killed command; say what is wrong with the set before or afterwards."""
    try:
        if (target / store.MANIFEST).exists():
            ProtectedSet.open(target).verify()
        again = [*command, "--overwrite"] if action == "generate" and out.exists() else command
        finished = _run(again)
        assert finished is not None
        if finished[0]:
            return f"exit code {finished[0]}: {finished[1][-300:]}"
        protected = ProtectedSet.open(target)
        protected.verify()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    expected = 38 if action in ("remove", "compact") else 40
    if len(protected) != expected:
        return f"{len(protected)} images instead of {expected}: {finished[1][-300:]}"
    if action in ("remove", "compact") and store.read_manifest(target)["removed"] is not None:
        return "removed vectors are still there"
    return None


def _run(command: list, kill_after: float | None = None) -> tuple[int, str] | None:
    """Run a command in a copy of this process; return its exit code and output, None if it was killed."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            code = 1
            try:
                torch.set_num_threads(1)  # in one thread, as torch renews its pool after a fork without a lock
                cli.app([str(part) for part in command], prog_name="shielded")
            except SystemExit as error:
                code = int(error.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        killer = threading.Timer(kill_after or 600.0, os.kill, (child, signal.SIGKILL))
        killer.start()
        _, status = os.waitpid(child, 0)
        killer.cancel()
        output.seek(0)
        return None if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), output.read().decode(errors="replace"))


# Damage ---------------------------------------------------------------------------------------------------------------


def damage(count: int) -> dict[str, int]:
    """Damage one file of a set at a time, and use it: a clear error or the right answer."""
    from shielded.protected.search import choose

    rng, outcome = random.Random(0), Counter({"clear error": 0, "right answer": 0, "unclear error": 0, "wrong": 0})
    choose.MAX_UNINDEXED_ROWS = 0  # so that there are indexes to damage
    with tempfile.TemporaryDirectory() as name:
        whole, copy = Path(name) / "whole", Path(name) / "copy"
        protected = ProtectedSet.create(whole, LatentSpace((4, 4, 4)))
        z = torch.randn(600, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        protected.add(z[:400], [f"a{i}" for i in range(400)], 2.0, [f"{i}.png" for i in range(400)])
        protected.add(z[400:], [f"b{i}" for i in range(200)], 3.0)
        protected.remove(["a7", "b3"])
        x = z[::5] + 0.1
        expected = _used(whole, x)
        for _ in range(count):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            file = copy / rng.choice(sorted(path.name for path in whole.iterdir() if path.name != store.LOCK))
            data = bytearray(file.read_bytes())
            at = rng.randrange(len(data))
            kind = rng.choice(["flip", "many", "zero", "cut", "longer", "swap"])
            if kind == "flip":
                data[at] ^= 1 << rng.randrange(8)
            elif kind == "many":
                for _ in range(20):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif kind == "zero":
                data[at : at + 512] = bytes(len(data[at : at + 512]))
            elif kind == "cut":
                del data[at:]
            elif kind == "longer":
                data += os.urandom(16)
            else:
                other = rng.randrange(len(data))
                data[at], data[other] = data[other], data[at]
            file.write_bytes(data)
            try:
                outcome["right answer" if _used(copy, x) == expected else "wrong"] += 1
            except Exception as error:
                clear = isinstance(error, ValueError) and "damaged" in str(error) and file.name in str(error)
                outcome["clear error" if clear else "unclear error"] += 1
    return dict(outcome)


def _used(path: Path, x: torch.Tensor) -> tuple:
    protected = ProtectedSet.open(path)
    hits = protected.within(x)
    rows = list(range(len(protected)))
    return (
        hits.row.tolist(),
        hits.distance.tolist(),
        protected.nearest(x[:9], 3)[1],
        list(protected.ids),
        list(protected.sources),
        protected.radii.tolist(),
        protected.vectors(rows).tolist(),
        protected.history,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="attack", required=True)
    asked = commands.add_parser("queries")
    asked.add_argument("--single", type=int, default=100_000)
    asked.add_argument("--threaded", type=int, default=10_000)
    commands.add_parser("kills").add_argument("--count", type=int, default=200)
    commands.add_parser("damage").add_argument("--count", type=int, default=500)
    given = vars(parser.parse_args())
    attack, begun = {"queries": queries, "kills": kills, "damage": damage}[given.pop("attack")], time.monotonic()
    print(json.dumps({**attack(**given), "seconds": round(time.monotonic() - begun, 1)}))


if __name__ == "__main__":
    main()
