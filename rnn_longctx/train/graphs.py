"""Reads of a model in training, recorded as CUDA graphs and replayed: launched from Python one by one, the kernels of a
segment leave a GPU idle most of the time (of a 370M model, any segment of up to 8K tokens takes as long as another).

Forward and backward of a read become one autograd function each (`torch.cuda.make_graphed_callables`), a kind of read
at a time: its sizes, whether it begins, whether gradients go on to what came before. Gradients still reach parameters
one by one, so that DDP works around it. All graphs share one pool of memory, which is that of the largest: they are
replayed one after the other, and what a read hands on, either way, is copied out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnn_longctx.recurrence.policy import PLAIN

if TYPE_CHECKING:
    from rnn_longctx.train.passing import States

MOST = 8  # kinds that are recorded; more than a stream's segments and its last, with and without gradients, are rare
Read = Callable[[Any, Tensor, Tensor | None, "States | None"], tuple[Tensor | None, "States"]]
Replay = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """Args: read: what is recorded, of (model, ids, targets, before)."""

    def __init__(self, model: Any, read: Read):
        self.model, self.read = model, read
        self.kernels = model.backend == "triton"
        self.pool: Any = None
        self.made: dict[tuple, Replay] = {}

    def __call__(self, ids: Tensor, targets: Tensor | None, before: States | None) -> tuple[Tensor | None, States]:
        """As `read`, or by it where there is nothing to replay."""
        flat = [] if before is None else [t for pair in before for t in pair]
        graded = torch.is_grad_enabled()
        kind = (ids.shape, targets is None, before is None, graded, any(t.requires_grad for t in flat),
                torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))  # fmt: skip
        if not self.fits() or (kind not in self.made and len(self.made) == MOST):
            return self.read(self.model, ids, targets, before)
        given = (ids, *([] if targets is None else [targets]), *flat)
        if graded:
            for p in self.model.parameters():  # a first gradient would not be added but kept: a buffer of the graph
                if p.requires_grad and p.grad is None:
                    p.grad = torch.zeros_like(p)
            for t in flat:
                if t.requires_grad:
                    t.register_hook(torch.clone)
        if kind not in self.made:
            self.made[kind] = self._recorded(given, targets is not None, graded)
        found = self.made[kind](*given)
        losses, after = (None, found) if targets is None else (found[0], found[1:])
        own = [t.clone() for t in after]
        return losses, list(zip(own[::2], own[1::2], strict=True))

    def fits(self) -> bool:
        """Whether all the model does with it are kernels, no look at numbers between them."""
        m = self.model
        return (
            self.kernels
            and m.restart is None
            and m.spread is None
            and all(
                (x.policy is PLAIN or x.policy == PLAIN) and x.observer is None and x.backend in (None, "triton")
                for x in m.mixers
            )
        )

    def _recorded(self, given: tuple[Tensor, ...], asked: bool, graded: bool) -> Replay:
        buffers = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in given)
        read = _Read(self.model, self.read, asked)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        if not graded:
            return recorded(read, buffers, self.pool)
        # The parameters by other names: DDP holds on to the nodes that add up their own gradients, which belong to
        # another stream than the one that records.
        parameters = dict(read.named_parameters())
        aliases = tuple(p.detach().requires_grad_(p.requires_grad) for p in parameters.values())

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            return functional_call(read, dict(zip(parameters, tensors[len(given) :])), tensors[: len(given)])

        with torch.autocast("cuda", enabled=False):  # gradients are outside of what `read` enters
            replay: Any = torch.cuda.make_graphed_callables(of_tensors, (*buffers, *aliases), pool=self.pool)
        return lambda *given: replay(*given, *parameters.values())


def recorded(read: nn.Module, buffers: tuple[Tensor, ...], pool: Any) -> Replay:
    """`read` without gradients; what it returns is overwritten by the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        read(*buffers)  # compiles and allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        found = read(*buffers)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        for own, t in zip(buffers, given, strict=True):
            own.copy_(t)
        graph.replay()
        return found

    return replay


class _Read(nn.Module):
    """A read of tensors alone, under the autocast there is where it is made; it keeps no casts of weights, which the
    next update changes."""

    def __init__(self, model: Any, read: Read, asked: bool):
        super().__init__()
        self.model, self.read, self.asked = model, read, asked
        self.amp = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}

    def forward(self, ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        targets, flat = (rest[0], rest[1:]) if self.asked else (None, rest)
        before = list(zip(flat[::2], flat[1::2], strict=True)) if flat else None
        with torch.autocast("cuda", cache_enabled=False, **self.amp):  # type: ignore[arg-type]
            losses, after = self.read(self.model, ids, targets, before)
        return *([] if losses is None else [losses]), *(t for pair in after for t in pair)
