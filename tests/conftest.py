"""One thread: the tests are many small operations, for which threads mostly wait for each other on a busy machine."""

import torch

torch.set_num_threads(1)
