import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# The first sqrt of a process, if two threads share it, is now and then wrong by up to 3e-4 in the part of one (seen on
# torch 2.13, one process in sixteen): here one thread calls it first.
torch.ones(1).sqrt()


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
