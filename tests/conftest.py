"""Without a CUDA device Triton's kernels run in its interpreter, which it reads from the environment when imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
