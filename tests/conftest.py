"""One thread: the tests are many small operations, for which threads mostly wait for each other on a busy machine."""

import torch

torch.set_num_threads(1)

collect_ignore = ["helpers"]  # no tests, and some of them need optional packages
