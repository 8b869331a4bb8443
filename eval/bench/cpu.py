"""Speed side by side with transformers on one machine, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated

import torch

from rnn_longctx.config import parse_length
from rnn_longctx.eval.bench.base import bench
from rnn_longctx.models.checkpoint.load import load
from rnn_longctx.models.checkpoint.save import save
from rnn_longctx.models.lm import LM


@bench("cpu")
def bench_cpu(
    model: Annotated[str, '"demo", "demo-long", "demo-delta", a directory, or a Hugging Face hub id.'] = "demo",
    *,
    batch: Annotated[int, "Rows side by side."] = 4,
    length: Annotated[str, "Tokens of a row."] = "4k",
    repeats: Annotated[int, "Runs of each, of which the median counts."] = 3,
) -> str:
    """Tokens per second against transformers' Mamba-2 on the CPU: same weights, same threads, float32.

    Examples:
        rnn-longctx bench cpu
        rnn-longctx bench cpu demo --length 2k --repeats 1
    """
    return cpu(load(model), batch, parse_length(length), repeats)


@torch.inference_mode()
def cpu(model: LM, batch: int = 4, length: int = 4096, repeats: int = 3) -> str:
    """Return, as text, the tokens per second of reading (batch, length) random tokens to their logits, here and in
    transformers' Mamba-2 with the same weights and its default chunk_size of 256; turn about, medians, float32."""
    from transformers import Mamba2ForCausalLM
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, layout="transformers")
        other = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (batch, length))

    def ours() -> torch.Tensor:
        return torch.cat([model.logits(h) for h in model.stream(ids, segment=max(64, 2048 // batch))], 1)

    def transformers() -> torch.Tensor:
        return other(ids, use_cache=False).logits

    difference = (ours()[:, :512] - other(ids[:, :512]).logits).abs().max().item()
    times: dict[str, list[float]] = {"rnn-longctx": [], "transformers": []}
    for _ in range(repeats):
        for name, run in (("rnn-longctx", ours), ("transformers", transformers)):
            times[name].append(_seconds(run))
    speed = {name: batch * length / median(t) for name, t in times.items()}
    lines = [f"{batch} x {length} tokens, float32, {torch.get_num_threads()} threads, median of {repeats}"]
    lines += [f"{name:14} {tokens:10,.0f} tokens/s" for name, tokens in speed.items()]
    lines += [
        f"ratio {speed['rnn-longctx'] / speed['transformers']:.1f}x, largest difference of logits {difference:.1e}"
    ]
    return "\n".join(lines)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
