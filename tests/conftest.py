"""Without a CUDA device Triton's kernels run in its interpreter, which it reads from the environment when imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed():
    """A fresh seed for every test; pytest shows it when the test fails."""
    value = int.from_bytes(os.urandom(4), "big")
    print(f"seed {value}")
    torch.manual_seed(value)
    return value
