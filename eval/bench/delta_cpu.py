"""The delta rule on a CPU, here and by transformers' own functions, side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.config import parse_length
from rnn_longctx.eval.bench.base import Row, bench
from rnn_longctx.recurrence.delta.chunked import CHUNK, uncut
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs


@bench("delta-cpu")
def bench_delta_cpu(
    *,
    batch: Annotated[int, "Rows side by side."] = 4,
    length: Annotated[str, "Tokens of a row."] = "4k",
    heads: Annotated[int, "Heads of a row."] = 4,
    width: Annotated[int, "Channels of keys and values."] = 64,
    decay: Annotated[str, "The most that a token forgets, in nats."] = "0.1",
    repeats: Annotated[int, "Runs of each, of which the fastest counts."] = 5,
) -> Iterator[Row]:
    """The delta rule on a CPU, one thread, against transformers' functions; and its products alone.

    Examples:
        rnn-longctx bench delta-cpu --length 2k --repeats 3
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from delta_cpu_rows((batch, parse_length(length), heads, width), float(decay), repeats)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def delta_cpu_rows(shape: tuple[int, int, int, int], decay: float, repeats: int) -> Iterator[Row]:
    """Yield a row a rule and system: seconds of processor time for random rows (B, T, H, K), the fastest of `repeats`
    in turn; how many times as fast as transformers' function; the largest difference from its outputs."""
    from transformers import logging
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    logging.set_verbosity_error()
    for rule, function in {"gated-deltanet": torch_chunk_gated_delta_rule, "kda": chunk_kimi_delta_attention}.items():
        q, k = (F.normalize(torch.randn(shape), dim=-1) for _ in range(2))
        v, beta = torch.randn(shape), torch.rand(shape[:3])
        log_decay = -decay * torch.rand(shape if rule == "kda" else shape[:3])
        state = torch.zeros(shape[0], shape[2], shape[3], shape[3])
        inputs, gates = ScanInputs(v, k, q * shape[3] ** -0.5), DeltaGates(log_decay, beta, beta)
        theirs = partial(function, q, k, v, g=log_decay, beta=beta, chunk_size=CHUNK)
        systems: dict[str, Callable[[], Any]] = {
            "transformers": lambda: theirs()[0],  # noqa: B023
            "transformers, denormal numbers flushed": partial(_flushed, theirs),
            "rnn-longctx": lambda: uncut(inputs, gates, state)[0],  # noqa: B023
            "products alone": lambda: _products(k, state),  # noqa: B023
        }
        expected = systems["transformers"]()
        best = dict.fromkeys(systems, float("inf"))
        for _ in range(repeats):
            for system, run in systems.items():
                best[system] = min(best[system], _processor_seconds(run))
        for system, seconds in best.items():
            error = (systems[system]() - expected).abs().max().item() if system == "rnn-longctx" else None
            faster = best["transformers"] / seconds
            yield {"what": "delta rule", "rule": rule, "batch": shape[0], "length": shape[1], "system": system,
                   "seconds": seconds, "times_transformers": faster, "error": error}  # fmt: skip


def _flushed(run: Callable[[], object]) -> None:
    """Run without denormal numbers, with which a CPU may take many times as long."""
    torch.set_flush_denormal(True)
    try:
        run()
    finally:
        torch.set_flush_denormal(False)


def _products(key: Tensor, state: Tensor) -> None:
    """Make the products of matrices, and solve the systems, that the rule takes in chunks, of numbers at hand: what no
    way to arrange the rest can save."""
    chunks = key.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4).flatten(1, 2)  # (n, B * H, c, K)
    S = state.flatten(0, 1)
    for rows in chunks:
        L = torch.bmm(rows, rows.mT)
        seen = torch.bmm(rows, rows.mT)
        solved = torch.linalg.solve_triangular(L, torch.bmm(rows, S.mT), upper=False, unitriangular=True)
        torch.baddbmm(torch.bmm(rows, S.mT), seen, solved)
        torch.baddbmm(S, solved.mT, rows)


def _processor_seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
