"""Softmax attention by patterns on flash attention's kernels, for rows that stand at one place of a document, without a
score in memory: dilated attention, which `rnn_longctx.models.mixers.dilated` defines, with one pattern of one
segment full attention that goes on from what is held, and what chunk-Linformer reads beside its own chunk.

The taken tokens of segments of one length are gathered into a batch, which `aten::_scaled_dot_product_flash_attention`
reads: of all segments of a pattern in one call, beside two for a segment that an earlier call began, of this call's
tokens and of those held, and one for the last that this call leaves unfinished. Besides its outputs the kernel returns
every query's log-sum-exp, by which parts are merged.

It has no gradient through that. None is needed: of one softmax over the keys of all parts, with outputs y and
log-sum-exp z, the share of a key is exp(score - z), and its score's gradient share * (dy . value - dy . y), whatever
part it stands in. So the kernel's backward, called on each part with the merged y and z in the place of the part's own,
gives that part's share of all gradients, exactly. What backward needs is q, k, v, y and z.

On a CPU PyTorch's own flash attention stands in the kernel's place, in any precision; on a GPU the numbers are bfloat16
or float16 (`readable`), and what is not takes the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnn_longctx.models.kernels import choose

BATCH = 65535  # sequences of one call, by the kernel's grid
WIDEST = 256  # channels of a head, by the kernel


@dataclass(frozen=True)
class Pattern:
    """Segments of `segment` tokens, of which a head takes every `dilation`-th."""

    segment: int
    dilation: int

    @property
    def memory(self) -> int:
        """Taken tokens of a segment that a later one of it may read: what a stream must hold of them."""
        return self.segment // self.dilation - 1


@dataclass(frozen=True)
class Part:
    """Segments of a pattern that one call of a kernel reads, and of which heads.

    A rank is the index of a token in the call under the pattern: of rank i a head takes one of the r tokens from i * r
    on. Views are (B, segments, size, G, n, C): n heads of neighbouring shifts, G times.

    Attributes:
        pattern: the pattern.
        heads: the first head, and the one after the last.
        first: the rank at which the segments begin in the call.
        segments: how many there are.
        size: the taken tokens that the call has of each.
        begun: how many of the first one's stand before the call.
    """

    pattern: Pattern
    heads: tuple[int, int]
    first: int
    segments: int
    size: int
    begun: int

    def view(self, x: Tensor) -> Tensor:
        """Return the view of what stands in x (B, T, H, C) at these tokens; T is a multiple of the dilation."""
        r, (begin, end) = self.pattern.dilation, self.heads
        shifts = min(r, end - begin)
        tokens = slice(self.first * r, (self.first + self.segments * self.size) * r)
        ranks = x[:, tokens, begin:end].unflatten(1, (-1, r))[:, :, :shifts]  # (B, R, n, heads, C)
        taken = ranks.unflatten(3, (-1, shifts)).diagonal(0, 2, 4).movedim(-1, 3)  # (B, R, G, n, C)
        return taken.unflatten(1, (self.segments, self.size))

    def sequences(self, x: Tensor) -> Tensor:
        """Return what stands in x (B, T, H, C) at these tokens, as (B * segments, heads, size, C)."""
        return self.view(x).flatten(3, 4).flatten(0, 1).transpose(1, 2)

    def placed(self, sequences: Tensor) -> Tensor:
        """Return sequences in the shape of `view`."""
        begin, end = self.heads
        shifts = min(self.pattern.dilation, end - begin)
        return sequences.transpose(1, 2).unflatten(0, (-1, self.segments)).unflatten(3, (-1, shifts))

    def before(self, held: Tensor) -> Tensor:
        """Return the view (B, heads, begun, C) of what is held (B, H, M, C) of the first segment."""
        return held[:, slice(*self.heads), held.shape[2] - self.begun :]


@dataclass(frozen=True)
class Stretches:
    """Stretches of a text, of one size and at one distance, that one call of a kernel reads, of all heads.

    Attributes:
        first: where the first one begins.
        count: how many there are.
        size: the tokens of each.
        step: from where one begins to where the next does.
    """

    first: int
    count: int
    size: int
    step: int

    def view(self, x: Tensor) -> Tensor:
        """Return the view (B, count, size, 1, H, C) of what stands in x (B, T, H, C) at these tokens."""
        tokens = slice(self.first, self.first + (self.count - 1) * self.step + self.size)
        return x[:, tokens].unfold(1, self.size, self.step).movedim(-1, 2).unsqueeze(3)

    def sequences(self, x: Tensor) -> Tensor:
        """Return what stands in x (B, T, H, C) at these tokens, as (B * count, H, size, C)."""
        return self.view(x).squeeze(3).flatten(0, 1).transpose(1, 2)

    def placed(self, sequences: Tensor) -> Tensor:
        """Return sequences in the shape of `view`."""
        return sequences.transpose(1, 2).unflatten(0, (-1, self.count)).unsqueeze(3)


@dataclass(frozen=True)
class At:
    """What is read of a call: `length` tokens from position `start` on, a multiple of every dilation. Beyond them may
    stand zeros, up to a multiple of every dilation: a head that takes one of them reads it, and it is read by none."""

    patterns: tuple[Pattern, ...]
    start: int
    length: int

    def calls(self, q: Tensor, k: Tensor, v: Tensor, held: Sequence[Tensor], views: bool = False) -> Iterator[Call]:
        """Yield the calls of a kernel: of a segment that was begun before, one for the tokens of this call, and one for
        those that are held, keys and values of each pattern. views: as places to add to."""
        for i, pattern in enumerate(self.patterns):
            for part in parts_of(pattern, q.shape[2], self):
                queries, keys, values = (part.view(x) if views else part.sequences(x) for x in (q, k, v))
                yield Call(part, queries, keys, values, True)
                if part.begun:
                    yield Call(part, queries, part.before(held[2 * i]), part.before(held[2 * i + 1]), False)


class Call(NamedTuple):
    """A call of a kernel.

    Attributes:
        part: where its queries stand.
        queries, keys, values: sequences (b, h, n, C) of them; or the places that their gradients are added to.
        causal: whether a query reads the keys up to its own place alone; else it reads all.
    """

    part: Part | Stretches
    queries: Tensor
    keys: Tensor
    values: Tensor
    causal: bool


def parts_of(pattern: Pattern, heads: int, at: At) -> Iterator[Part]:
    """Yield the parts of a call under a pattern."""
    r, size = pattern.dilation, pattern.segment // pattern.dilation
    begun, ranks = at.start % pattern.segment // r, -(-at.length // r)
    first = min(size - begun, ranks) if begun else 0
    whole, rest = divmod(ranks - first, size)
    stretches = [(0, 1, first, begun), (first, whole, size, 0), (ranks - rest, 1, rest, 0)]
    whole_groups = heads // r * r
    for group in ((0, whole_groups), (whole_groups, heads)):
        for place, segments, tokens, earlier in stretches:
            if segments and tokens and group[0] < group[1]:
                yield Part(pattern, group, place, segments, tokens, earlier)


def readable(q: Tensor) -> bool:
    """Return whether the kernels read queries (..., D) of this type, size and device."""
    if q.device.type == "cpu":
        return True
    half = q.dtype in (torch.bfloat16, torch.float16)
    fits = half and q.shape[-1] % 8 == 0 and q.shape[-1] <= WIDEST
    return choose.FUSED_LAYERS and q.device.type == "cuda" and fits


def one_softmax(q: Tensor, k: Tensor, v: Tensor, held: list[tuple[Tensor, Tensor]], at: At) -> Tensor:
    """Return what queries (B, T, H, D) read of keys and values (B, T, H, D), and of those (B, H, M, D) that are held of
    each pattern's segment before; T is a multiple of every dilation."""
    return _OneSoftmax.apply(q, k, v, at, *(tensor.to(k.dtype) for pair in held for tensor in pair))


class _OneSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: At, *held: Tensor) -> Tensor:
        log_sums = q.new_full((*q.shape[:3], 1), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        read = []
        for part, queries, keys, values, causal in at.calls(q, k, v, held):
            output, log_sum = _attended(queries, keys, values, causal)
            log_sum = part.placed(log_sum[..., None])
            total = part.view(log_sums)
            torch.logaddexp(total, log_sum, out=total)
            read.append((part, causal, part.placed(output), log_sum))
        first = at.patterns[0]
        everywhere = first.dilation == 1  # then its parts write to every place first, and the others add
        y = (torch.empty_like if everywhere else torch.zeros_like)(q, memory_format=torch.contiguous_format)
        y[:, at.length :] = 0
        for part, causal, output, log_sum in read:
            place, weight = part.view(y), (log_sum - part.view(log_sums)).exp_()
            if everywhere and causal and isinstance(part, Part) and part.pattern == first:
                torch.mul(output, weight, out=place)
            else:
                place.addcmul_(output, weight)
        ctx.save_for_backward(q, k, v, y, log_sums, *held)
        ctx.at = at
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sums, *held = ctx.saved_tensors
        (dy,) = gradients
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        d_held = [torch.zeros_like(x) for x in held]
        calls = ctx.at.calls(q, k, v, held)
        places = ctx.at.calls(dq, dk, dv, d_held, views=True)
        for (part, queries, keys, values, causal), (_, *into, _) in zip(calls, places, strict=True):
            merged = part.sequences(y), part.sequences(log_sums)[..., 0]
            of_call = _gradients(part.sequences(dy), queries, keys, values, *merged, causal)
            for place, gradient in zip(into, of_call):
                place.add_(part.placed(gradient) if place.dim() > gradient.dim() else gradient)
        return dq, dk, dv, None, *d_held


def _attended(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return outputs (b, h, n, D) and log-sum-exps (b, h, n) of queries (b, h, n, D)."""
    aten: Any = torch.ops.aten
    op = aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    read = [op(*some, 0.0, causal)[:2] for some in zip(*(x.split(BATCH) for x in (q, k, v)))]
    return read[0] if len(read) == 1 else tuple(map(torch.cat, zip(*read)))  # type: ignore[return-value]


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sum: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of queries, keys and values, where y and log_sum may be those of more keys than these."""
    aten: Any = torch.ops.aten
    made = []
    for some in zip(*(x.split(BATCH) for x in (dy, q, k, v, y, log_sum.contiguous()))):
        if q.is_cuda:
            seeds = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))  # there is no dropout
            lengths = None, None, q.shape[2], k.shape[2]
            made.append(aten._scaled_dot_product_flash_attention_backward(*some, *lengths, 0.0, causal, *seeds))
        else:
            made.append(aten._scaled_dot_product_flash_attention_for_cpu_backward(*some, 0.0, causal))
    return made[0] if len(made) == 1 else tuple(map(torch.cat, zip(*made)))
