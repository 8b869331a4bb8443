"""One layer of LongNet over several ranks against one of them, at as many tokens a rank and at as many in all. Under
torchrun; rows of `rnn-longctx bench parallel --mixer longnet`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench.base import Row
from rnn_longctx.eval.bench.delta_layer import fused_layers
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.mixers.dilated_ranks import Cut, refuse_many
from rnn_longctx.models.mixers.longnet import LongNet
from rnn_longctx.recurrence.shard import Shard
from rnn_longctx.recurrence.span import Span
from rnn_longctx.train.parallel import reduce_gradients

WIDTH, HEADS, REPEATS = 1024, 8, 5


def geometric(length: int, heads: int = HEADS, shortest: int = 2048) -> str:
    """Return a LongNet of the paper's kind for `length` tokens: segments from `shortest` tokens on, each four times as
    long and as far dilated as the one before, the last one as long as the text."""
    segments, dilations = [shortest], [1]
    while segments[-1] < length:
        dilation = 4 * dilations[-1]
        segments.append(min(4 * segments[-1], -(-length // dilation) * dilation))
        dilations.append(dilation)
    texts = ("/".join(map(str, numbers)) for numbers in (segments, dilations))
    return "longnet:heads={},segments={},dilations={}".format(heads, *texts)


def layer_of(mixer: str, length: int, width: int = WIDTH) -> LongNet:
    """Return the layer of a spec; "longnet" alone is `geometric`. The same random weights everywhere. Raises InputError
    for another mixer."""
    text = geometric(length) if mixer == "longnet" else mixer
    torch.manual_seed(0)
    (layer,) = ModelConfig(text, d_model=width, n_layer=1).make_mixers()
    if not isinstance(layer, LongNet):
        raise InputError(f"--mixer: expected mamba2 or longnet, got {mixer!r}")
    return layer


def longnet_rows(layer: LongNet, length: int) -> Iterator[Row]:
    """Yield rows for 1, 2, 4, ... ranks, on rank 0; others yield none. Collective. `length` tokens are those of all
    ranks together, and each holds its share, at any number of them.

        forward    the layer without gradients
        both       forward and backward, the weights' gradients summed over the ranks

    For each number n of ranks two rows, one of a rank alone that reads all n shares: every rank does that at once, so
    that each is as warm as among others.

        seconds        the median, of the slowest rank
        efficiency     the time of a rank alone with one share, over that of n ranks with n
        of_ideal       an n-th of the time of a rank alone with all n shares, over that of n ranks
        bytes_a_token  of keys and values, what the rank that is sent most gets, over its tokens
        error          of outputs, or of all gradients, relative, against the rank alone; the largest of any rank

    Raises:
        InputError: more ranks than shortest segments, on every rank, before anything is measured.
    """
    weight = layer.in_proj.weight
    world, rank, device = dist.get_world_size(), dist.get_rank(), weight.device
    share, numbers = length // world, sorted({2**i for i in range(world.bit_length())} | {world})
    for ranks in reversed(numbers):
        refuse_many(layer.patterns, ranks, 0, ranks * share)
    least: dict[str, float] = {}
    fused = fused_layers(True) if device.type == "cuda" else nullcontext()
    with fused:
        for ranks in numbers:
            group = dist.new_group(list(range(ranks)))  # which every rank must make
            for what in ("forward", "both") if rank < ranks else ():
                inputs = _inputs(range(ranks), share, weight)
                alone, expected = _measured(_reader(what, layer, inputs, None), group, False)
                least.setdefault(what, alone["seconds"])
                shared = {"what": what, "length": ranks * share, "share": share}
                if rank == 0:
                    yield {**shared, "ranks": 1, **alone, "efficiency": math.nan, "of_ideal": math.nan,
                           "bytes_a_token": 0.0, "error": math.nan}  # fmt: skip
                if ranks == 1:
                    continue
                if expected is not None:
                    own = slice(rank * share, (rank + 1) * share)
                    expected = [expected[0][:, own].clone(), *expected[1:]]
                inputs = inputs[:, rank * share : (rank + 1) * share].clone()
                spread = Shard(group, rank, [share] * ranks, torch.full((ranks, 1), -1), torch.tensor(rank == 0))
                row, result = _measured(_reader(what, layer, inputs, spread), group, True)
                error = math.nan if expected is None or result is None else max(map(_error, result, expected))
                error = _most([error], group, device)[0]
                received = Cut.of(spread, 0, layer.patterns).rows_received(ranks - 1)
                if rank == 0:
                    sent = 2 * layer.in_proj.in_features * weight.element_size() * received
                    yield {
                        **shared,
                        "ranks": ranks,
                        **row,
                        "efficiency": least[what] / row["seconds"],
                        "of_ideal": alone["seconds"] / ranks / row["seconds"],
                        "bytes_a_token": sent / share,
                        "error": error,
                    }
            dist.barrier()


def _inputs(shares: range, share: int, like: Tensor) -> Tensor:
    """Return what the layer reads (1, T, d_model), of each share the same on every rank."""
    parts = []
    for i in shares:
        draw = torch.Generator(like.device).manual_seed(i)
        size = 1, share, like.shape[1]
        parts.append(torch.randn(size, generator=draw, device=like.device, dtype=like.dtype))
    return torch.cat(parts, 1)


def _reader(what: str, layer: LongNet, inputs: Tensor, spread: Shard | None) -> Callable[[], list[Tensor]]:
    """Return a function that reads the inputs, and returns the outputs, or all gradients, first that of the inputs."""
    span: Any = Span(shard=spread)

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return [layer(inputs, None, span)[0]]

    def both() -> list[Tensor]:
        layer.zero_grad()
        u = inputs.detach().requires_grad_()
        layer(u, None, span)[0].backward(inputs)
        if spread is not None:
            reduce_gradients(layer, spread.group)
        assert u.grad is not None
        return [u.grad, *_gradients(layer)]

    return forward if what == "forward" else both


def _gradients(layer: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in layer.parameters() if p.grad is not None]


def _measured(
    read: Callable[[], list[Tensor]], group: dist.ProcessGroup, together: bool
) -> tuple[Row, list[Tensor] | None]:
    """Return the figures of a call, and its result; None where a rank alone has not the memory for it. together:
    whether the ranks read together, and begin so."""
    cuda, times, result, note = torch.cuda.is_available(), [], None, ""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier(group)
    try:
        for i in range(REPEATS + 1):  # the first one compiles
            result = None
            if cuda:
                torch.cuda.synchronize()
            if together:
                dist.barrier(group)
            began = time.perf_counter()
            result = read()
            if cuda:
                torch.cuda.synchronize()
            if i:
                times.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as problem:
        if together:  # the others wait for this one
            raise
        result, note = None, str(problem).splitlines()[0][:80]
    seconds = median(times) if len(times) == REPEATS else math.nan
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
    device = torch.device("cuda" if cuda else "cpu")
    figures = _most([seconds, peak], group, device)
    return {"seconds": figures[0], "peak_gib": figures[1], "note": note}, result


def _most(values: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Return the largest of each value over the ranks; NaN where one is."""
    figures = torch.tensor(values, dtype=torch.float64, device=device)
    missing = figures.isnan().double()
    figures = figures.nan_to_num(0.0)
    dist.all_reduce(figures, dist.ReduceOp.MAX, group)
    dist.all_reduce(missing, dist.ReduceOp.MAX, group)
    return figures.masked_fill(missing > 0, math.nan).tolist()


def _error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
