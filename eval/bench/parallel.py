"""Several GPUs against one of them: the time to read one context, the memory to train on it, and the speed of training
on a batch each. Under torchrun."""

from __future__ import annotations

import copy
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Annotated

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench import train as training
from rnn_longctx.eval.bench.base import Row, bench, sizes
from rnn_longctx.eval.bench.model import SHAPE_370M
from rnn_longctx.eval.bench.parallel_longnet import layer_of, longnet_rows
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import LM
from rnn_longctx.ranks import local_rank
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.parallel import reduce_gradients, sequence_parallel, shard, stretch


@contextmanager
def joined(cpus: bool = False) -> Iterator[int]:
    """Join the processes that torchrun began, one a GPU, and give this one's rank. cpus: CPUs will do where there is no
    GPU. Raises InputError elsewhere."""
    cuda = torch.cuda.is_available()
    if not {"LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys() or not (cuda or cpus):
        raise InputError(
            f"bench parallel needs {'' if cpus else 'CUDA devices and '}a process for each rank: "
            f"torchrun --nproc-per-node 4 -m rnn_longctx.cli bench parallel{' --mixer longnet' if cpus else ''}"
        )
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            raise InputError(f"bench parallel needs a CUDA device a process, and here are {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def model_370m() -> LM:
    """Return a model of the same random weights on every rank, bfloat16, on this rank's device."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LM(SHAPE_370M).bfloat16()


@bench("parallel")
def bench_parallel(
    *,
    length: Annotated[str, "Tokens of the context that is read."] = "4m",
    segment: Annotated[str, "Tokens that a GPU reads at once."] = "256k",
    train: Annotated[str, "Tokens of the sequence that is trained on; 0: none."] = "16k",
    each: Annotated[str, "Batch x tokens of a GPU in data-parallel training; empty: none."] = "2x8k",
    mixer: Annotated[str, "mamba2; or one layer of longnet, with settings or by itself."] = "mamba2",
) -> Iterator[Row]:
    """One context over 1, 2, 4, ... GPUs, and a batch each, with a model of 370M parameters, under torchrun: torchrun
    --nproc-per-node 4 -m rnn_longctx.cli bench parallel. With --mixer longnet one layer of it reads the length over all
    GPUs, and shares of it over fewer; it takes none of --segment, --train and --each.

    Examples:
        torchrun --nproc-per-node 4 -m rnn_longctx.cli bench parallel --length 4m
    """
    if mixer != "mamba2":
        if (segment, train, each) != ("256k", "16k", "2x8k"):
            raise InputError("bench parallel: --segment, --train and --each are not for --mixer longnet")
        context = parse_length(length)
        layer = layer_of(mixer, context)
        with joined(cpus=True):
            if torch.cuda.is_available():
                layer = layer.to("cuda", torch.bfloat16)
            yield from longnet_rows(layer, context)
        return
    tokens, at_once, trained = parse_length(length), parse_length(segment), 0 if train == "0" else parse_length(train)
    batches = sizes("each", each)
    with joined():
        yield from parallel_rows(model_370m(), tokens, at_once, trained, batches[0] if batches else None)


def parallel_rows(
    model: LM, length: int, segment: int, train: int, each: tuple[int, int] | None = None
) -> Iterator[Row]:
    """Yield rows for 1, 2, 4, ... ranks, on rank 0; others yield none. Collective. One rank reads without any of it.

        read    `length` tokens, `segment` a rank and call, without gradients; error: of the next token's logits
        train   forward and backward of `train` tokens, their loss's gradients summed over the ranks; error: of those
        data    data-parallel updates of float32 weights in bf16 autocast (DDP), `each` rank with a batch x tokens of
                its own

    `times_one`: how much sooner than one rank, of `data` how many times its tokens a second. peak_gib: the most that a
    rank held at once, and more_gib what of it was not there before; NaN on CPUs. error: relative, against one rank.
    """
    world, rank, device = dist.get_world_size(), dist.get_rank(), model.device
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, max(length, train) + 1), generator=draw).to(device)
    sizes = sorted({2**i for i in range(world.bit_length())} | {world})
    alone: dict[str, tuple[float, Tensor | None]] = {}
    for ranks in sizes:
        group = dist.new_group(list(range(ranks)))  # which every rank must make
        for what, tokens, run in (("read", length, _read), ("train", train, _train)):
            if tokens and rank < ranks:
                row, result = _measured(run, model, ids[:, : tokens + 1], segment, group, ranks)
                if ranks == 1:
                    alone[what] = row["seconds"], result
                if rank == 0:
                    seconds, expected = alone[what]
                    error = math.nan if expected is None or result is None else _error(result, expected)
                    yield {
                        "what": what,
                        "length": tokens,
                        "ranks": ranks,
                        **row,
                        "times_one": seconds / row["seconds"],
                        "error": error,
                    }
            dist.barrier()
        if each and rank < ranks:
            row = _data_parallel(model, *each, group, ranks)
            alone.setdefault("data", (row["seconds"], None))
            if rank == 0:
                times = ranks * alone["data"][0] / row["seconds"]
                tokens = ranks * each[0] * each[1]
                yield {
                    "what": "data",
                    "length": tokens,
                    "ranks": ranks,
                    **row,
                    "tokens_per_second": tokens / row["seconds"],
                    "times_one": times,
                }
        dist.barrier()


def _data_parallel(model: LM, batch: int, length: int, group: dist.ProcessGroup, ranks: int) -> Row:
    gc.collect()  # the graphs of the learner before
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    trained = copy.deepcopy(model).to(torch.promote_types(model.dtype, torch.float32))
    learner: nn.Module = Learner(trained, recorded=True)
    if ranks > 1:
        learner = nn.parallel.DistributedDataParallel(learner, process_group=group)
    ids = torch.randint(model.config.vocab_size, (batch, length + 1), device=model.device)
    row = training.measured(trained, training.learning(learner, trained), ids)
    figures = torch.tensor([row["seconds"], row["peak_gib"]], dtype=torch.float64, device=ids.device)
    dist.all_reduce(figures, dist.ReduceOp.MAX, group)
    return row | dict(zip(("seconds", "peak_gib"), figures.tolist()))


def _measured(
    run: Callable[..., Tensor], model: LM, ids: Tensor, segment: int, group: dist.ProcessGroup, ranks: int
) -> tuple[Row, Tensor | None]:
    cuda, times, result, note = ids.is_cuda, [], None, ""
    over = group if ranks > 1 else None
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else math.nan
    try:
        run(model, ids[:, : segment * ranks + 1], segment, over)  # compiles
        for _ in range(3):
            if cuda:
                torch.cuda.synchronize()
            dist.barrier(group)
            began = time.perf_counter()
            result = run(model, ids, segment, over)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as problem:
        if ranks > 1:  # the others wait for this one
            raise
        note = str(problem).splitlines()[0][:80]
    model.zero_grad()
    peak = torch.cuda.max_memory_allocated() if cuda else math.nan
    figures = torch.tensor(
        [median(times) if times else math.nan, peak / 2**30, (peak - before) / 2**30],
        dtype=torch.float64,
        device=ids.device,
    )
    dist.all_reduce(figures, dist.ReduceOp.MAX, group)
    seconds, peak, more = figures.tolist()
    speed = (ids.shape[1] - 1) / seconds
    row = {"seconds": seconds, "tokens_per_second": speed, "peak_gib": peak, "more_gib": more, "note": note}
    return row, result


@torch.inference_mode()
def _read(model: LM, ids: Tensor, segment: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the logits (1, V) after all tokens: the last is read by every rank alone, from the cache of the others."""
    cache = Cache()
    at_once = segment * (1 if group is None else dist.get_world_size(group))
    with nullcontext() if group is None else sequence_parallel(model, group):
        for tokens in ids[:, :-1].tensor_split(math.ceil((ids.shape[1] - 1) / at_once), 1):
            model(tokens if group is None else tokens[:, stretch(tokens.shape[1], group)], cache)
    return model.logits(model(ids[:, -1:], cache)[:, -1])


def _train(model: LM, ids: Tensor, segment: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return all gradients, one after the other."""
    model.zero_grad()
    inputs, targets = (ids[:, :-1], ids[:, 1:]) if group is None else shard(ids, group)
    with nullcontext() if group is None else sequence_parallel(model, group):
        (model.losses(model(inputs), targets).sum() / (ids.shape[1] - 1)).backward()
    if group is not None:
        reduce_gradients(model, group)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
