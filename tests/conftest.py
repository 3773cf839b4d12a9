"""Set up the process of the tests and those that they start."""

import os
from pathlib import Path

import torch

# The tests are many small operations, for which several threads mostly wait for each other on a busy machine.
torch.set_num_threads(1)

# Tests that start themselves as a script import `helpers` as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

collect_ignore = ["helpers"]  # no tests, and some of them need optional packages
