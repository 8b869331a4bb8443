"""Reads of a model in training, recorded as CUDA graphs and replayed: launched from Python one by one, the kernels of a
segment leave a GPU idle most of the time (of a 370M model, any segment of up to 8K tokens takes as long as another).

Forward and backward of a read become one autograd function each (`torch.cuda.make_graphed_callables`), a kind of read
at a time: its sizes, whether it begins, whether gradients go on to what came before. Gradients still reach parameters
one by one, so that DDP works around it. All graphs share one pool of memory, which is that of the largest: they are
replayed one after the other, and what a read hands on, either way, is copied out of it.

A graph takes and gives tensors alone: those are the states of a cache in a fixed order (`carries.states`). Positions
are on the CPU and are counted on beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.train.carries import integers, state_map, states, with_integers, with_states

MOST = 8  # kinds that are recorded; more than a stream's segments and its last, with and without gradients, are rare
Read = Callable[[LM, Tensor, Tensor | None, Cache | None], tuple[Tensor | None, Cache]]
Replay = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """The recorded reads of a model.

    Args:
        read: what is recorded: a function of (model, ids, targets, before).
    """

    def __init__(self, model: LM, read: Read):
        self.model, self.read = model, read
        self.kernels = model.backend == "triton"
        self.pool: Any = None
        self.recordings: dict[tuple, tuple[_Read, Replay]] = {}

    def __call__(self, ids: Tensor, targets: Tensor | None, before: Cache | None) -> tuple[Tensor | None, Cache]:
        """Return what `read` does; it is called where there is nothing to replay."""
        carried = [] if before is None else states(before)
        graded = torch.is_grad_enabled()
        kind = (
            ids.shape,
            targets is None,
            before is None,
            graded,
            any(t.requires_grad for t in carried),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
        )
        if not self.fits() or (kind not in self.recordings and len(self.recordings) == MOST):
            return self.read(self.model, ids, targets, before)
        inputs = (ids, *([] if targets is None else [targets]), *carried)
        if graded:
            for p in self.model.parameters():  # a first gradient would not be added but kept: a buffer of the graph
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            for t in carried:
                if t.requires_grad:
                    t.register_hook(torch.clone)
        if kind not in self.recordings:
            read = _Read(self.model, self.read, targets is not None, before)
            self.recordings[kind] = read, self._recorded(read, inputs, graded)
        read, replay = self.recordings[kind]
        outputs = replay(*inputs)
        losses, after = (None, outputs) if targets is None else (outputs[0], outputs[1:])
        return losses, read.cache([t.clone() for t in after], before, ids.shape[1])

    def fits(self) -> bool:
        """Whether all layers are recurrent, so that what they carry keeps its size, and all that they do are kernels,
        which look at no numbers between them and at no position."""
        m = self.model
        return (
            self.kernels
            and len(m.mixers) == len(m.layers)
            and m.restart is None
            and m.spread is None
            and all(
                (x.policy is PLAIN or x.policy == PLAIN) and x.observer is None and x.backend in (None, "triton")
                for x in m.mixers
            )
        )

    def _recorded(self, read: _Read, inputs: tuple[Tensor, ...], graded: bool) -> Replay:
        buffers = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        if not graded:
            return recorded(read, buffers, self.pool)
        # The parameters by other names: DDP holds on to the nodes that add up their own gradients, which belong to
        # another stream than the one that records.
        parameters = dict(read.named_parameters())
        aliases = tuple(p.detach().requires_grad_(p.requires_grad) for p in parameters.values())

        def of_tensors(*values: Tensor) -> tuple[Tensor, ...]:
            return functional_call(read, dict(zip(parameters, values[len(inputs) :])), values[: len(inputs)])

        with torch.autocast("cuda", enabled=False):  # gradients are outside of what `read` enters
            replay: Any = torch.cuda.make_graphed_callables(of_tensors, (*buffers, *aliases), pool=self.pool)
        return lambda *inputs: replay(*inputs, *parameters.values())


def recorded(read: nn.Module, buffers: tuple[Tensor, ...], pool: Any) -> Replay:
    """Record `read` without gradients; what the replay returns is overwritten by the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        read(*buffers)  # compiles and allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = read(*buffers)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        for buffer, t in zip(buffers, inputs, strict=True):
            buffer.copy_(t)
        graph.replay()
        return outputs

    return replay


class _Read(nn.Module):
    """A read of tensors alone, under the autocast there is where it is made; it keeps no casts of weights, which the
    next update changes.

    Args:
        scored: whether there are targets.
        before: a cache whose states the tensors stand for, or None.
    """

    def __init__(self, model: LM, read: Read, scored: bool, before: Cache | None):
        super().__init__()
        self.model, self.read, self.scored = model, read, scored
        self.amp = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}
        self.before = None if before is None else _outline(before)
        self.after: Cache | None = None

    def forward(self, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        targets, carried = (rest[0], rest[1:]) if self.scored else (None, rest)
        before = None if self.before is None else with_states(self.before, carried)
        with torch.autocast("cuda", cache_enabled=False, **self.amp):  # type: ignore[arg-type]
            losses, after = self.read(self.model, ids, targets, before)
        if self.after is None:
            self.after = _outline(after)
        return *([] if losses is None else [losses]), *states(after)

    def cache(self, carried: list[Tensor], before: Cache | None, length: int) -> Cache:
        """Return the cache of these states, `length` tokens after `before`."""
        assert self.after is not None
        cache = with_states(self.after, carried, lambda tally: tally)
        if before is None:
            positions = [torch.full_like(t, length) for t in integers(cache)]
        else:
            positions = [t + length for t in integers(before)]
        return with_integers(cache, positions)


def _outline(cache: Cache) -> Cache:
    """Return what of a cache is no state: that without any numbers, and zero for running sums."""
    return state_map(lambda tensor: tensor.detach().to("meta"), cache)
