"""LongNet (arXiv 2307.02486) as a language model's layer: dilated attention, whose cost is linear in the length.

What it computes: `rnn_longctx.models.mixers.dilated`. Segments are counted from the first token of a document, so that
a stream needs of each pattern the taken tokens of the present segment alone: the carry does not grow with the length.
Where shorter segments divide the longest one, information goes nowhere beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError, warn_once
from rnn_longctx.models.attention import Attention, begins
from rnn_longctx.models.carries import carry
from rnn_longctx.models.flash import Pattern
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.dilated import TokenPlaces, dilated, one_token, pairs, read_by
from rnn_longctx.models.mixers.dilated_ranks import Cut, held_here, with_last_held
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.carry import ON_CPU
from rnn_longctx.recurrence.span import Span
from rnn_longctx.spec import quiet, tuned


@dataclass(frozen=True)
class LongNetConfig:
    """The shape of a layer.

    Attributes:
        segments: lengths of segments, as in 64/256/1024, each longer than the one before.
        dilations: for each of them how many tokens apart those are that a head reads, as in 1/4/16. With none of 1, a
            layer of fewer heads than the smallest one reads nothing at some positions.
        positions: "rope", or "none": then a token knows the order of what it reads by the causal mask alone.
        merge: how what the patterns read is put together: "softmax", by the softmaxes' denominators, or "equal" (an
            ablation), the mean over the patterns that take a token.
    """

    heads: int = 4
    segments: str | int = tuned("64/256/1024", over=("16/64/256", "32/128/512", "64/256/1024", "64/512/4096"))
    dilations: str | int = tuned("1/4/16", over=("1/2/4", "1/4/16", "1/8/64"))
    positions: Literal["rope", "none"] = "rope"
    merge: Literal["softmax", "equal"] = quiet("softmax")

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise InputError(f"longnet: expected at least 1 head, got {self.heads}")
        segments, dilations = (_lengths(name, getattr(self, name)) for name in ("segments", "dilations"))
        if len(segments) != len(dilations):
            raise InputError(
                f"longnet: expected a dilation for every segment length, got {len(segments)} in {self.segments} and "
                f"{len(dilations)} in {self.dilations}"
            )
        if any(a >= b for a, b in zip(segments, segments[1:])):
            raise InputError(f"longnet: segments must grow, as in 64/256/1024, got {self.segments}")
        for w, r in zip(segments, dilations):
            if w % r:
                raise InputError(f"longnet: a segment length must be a multiple of its dilation, got {w} and {r}")

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(map(Pattern, _lengths("segments", self.segments), _lengths("dilations", self.dilations)))

    @property
    def barrier(self) -> int | None:
        """The tokens at whose multiples information goes no further: the longest segment. None where a shorter one lies
        across its end."""
        longest = self.patterns[-1].segment
        return None if any(longest % pattern.segment for pattern in self.patterns) else longest

    def unfit(self, length: int) -> str | None:
        """Return why so many tokens are too many for the settings, or None."""
        if self.barrier is None or length <= self.barrier:
            return None
        return (
            f"longnet: more is read than the longest segment holds, {self.barrier} tokens, and such layers carry "
            "nothing from one of those segments into the next"
        )

    def read_by(self, tokens: Tensor) -> Tensor:
        """Return which tokens such a layer hands on to the given ones, see `dilated.read_by`."""
        return read_by(self.patterns, self.heads, tokens)


def _lengths(name: str, text: str | int) -> list[int]:
    try:
        return [parse_length(number) for number in str(text).split("/")]
    except InputError:
        raise InputError(f"longnet: {name} are whole numbers above 0, as in 4/16, got {text!r}") from None


@carry
@dataclass
class DilatedKeys:
    """The carry: of each pattern the last tokens of the present segment that a head takes, the newest at the right end.

    S = the sum of w / r - 1 over the patterns, which stand there one after another. What is no token is zero.

    Attributes:
        keys, values: (B, H, S, D); keys as they are turned by their positions.
        position: (B,) int64 on the CPU, tokens of its document that the row has read.
        forgotten: (B,) int64 on the CPU, how many of those, the first ones, are read no more (`cropped`).
    """

    keys: Tensor
    values: Tensor
    position: Tensor = field(metadata=ON_CPU)
    forgotten: Tensor = field(metadata=ON_CPU)

    @property
    def place(self) -> int | None:
        """The position at which all rows go on, where that is one and they have forgotten nothing; None elsewhere."""
        place = int(self.position[0])
        return place if bool((self.position == place).all()) and not self.forgotten.any() else None

    def cropped(self, tokens: int) -> DilatedKeys:
        """Return the carry with the last `tokens` tokens alone; segments begin where they did."""
        forgotten = torch.maximum(self.forgotten, self.position - tokens)
        return DilatedKeys(self.keys, self.values, self.position, forgotten)


@MIXERS.register
class LongNet(Attention):
    """A layer of dilated attention."""

    name = "longnet"
    spreads = True
    Config: ClassVar[Any] = LongNetConfig
    examples = (  # (beyond the longest segment a warning is due)
        "longnet:heads=4,segments=6/24/72,dilations=1/3/8",
        "longnet:heads=4,segments=8/80,dilations=2/4,positions=none",
        "longnet:heads=4,segments=6/24/72,dilations=1/3/8,merge=equal",
    )

    def __init__(self, config: LongNetConfig, model: Any):
        super().__init__(config, model)
        self.patterns = config.patterns

    @property
    def rotary(self) -> bool:
        return self.config.positions == "rope"

    def forward(self, u: Tensor, carry: DilatedKeys | None, span: Span) -> tuple[Tensor, DilatedKeys]:
        carry = self.new_carry(len(u)) if carry is None else carry
        cut = None if span.shard is None else self._cut(carry, span)
        total = u.shape[1] if span.shard is None else span.shard.total
        barrier, start = self.config.barrier, int(carry.position.max())
        if barrier is not None and span.reset is None and start <= barrier < start + total:  # once a stream
            warn_once(str(self.config.unfit(start + total)))
        whole, equal = span.mask is None and span.reset is None, self.config.merge == "equal"
        place = carry.place if whole else None
        if total == 1 and cut is None and place is not None and not equal:
            return self._one_token(u, carry, place, span)
        q, k, v = self.projected(u, span)
        places = torch.arange(u.shape[1], device=u.device)
        before, forgotten = carry.position.to(u.device), carry.forgotten.to(u.device)
        if cut is not None:
            before = before + cut.here - start
        position = places - begins(-before, 0, u.shape[1], span)  # (B, T)
        if self.rotary:
            q, k = self.turn(q, k, position, span)
        sizes = [pattern.memory for pattern in self.patterns]
        held = list(zip(carry.keys.split(sizes, 2), carry.values.split(sizes, 2)))
        if cut is not None:
            held, place = held_here(k, v, held, cut), cut.here
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        at = TokenPlaces(position, before, forgotten, span.reset is not None, place)
        y, held = dilated(q, k, v, held, self.patterns, at, equal)
        if cut is not None:
            y, held = with_last_held(y, held, cut)
        keys, values = (torch.cat(tensors, 2) for tensors in zip(*held))
        read, forgotten = carry.position + total, carry.forgotten.clone()
        if not whole:
            read = (position[:, -1] + 1).cpu()
        if span.reset is not None:
            forgotten.masked_fill_(span.reset.any(1).cpu(), 0)
        return self.out_proj(y.transpose(1, 2).flatten(2)), DilatedKeys(keys, values, read, forgotten)

    def _one_token(self, u: Tensor, carry: DilatedKeys, place: int, span: Span) -> tuple[Tensor, DilatedKeys]:
        """Return what `forward` does, of one token at a place of its document."""
        q, k, v = self.projected(u, span)
        if self.rotary:
            q, k = self.turn(q, k, torch.arange(place, place + 1, device=u.device), span)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, 1, D)
        y, (keys, values) = one_token(q, k, v, (carry.keys, carry.values), self.patterns, place)
        after = DilatedKeys(keys, values, carry.position + 1, carry.forgotten.clone())
        return self.out_proj(y.transpose(1, 2).flatten(2)), after

    def _cut(self, carry: DilatedKeys, span: Span) -> Cut:
        """Return where the ranks' shards stand. Raises InputError where that is not one place for all rows."""
        assert span.shard is not None
        if span.mask is not None or span.reset is not None or carry.place is None:
            raise InputError(
                "longnet: several ranks read one document a row, without padding, all rows of as many tokens; "
                "documents that begin inside a call are not followed there"
            )
        return Cut.of(span.shard, carry.place, self.patterns)

    def pairs(self, length: int) -> int:
        return pairs(self.patterns, self.config.heads, length)

    def state_size(self) -> StateSize:
        tokens = sum(pattern.memory for pattern in self.patterns)
        return StateSize({"attention": 2 * self.config.heads * self.head_dim * tokens})

    def new_carry(self, rows: int) -> DilatedKeys:
        tokens = sum(pattern.memory for pattern in self.patterns)
        keys = self.like.new_zeros(rows, self.config.heads, tokens, self.head_dim)
        none = torch.zeros(rows, dtype=torch.int64, device="cpu")
        return DilatedKeys(keys, torch.zeros_like(keys), none, none.clone())
