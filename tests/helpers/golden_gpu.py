"""What the kernels compute on a GPU, as digests of the bits: `python tests/helpers/golden_gpu.py > FILE`.

Only what a person can call is used, so that the same file runs before and after the code behind it moves.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

import rnn_longctx
from rnn_longctx.data import load_text

REMEDIES = (
    "none", "rri:alpha=0.998,beta=0.75", "state-norm:every=64", "state-norm:every=1,quantile=0.9", "window:tokens=300",
    "a-floor", "token-filter", "reset:every=700", "recompute:last=512",
)  # fmt: skip
LENGTH = 5003


def machine() -> list[str]:
    """What the last bit depends on, beside the code."""
    return [torch.cuda.get_device_name(), torch.__version__, version("triton")]


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def compute() -> dict[str, Any]:
    """Digests of logits, of what is generated, of statistics, and of gradients."""
    results: dict[str, Any] = {}
    ids = torch.from_numpy(rnn_longctx.load("demo").tokenizer.encode(load_text("builtin").data[: 2 * LENGTH]))
    ids = ids.view(2, LENGTH).cuda()
    for dtype in (torch.float32, torch.bfloat16):
        model = rnn_longctx.load("demo", device="cuda", dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        for remedy in REMEDIES:
            with torch.inference_mode(), rnn_longctx.mitigate(model, remedy, target_length=LENGTH):
                hidden = torch.cat(list(model.stream(ids, segment=1900)), 1)
                results[f"{name} {remedy} {model.backend}"] = digest(model.logits(hidden[:, -1]), hidden)
                results[f"{name} {remedy} losses"] = digest(model.losses(hidden[:, :-1], ids[:, 1:]))
        for remedy in ("none", "rri:alpha=0.998,beta=0.75", "state-norm:every=64"):
            with rnn_longctx.mitigate(model, remedy, target_length=LENGTH):
                tokens = rnn_longctx.generate(model, ids[:, :1000], 60)
                results[f"{name} {remedy} generated"] = digest(tokens.long())
        with torch.inference_mode(), rnn_longctx.record(model, every=512) as trace:
            for _ in model.stream(ids[:1]):
                pass
        table = trace.table().select_dtypes("number").to_numpy(dtype="float64").copy()
        results[f"{name} traced"] = digest(torch.from_numpy(table))
        if dtype == torch.float32:
            continue  # its gradients differ from run to run: sums of them are made in any order
        for remedy in ("none", "state-norm:every=64"):
            with rnn_longctx.mitigate(model, remedy, target_length=LENGTH):
                reset = torch.zeros_like(ids[:, :-1], dtype=torch.bool)
                reset[:, 2000] = remedy == "none"
                model.losses(model(ids[:, :-1], reset=reset), ids[:, 1:]).mean().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results[f"{name} {remedy} gradients"] = digest(*gradients)
            for p in model.parameters():
                p.grad = None
    return results


if __name__ == "__main__":
    print(json.dumps({"machine": machine(), "results": compute()}, indent=1))
