"""Speed of a training step: forward, backward and optimizer in bf16 autocast over float32 weights, on whole sequences,
here and in mamba-ssm, and on long ones by segments that pass their states on."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from rnn_longctx.config import parse_lengths
from rnn_longctx.eval.bench.base import Row, bench, sizes
from rnn_longctx.models.lm import LM
from rnn_longctx.models.losses import head_losses
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.config import OptimizerConfig, PassingConfig
from rnn_longctx.train.corpus import Batch
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.optimizer import make_optimizer

REPEATS = 5
Learn = Callable[[Tensor], None]  # ids (B, T + 1): leaves the gradients in the parameters


@bench("train")
def bench_train(
    *,
    whole: Annotated[str, "Batch x tokens of sequences that are read in one call."] = "2x8k",
    streams: Annotated[str, "Batch x tokens of those read by segments that pass states on."] = "1x128k",
    segments: Annotated[str, "Tokens of a segment."] = "2k,4k,8k",
    layers: Annotated[int, "Of the model."] = 48,
    d_model: Annotated[int, "Of the model."] = 1024,
    vocab: Annotated[int, "Tokens of its vocabulary."] = 50288,
) -> Iterator[Row]:
    """Training steps of a model of 370M parameters in bf16, here and in mamba-ssm, where that is installed.

    Examples:
        rnn-longctx bench train --whole 2x8k --out runs/train.csv
    """
    shape = Mamba2Config(d_model=d_model, n_layer=layers, vocab_size=vocab, d_state=128, headdim=64)
    return train_rows(shape, sizes("whole", whole), sizes("streams", streams), parse_lengths(segments))


def train_rows(
    shape: Mamba2Config, whole: list[tuple[int, int]], streams: list[tuple[int, int]], segments: list[int]
) -> Iterator[Row]:
    """Yield a row a size and system: seconds and tokens a second of an update, after one that compiles; the most memory
    held (NaN on a CPU); and mfu, the operations that the model asks for over what the device's matrix units could have
    done in that time, as a large bf16 product measures them here.

    Operations of a token: 6 a matrix weight (a product forwards, two backwards; projections and head), and 12 a state
    element (the recurrence itself, S = a S + x B^T and y = S C, 4 forwards and 8 backwards). What an implementation
    does beyond that, inside chunks or again, is not counted, nor is the convolution.

    Args:
        whole: batch and tokens of sequences that are read in one call.
        streams: batch and tokens of those that are read by segments, each of `segments` tokens, no gradient crossing
            their boundaries (bptt 0).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device)
    systems = {"rnn-longctx": _ours, "mamba-ssm": _official}
    runs: list[tuple[str, int, int, int]] = [("rnn-longctx", *size, 0) for size in whole]
    runs += [("rnn-longctx", *size, segment) for size in streams for segment in segments]
    runs += [("mamba-ssm", *size, 0) for size in whole]  # last: a kernel that fails may leave the device unusable
    for system, batch, length, segment in runs:
        torch.manual_seed(0)
        pair = systems[system](shape, device, segment)
        if pair is None:
            continue
        model, learn = pair
        ids = torch.randint(shape.vocab_size, (batch, length + 1), device=device)
        row = measured(model, learn, ids)
        speed = batch * length / row["seconds"]
        mfu = speed * operations(shape) / rate
        yield {
            "what": "train",
            "batch": batch,
            "length": length,
            "segment": segment or length,
            "system": system,
            "tokens_per_second": speed,
            "mfu": mfu,
            **row,
            "matrix_tflop_s": rate / 1e12,
        }
        del model, learn, pair
        gc.collect()  # graphs, and the memory they hold
        if device.type == "cuda":
            torch.cuda.empty_cache()


def operations(shape: Mamba2Config) -> int:
    """Return the operations that training on one token takes: see `train_rows`."""
    in_proj = shape.d_model * (shape.d_inner + shape.conv_dim + shape.nheads)
    weights = shape.n_layer * (in_proj + shape.d_inner * shape.d_model) + shape.vocab_size * shape.d_model
    return 6 * weights + 12 * shape.scan_state_elements


def _ours(shape: Mamba2Config, device: torch.device, segment: int) -> tuple[nn.Module, Learn]:
    with device:
        model = LM(shape)
    return model, learning(Learner(model, recorded=True), model, segment)


def learning(learner: nn.Module, model: Any, segment: int = 0) -> Learn:
    """Return a function that learns. learner: the model's, wrapped or not. segment: tokens, 0 for a whole sequence."""

    def learn(ids: Tensor) -> None:
        rows = MicroBatch.of(Batch(ids, torch.zeros_like(ids[:, 1:], dtype=torch.bool)))
        passing = PassingConfig(segment, bptt=0) if segment else None
        start = model.new_cache(len(ids)) if segment else None
        accumulate(learner, rows, passing, start, 0.0, lambda: torch.autocast(ids.device.type, torch.bfloat16))

    return learn


def _official(shape: Mamba2Config, device: torch.device, segment: int) -> tuple[nn.Module, Learn] | None:
    """Return mamba-ssm's model with the losses from here, which hold no more logits than ours."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    layer = {"layer": "Mamba2", "d_state": shape.d_state, "headdim": shape.headdim, "expand": shape.expand}
    config = MambaConfig(d_model=shape.d_model, n_layer=shape.n_layer, vocab_size=shape.vocab_size, ssm_cfg=layer)
    model = MambaLMHeadModel(config, device=device, dtype=torch.float32)

    def learn(ids: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = head_losses(model.backbone(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
        losses.mean().backward()

    return model, learn


def measured(model: nn.Module, learn: Learn, ids: Tensor) -> Row:
    """Return a row: seconds of an update, the median; peak_gib held; note, why there are none."""
    cuda, times = ids.is_cuda, []
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-4))

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        learn(ids)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    try:
        for repeat in range(REPEATS + 1):
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            update()
            if cuda:
                torch.cuda.synchronize()
            if repeat:
                times.append(time.perf_counter() - began)
            elif cuda:
                torch.cuda.empty_cache()  # of what compiling took
    except RuntimeError as problem:  # no memory, or what another library does with this size
        return {"seconds": math.nan, "peak_gib": math.nan, "note": str(problem).splitlines()[0][:80]}
    peak = torch.cuda.max_memory_reserved() / 2**30 if cuda else math.nan  # what graphs hold counts as reserved alone
    return {"seconds": median(times), "peak_gib": peak, "note": ""}


def matrix_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return operations a second of a large product; on a GPU of bfloat16 numbers."""
    if device.type == "cuda":
        from rnn_longctx.eval.bench.scan import ceilings

        return ceilings()[1]
    m, times = torch.randn(512, 512, dtype=dtype), []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        m @ m
        times.append(time.perf_counter() - began)
    return 2 * 512**3 / median(times[1:])
