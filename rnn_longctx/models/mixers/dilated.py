"""Dilated attention (LongNet, arXiv 2307.02486): softmax over several patterns of a document, each sparse.

A pattern cuts a document from its first token on into segments of w tokens. Of a segment head j takes the tokens whose
positions are j modulo r: each of them reads those taken up to itself, and a token that is not taken reads nothing.
Patterns are merged by their denominators, with gradients: that is one softmax over all keys that the patterns give a
token, a key as often as it is given. A token that no pattern takes gets zero.

Work and memory are linear in T: the taken tokens are gathered. Of rows that all stand at one place of a document the
kernels of `rnn_longctx.models.flash` read them, and a single token reads what is held as it stands, without a
gather. Rows with padding, with documents that begin inside a call, or that have read unequally much take the plain path
of this file: it compares a token with the w / r taken last, and scores are in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.models.attention import weighed
from rnn_longctx.models.flash import At, Pattern, one_softmax, readable

CHUNK = 256  # queries at most that are compared with one stretch of keys


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Where the tokens of a call stand.

    Attributes:
        position: (B, T), of each token in its document, from 0 on; below 0 at padding.
        before: (B,), tokens of the document that each row goes on with which earlier calls read.
        forgotten: (B,), how many of those, its first ones, are read no more.
        documents: whether further documents may begin inside the call.
        start: the position of the first token, where it is the same in all rows, the others follow it one by one and
            nothing is forgotten; None elsewhere.
    """

    position: Tensor
    before: Tensor
    forgotten: Tensor
    documents: bool
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Taken:
    """The tokens of a call that each head takes under a pattern, in their order, behind those that a stream holds.

    M tokens are held, the newest at the right end; of a call's there is room for N, filled from the left. A segment's
    label is the place in the call where it begins (below 0: in an earlier call); T + 1 labels what is no token.

    Attributes:
        taken: (B, H, T) bool, whether a head takes a token.
        rank: (B, H, T), the index in N of each taken token.
        source: (B, H, N), the place in the call of each taken token.
        count: (B, H), how many are taken.
        label: (B, H, M + N), the segment of each token.
        current: (B,), the label of the segment that the stream goes on with; T where a new one begins.
    """

    taken: Tensor
    rank: Tensor
    source: Tensor
    count: Tensor
    label: Tensor
    current: Tensor

    @classmethod
    def of(cls, pattern: Pattern, heads: int, at: TokenPlaces) -> Taken:
        w, r = pattern.segment, pattern.dilation
        rows, length = at.position.shape
        device, nowhere = at.position.device, length + 1
        shift = torch.arange(heads, device=device)[:, None] % r  # (H, 1)
        position = at.position[:, None]  # (B, 1, T)
        taken = (position % r == shift) & (position >= 0)
        rank, count = taken.cumsum(2) - 1, taken.sum(2)
        # where documents begin anew, a head may take more than every r-th token
        room = max(1, int(count.max())) if at.documents else -(-length // r)
        places = torch.arange(length, device=device)
        source = places.new_zeros(rows, heads, room + 1)  # (the last one for tokens that are not taken)
        source = source.scatter_(2, rank.where(taken, room), places.expand_as(rank))[..., :room]
        begin = (places - at.position % w)[:, None].expand(-1, heads, -1).gather(2, source)
        label = begin.where(torch.arange(room, device=device) < count[..., None], nowhere)
        newest = at.before[:, None, None] - 1
        newest = newest - (newest - shift) % r  # (B, H, 1), the last position that a head took
        held = newest - r * torch.arange(pattern.memory - 1, -1, -1, device=device)  # (B, H, M) positions
        first = at.before // w * w  # (B,), where its segment began
        readable = held >= torch.maximum(first, at.forgotten)[:, None, None]
        held_label = (first - at.before)[:, None, None].where(readable, nowhere)
        current = length - (at.position[:, -1] + 1) % w
        return cls(taken, rank, source, count, torch.cat([held_label, label], 2), current)


Held = list[tuple[Tensor, Tensor]]  # keys and values of each pattern's present segment, (B, H, M, D)


def dilated(
    q: Tensor, k: Tensor, v: Tensor, held: Held, patterns: tuple[Pattern, ...], at: TokenPlaces, equal: bool = False
) -> tuple[Tensor, Held]:
    """Return what queries (B, H, T, D) read of keys and values (B, H, T, D), and of those (B, H, M, D) that are held of
    each pattern's segment before the call; and what is held after it, zero where that is no token. equal: what patterns
    read of a token has equal weights, in the place of those of one softmax."""
    if equal:
        return _plain(q, k, v, held, patterns, at, equal)
    length, step = q.shape[2], math.lcm(*(pattern.dilation for pattern in patterns))
    if at.start is None or length == 1 or not readable(q):
        return _plain(q, k, v, held, patterns, at)
    ahead = -at.start % step  # tokens up to where every head has taken as many
    if ahead == 0:
        return _even(q, k, v, held, patterns, at.start)
    outputs = []
    for begin, end in ((0, min(ahead, length)), (ahead, length)):
        if begin < end:
            start, position = at.start + begin, at.position[:, begin:end]
            places = replace(at, position=position, before=at.before + begin, start=None if begin == 0 else start)
            queries, keys, values = (x[:, :, begin:end] for x in (q, k, v))
            y, held = dilated(queries, keys, values, held, patterns, places)
            outputs.append(y)
    return torch.cat(outputs, 2), held


def one_token(
    q: Tensor, k: Tensor, v: Tensor, held: tuple[Tensor, Tensor], patterns: tuple[Pattern, ...], place: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return what `dilated` does, of one token at a place of its document. held: keys and values (B, H, S, D), in which
    those of the patterns stand one after another.

    A head's scores are of all that is held of any pattern, and what it does not read gets no weight: where it does not
    take the token, or from before the segment. That is little, and a gather of the rest would take longer."""
    keys, values = (x.to(new.dtype) for x, new in zip(held, (k, v)))
    heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    scores = torch.cat([q @ keys.mT, q @ k.mT], 3).to(wide) / math.sqrt(q.shape[3])  # (B, H, 1, S + 1)
    least = torch.finfo(wide).min  # (not -inf: of a head that no pattern gives anything the softmax would be NaN)
    bias = torch.full((heads, scores.shape[3]), least, dtype=wide, device=q.device)
    times, after, end = bias.new_zeros(heads), (keys.clone(), values.clone()), 0
    for pattern in patterns:
        begin, end = end, end + pattern.memory
        taken = slice(place % pattern.dilation, None, pattern.dilation)  # the heads that take it
        bias[taken, end - place % pattern.segment // pattern.dilation : end] = 0
        times[taken] += 1
        for x, before, new in zip(after, (keys, values), (k, v)):
            if (place + 1) % pattern.segment == 0:
                x[:, :, begin:end] = 0
            elif begin < end:
                x[:, taken, begin : end - 1] = before[:, taken, begin + 1 : end]
                x[:, taken, end - 1 : end] = new[:, taken]
    bias[:, -1] = times.log().clamp(min=least)  # itself, as often as patterns give it
    weights = ((scores + bias[:, None]).softmax(3) * (times > 0)[:, None, None]).to(v.dtype)
    return weights[..., :-1] @ values + weights[..., -1:] * v, after


def _even(
    q: Tensor, k: Tensor, v: Tensor, held: Held, patterns: tuple[Pattern, ...], start: int
) -> tuple[Tensor, Held]:
    """Return what `dilated` does, of rows that go on at the position `start`, a multiple of every dilation."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    after = [
        (_held_after(k, keys, pattern, start), _held_after(v, values, pattern, start))
        for pattern, (keys, values) in zip(patterns, held)
    ]
    length = q.shape[1]
    behind = -length % math.lcm(*(pattern.dilation for pattern in patterns))
    if behind:  # no token reads those after it
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, behind)) for x in (q, k, v))
    y = one_softmax(q, k, v, held, At(patterns, start, length))
    return y[:, :length].transpose(1, 2), after


def taken_before(pattern: Pattern, heads: int, end: int, device: torch.device) -> Tensor:
    """Return the positions (H, M) of the last tokens that heads took before the position `end`, the newest at the right
    end; of earlier segments, too, and below 0 where there is none."""
    r, head = pattern.dilation, torch.arange(heads, device=device)[:, None]  # (H, 1)
    newest = end - 1 - (end - 1 - head) % r
    return newest - r * torch.arange(pattern.memory - 1, -1, -1, device=device)


def moved(held: Tensor, pattern: Pattern, start: int, end: int) -> Tensor:
    """Return what was held (B, H, M, D) of a segment before the position `start` as it stands before `end`: of the
    segment that goes on there, zero where that is no token or stands from `start` on."""
    r, memory, heads = pattern.dilation, pattern.memory, held.shape[1]
    position, head = taken_before(pattern, heads, end, held.device), torch.arange(heads, device=held.device)[:, None]
    before = memory - 1 - (start - 1 - (start - 1 - head) % r - position) // r  # its index in `held`
    gone = (position >= start) | (position < end // pattern.segment * pattern.segment)
    return held[:, head, before.clamp(0, memory - 1)].masked_fill(gone[..., None], 0)


def _held_after(x: Tensor, held: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Return the last tokens (B, H, M, D) that heads took of the present segment, the newest at the right end, of those
    held before and x (B, T, H, D) from position `start` on, a multiple of the dilation; zero where that is no token.

    By slices alone: a stream asks for it at every call, and an index costs a dozen launches on a GPU.
    """
    r, memory, (rows, length, heads, channels) = pattern.dilation, pattern.memory, x.shape
    end, rest = start + length, length % r  # heads of shifts below `rest` have taken one more than the others
    old = start // r  # of every head's tokens so many stand before the call
    first = end // pattern.segment * pattern.segment // r  # and so many before the present segment
    kept = max(first, old, end // r - memory)  # the oldest of this call's that is needed
    ranks = -(-end // r) - kept
    x = F.pad(x[:, (kept - old) * r :], (0, 0, 0, 0, 0, -length % r)).unflatten(1, (ranks, r))
    taken = torch.cat([x[:, :, : min(r, heads - j), j : j + r].diagonal(0, 2, 3) for j in range(0, heads, r)], 3)
    taken = taken.permute(0, 3, 1, 2)  # (B, H, the kept ones of a head, D)
    earlier = held.to(x.dtype)[:, :, memory - max(0, old - first) :] if first < old else held[:, :, :0].to(x.dtype)
    none = x.new_zeros(rows, heads, memory + 1, channels)
    line = torch.cat([none, earlier, taken], 2)
    more, others = line[:, :, -memory or line.shape[2] :], line[:, :, -memory - 1 : -1]
    if rest == 0:
        return more.contiguous()
    shift = torch.arange(heads, device=x.device)[:, None, None] % r
    return more.where(shift < rest, others)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, held: Held, patterns: tuple[Pattern, ...], at: TokenPlaces, equal: bool = False
) -> tuple[Tensor, Held]:
    """Return what `dilated` does, of any rows."""
    outputs, sums, takes, after = [], [], [], []
    for pattern, (keys, values) in zip(patterns, held, strict=True):
        tokens = Taken.of(pattern, q.shape[1], at)
        keys = torch.cat([keys.to(k.dtype), _gathered(k, tokens.source)], 2)  # (B, H, M + N, D)
        values = torch.cat([values.to(v.dtype), _gathered(v, tokens.source)], 2)
        output, log_sum = attend(_gathered(q, tokens.source), keys, values, tokens.label)
        rank = tokens.rank.clamp(min=0)
        outputs.append(_gathered(output, rank))
        # (not -inf: of a token that no pattern takes the softmax below would be NaN)
        least = torch.finfo(log_sum.dtype).min
        log_sum = torch.zeros_like(log_sum) if equal else log_sum
        sums.append(log_sum.gather(2, rank).masked_fill(~tokens.taken, least))
        takes.append(tokens.taken)
        newest = tokens.count[..., None] + torch.arange(pattern.memory, device=q.device)  # (B, H, M)
        over = (tokens.label.gather(2, newest) != tokens.current[:, None, None])[..., None]
        after.append((_gathered(keys, newest).masked_fill(over, 0), _gathered(values, newest).masked_fill(over, 0)))
    weights = torch.stack(sums).softmax(0) * torch.stack(takes)  # (patterns, B, H, T)
    return (weights[..., None] * torch.stack(outputs)).sum(0).to(v.dtype), after


def attend(q: Tensor, k: Tensor, v: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return what N queries (B, H, N, D) read of the keys and values (B, H, M + N, D) of M tokens before and of their
    own, each of the M before it and itself, where labels (B, H, M + N) are its own: outputs (B, H, N, D), and the
    logarithms (B, H, N) of the softmax's denominators, at least float32."""
    length, memory = q.shape[2], k.shape[2] - q.shape[2]
    chunk = min(length, memory + 1, CHUNK)
    width, behind = memory + chunk, -length % chunk
    queries = F.pad(q, (0, 0, 0, behind)).unflatten(2, (-1, chunk))  # (B, H, chunks, chunk, D)
    keys = F.pad(k, (0, 0, 0, behind)).unfold(2, width, chunk)  # (B, H, chunks, D, width)
    values = F.pad(v, (0, 0, 0, behind)).unfold(2, width, chunk)
    labels = F.pad(label, (0, behind)).unfold(2, width, chunk)[..., None, :]
    places = torch.arange(width, device=q.device)
    past = places <= places[memory:, None]  # (chunk, width)
    seen = (labels == labels[..., memory:].mT) & past  # every query sees itself
    y, log_sum = weighed(queries, keys, values.mT, seen)
    return y.flatten(2, 3)[:, :, :length], log_sum.flatten(2, 3)[:, :, :length]


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens (B, H, N, D) of x (B, H, T, D) at index (B, H, N)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def read_by(patterns: tuple[Pattern, ...], heads: int, tokens: Tensor) -> Tensor:
    """Return which tokens of a document (T) a layer hands on to the given ones, (T) bool: what the patterns give them
    in any head, and themselves, past the layer."""
    handed = tokens.clone()
    for pattern in patterns:
        for shift in range(min(heads, pattern.dilation)):
            taken = slice(shift, None, pattern.dilation)
            handed[taken] |= _up_to_the_last(tokens[taken], pattern.memory + 1)
    return handed


def _up_to_the_last(tokens: Tensor, size: int) -> Tensor:
    """Return, of each `size` tokens (N) bool, those up to the last that is True."""
    whole = F.pad(tokens.byte(), (0, -len(tokens) % size)).unflatten(0, (-1, size))
    return whole.flip(1).cummax(1).values.flip(1).flatten()[: len(tokens)].bool()


def pairs(patterns: tuple[Pattern, ...], heads: int, length: int) -> int:
    """Return how many pairs of a query and a key all heads compare in a document of `length` tokens, a pair as often as
    patterns give it."""
    total = 0
    for pattern in patterns:
        size = pattern.segment // pattern.dilation
        segments, rest = divmod(length, pattern.segment)
        for head in range(heads):
            last = len(range(head % pattern.dilation, rest, pattern.dilation))
            total += segments * (size * (size + 1) // 2) + last * (last + 1) // 2
    return total
