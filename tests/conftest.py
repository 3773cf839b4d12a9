"""Set up the process of the tests and those that they start."""

import os
from pathlib import Path

# The tests are many small operations, for which several threads mostly wait for each other on a busy machine. This
# goes for the processes that they start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools

import torch
import typer.testing
from hypothesis import settings

torch.set_num_threads(1)

# Tests that start themselves as a script import `helpers` as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

settings.register_profile("the same examples in every run", derandomize=True)
settings.load_profile("the same examples in every run")

# Typer builds all commands anew at each call, which is a third of the time of a test that a sentence answers.
typer.testing._get_command = functools.cache(typer.testing._get_command)

collect_ignore = ["helpers"]  # no tests, and some of them need optional packages

# Files are shared among processes whole, so that what a file prepares is prepared once. These take longest.
FIRST = ["test_ray", "test_docs", "test_reproduce", "test_cli", "test_studio", "test_repair", "test_attach"]


def pytest_collection_modifyitems(items):
    """Start with the longest files, so that all processes end at about the same time."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
