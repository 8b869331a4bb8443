import pytest
import torch
from streams import DEVICE

from rnn_longctx.recurrence.ssd import ops


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many chunks and segments in a short stream."""
    from rnn_longctx.recurrence.ssd.kernels import launch, launch_grads

    if DEVICE == "cpu":
        monkeypatch.setattr(launch, "blocks", lambda *_: launch.Blocks(16, 16, 32, 4, 1))
        monkeypatch.setattr(launch_grads, "BACKWARD_CHUNKS", 2)
        monkeypatch.setattr(launch, "segment_chunks", lambda *_: 2)
        monkeypatch.setattr(ops, "SEGMENT", 64)
        monkeypatch.setattr(ops, "FIRST", 32)
