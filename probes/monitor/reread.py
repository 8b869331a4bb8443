"""Read a model in pieces that end where a monitor looks, so that what it does about a collapse can fall between two of
them, and read tokens again: after a rollback, or in the place of a state that is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.probes.monitor.actions import Action
from rnn_longctx.probes.monitor.judge import History, Report

SEGMENT = 4096


@dataclass
class Stream:
    """The stream that is being watched, as looking at it and reading it share it.

    Attributes:
        history: its last looks.
        dropped: tokens that its cache held before a fallback.
        status: of the last report, of whatever stream.
        due: a report on which tokens are to be read again, as soon as the piece that it came in is read.
        reading: whether it is this library that reads.
        silent: whether what is read was reported before.
    """

    history: History = field(default_factory=History)
    dropped: int = 0
    status: str = "ok"
    due: Report | None = None
    reading: bool = False
    silent: bool = False


class Rereader:
    """A hook on a model's reading (`LanguageModel.reading_with`).

    Args:
        stream: what the looks tell.
        every: tokens between two looks.
        length: ids that a fallback is given, at most.
    """

    def __init__(self, action: Action, stream: Stream, every: int, length: int):
        self.action, self.stream, self.every, self.length = action, stream, every, length
        self._cache: StreamCache | None = None
        self._at = 0  # tokens the cache holds
        self._ids: list[Tensor] = []  # since the snapshot (rollback), or the last ones (fallback)
        self._snapshot: tuple[StreamCache, History] | None = None

    def __call__(self, read: Callable[..., Tensor], ids: Tensor, cache: StreamCache, *more: Any) -> Tensor:
        """Read ids (B, T) with the model's own `read`; return the hidden states (B, T, d_model), after any action."""
        if any(v is not None for v in more) or not ids.shape[1]:
            return read(ids, cache, *more)  # masks and documents: the scan says what an observer refuses
        self._begin(cache)
        hidden, t = None, 0
        self.stream.reading = True
        try:
            while t < ids.shape[1]:
                piece = ids[:, t : t + self.every - self._at % self.every]
                out = read(piece, cache)
                hidden = out if hidden is None else torch.cat([hidden, out], 1)
                t, self._at = t + piece.shape[1], self._at + piece.shape[1]
                if self.action.rereads:
                    hidden = self._after(read, piece, cache, hidden)
        finally:
            self.stream.reading, self.stream.due = False, None
        assert hidden is not None
        return hidden

    def _begin(self, cache: StreamCache) -> None:
        """Tell a stream that goes on from another one."""
        at = int(cache.position[0]) if len(cache.position) else 0
        if cache is self._cache and at == self._at:
            return
        self._cache, self._at, self._ids = cache, at, []
        self.stream.dropped, self.stream.history = 0, History()
        self._snapshot = (cache.snapshot(), History()) if self.action.kind == "rollback" else None

    def _after(self, read: Callable[..., Tensor], piece: Tensor, cache: StreamCache, hidden: Tensor) -> Tensor:
        """Keep what an action needs, and take it if it is due. hidden (B, n, d_model) of the present call, so far."""
        rollback, report = self.action.kind == "rollback", self.stream.due
        if rollback and self.action.remedy_on and report is None:
            return hidden  # a rollback comes once
        self._ids.append(piece)
        if self._at % self.every and report is None:
            return hidden
        ids = torch.cat(self._ids, 1)
        self._ids, self.stream.due = [ids if rollback else ids[:, -self.length :]], None
        if report is not None:
            return self._roll_back(read, cache, hidden) if rollback else self._fall_back(read, report, cache, hidden)
        if rollback and self.stream.history.position is not None and self.stream.status == "ok":
            self._snapshot, self._ids = (cache.snapshot(), self.stream.history.copy()), []
        return hidden

    def _roll_back(self, read: Callable[..., Tensor], cache: StreamCache, hidden: Tensor) -> Tensor:
        """Go back to the snapshot, and read the tokens since under the remedy."""
        assert self._snapshot is not None
        (snapshot, self.stream.history), (ids,) = self._snapshot, self._ids
        cache.restore(snapshot)
        self.action.put()
        self._ids, self._snapshot = [], None
        return self._again(read, ids, cache, hidden, same=ids.shape[1])

    def _fall_back(self, read: Callable[..., Tensor], report: Report, cache: StreamCache, hidden: Tensor) -> Tensor:
        """Drop the state, and read the ids that the fallback gives."""
        assert self.action.fallback is not None
        (ids,) = self._ids
        answer = self.action.fallback(report, ids)
        if answer is None or (answer is ids and self._at <= ids.shape[1]):  # nothing older that could be dropped
            return hidden
        again = answer.to(ids.device)
        if again.ndim != 2 or len(again) != len(ids) or not again.shape[1] or again.is_floating_point():
            raise InputError(f"a fallback returns ids (B, n) of {len(ids)} rows, got shape {tuple(again.shape)}")
        cache.layers, cache.position = [], torch.zeros(0, dtype=torch.int64, device="cpu")
        self.stream.dropped += self._at - again.shape[1]
        self._at, self.stream.history = again.shape[1], History()
        return self._again(read, again, cache, hidden, same=_same_at_the_end(ids, again))

    def _again(self, read: Callable[..., Tensor], ids: Tensor, cache: StreamCache, hidden: Tensor, same: int) -> Tensor:
        """Read ids, and put their hidden states in the place of the last ones of the call, of which `same` tokens are
        the same."""
        outs, self.stream.silent = hidden[:, :0], True
        try:
            for piece in ids.split(SEGMENT, 1):
                outs = torch.cat([outs, read(piece, cache)], 1)[:, -hidden.shape[1] :]
        finally:
            self.stream.silent = False
        same = min(same, outs.shape[1])
        return torch.cat([hidden[:, : hidden.shape[1] - same], outs[:, outs.shape[1] - same :]], 1)


def _same_at_the_end(ids: Tensor, others: Tensor) -> int:
    """How many of the last tokens are the same in every row."""
    n = min(ids.shape[1], others.shape[1])
    differ = (ids[:, ids.shape[1] - n :] != others[:, others.shape[1] - n :]).any(0).flip(0)
    return int(differ.int().argmax()) if bool(differ.any()) else n
