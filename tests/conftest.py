"""Fresh draws for every test. Where RNN_LONGCTX_SEED is set, as by continuous integration, they follow from it:
a commit is judged by the same draws wherever it is tested, another commit by others.

Without a CUDA device Triton's kernels run in its interpreter, which it reads from the environment when imported.
"""

import os
import random
import sys
import zlib

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = pytest.StashKey[int]()

default_rng = np.random.default_rng
np.random.default_rng = lambda seed=None: default_rng(random.getrandbits(64) if seed is None else seed)


def pytest_collection_finish():
    if os.environ.get("TRITON_INTERPRET") == "1" and "triton.runtime.interpreter" in sys.modules:
        from quick_interpreter import quicken

        quicken()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures, whatever their scope; pytest shows the seed of a test that fails."""
    given = os.environ.get("RNN_LONGCTX_SEED")
    value = int.from_bytes(os.urandom(4), "big") if given is None else zlib.crc32(f"{given} {item.nodeid}".encode())
    print(f"seed {value}")
    item.stash[SEED] = value
    random.seed(value)
    torch.manual_seed(value)


@pytest.fixture(autouse=True)
def _no_plugins_handed_on(monkeypatch):
    """What a test loads is not for the processes that later tests begin."""
    monkeypatch.setenv("RNN_LONGCTX_PLUGINS", "")


@pytest.fixture
def seed(request):
    return request.node.stash[SEED]
