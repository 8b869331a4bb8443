"""The kernels' bits on a GPU are what they were before the code moved: see helpers/golden_gpu.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parent / "helpers" / "golden_gpu.json"


@pytest.mark.gpu
def test_the_kernels_bits_are_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    import golden_gpu

    recorded = json.loads(FILE.read_text())
    if golden_gpu.machine() != recorded["machine"]:
        pytest.skip(f"recorded on {recorded['machine']}, not on {golden_gpu.machine()}")
    assert golden_gpu.compute() == recorded["results"]
