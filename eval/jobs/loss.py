"""Loss of a text over length.

`lm` at length L is the mean loss over positions (L/2, L] of fixed slices of a text, whatever other lengths were asked
for; the loss at position t is that of token t + 1, after t tokens have been read. One pass over a slice gives all
lengths. Shorter lengths use more slices (the first n of one fixed sequence), so that every length rests on about as
many tokens. What lies between the positions of two lengths has no losses; under a control that drops the state it is
not read at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from rnn_longctx.data import Text, tokens
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Job, Measuring, forget_peak, peak_bytes
from rnn_longctx.eval.results import Row
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.modes import evaluating
from rnn_longctx.models.restart import Restart
from rnn_longctx.spec import quiet

Span = tuple[int, int]  # tokens of a stream
PEAK_BINS = 4  # the highest loss within the training length is taken over so many equal stretches of it


@dataclass(frozen=True)
class LossOverLength(Job):
    """slices: at least so many at every length; tokens: more at shorter ones, up to `most`, while n * L stays below and
    the text has as many that do not overlap; max: the longest length measured."""

    kind = "loss"
    one_pass = True
    name = "lm"

    slices: int = 4
    tokens: int = 256 * 1024
    most: int = 128
    max: int | None = quiet(None)

    def __post_init__(self) -> None:
        if self.slices < 1 or self.tokens < 0 or self.most < 1:
            raise InputError("lm: slices and most must be at least 1, tokens at least 0")

    def count(self, measuring: Measuring, length: int) -> int:
        """Return the number of slices that are read at a length."""
        return max(self.slices, min(self.most, self.tokens // length, self._apart(measuring, length)))

    def _apart(self, measuring: Measuring, length: int) -> int:
        """Return how many slices of so many tokens the text has before two of them overlap."""
        text, tokenizer, most = measuring.loaded_text, measuring.model.tokenizer, max(self.slices, self.most)

        def apart() -> int:
            return text.distinct(int(tokens(text, tokenizer, 0, length + 1)[1].sum()), most)

        return measuring.memo(("apart", text.hash, tokenizer.name, length, most), apart)

    def lengths(self, lengths: list[int], train_length: int | None) -> list[int]:
        lengths = super().lengths(lengths, train_length)
        if train_length is not None and lengths and max(lengths) > train_length:
            lengths = sorted({*lengths, train_length})  # the verdict needs it
        return lengths

    def check(self, measuring: Measuring, lengths: list[int]) -> None:
        """Refuse lengths that the text does not have, before anything is read."""
        text, tokenizer = measuring.loaded_text, measuring.model.tokenizer
        tokens(text, tokenizer, 0, max(lengths) + 1)
        if tokenizer.name != "bytes":
            try:
                text.data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"tokenizer {tokenizer.name} needs UTF-8 text; byte {error.start} is not") from None
        short = [n for n in lengths if self._apart(measuring, n) < self.slices]
        if short:
            apart = f"{self._apart(measuring, short[0])} of {short[0]} tokens that do not overlap"
            message = "text %s is short: of the %d slices read it has %s, so errors and intervals are too small"
            logging.getLogger(__name__).warning(message, text.name, self.slices, apart)

    def cost(self, measuring: Measuring, lengths: list[int]) -> int:
        todo = self.todo(measuring, lengths)
        passes = self._passes(measuring, todo) if todo else ()
        spans, restart = _spans(todo, measuring.model.train_length), measuring.model.restart
        return sum(len(rows) * _until(reach, _stretches(spans, reach, restart)) for rows, reach in passes)

    def run(self, measuring: Measuring, lengths: list[int]) -> Iterator[Row]:
        todo = self.todo(measuring, lengths)
        if not todo:
            return
        text, train = measuring.loaded_text, measuring.model.train_length
        spans = _spans(todo, train)
        marks = sorted({m for span in spans for m in span} | set(_bins(train) if train in todo else ()))
        sums: dict[int, list[Tensor]] = {m: [] for m in marks}  # of the loss up to the mark, one value a slice
        nbytes: dict[int, list[Tensor]] = {m: [] for m in marks}
        forget_peak(measuring)
        # until the mark, of all slices that reach it
        seconds, read = dict.fromkeys(marks, 0.0), dict.fromkeys(marks, 0)
        for rows, reach in self._passes(measuring, todo):
            reading = _Pass(measuring, text, rows, reach, marks, spans)
            reading.run()
            for m in reading.marks:
                sums[m].append(reading.sums[m])
                nbytes[m].append(reading.nbytes[m])
                seconds[m], read[m] = seconds[m] + reading.times[m], read[m] + len(rows) * _until(m, reading.stretches)
        whole = {m: (torch.cat(sums[m]), torch.cat(nbytes[m])) for m in marks}
        for length in todo:
            n = self.count(measuring, length)
            (high, high_bytes), (low, low_bytes) = whole[length], whole[length // 2]
            loss = high[:n] - low[:n]
            per_token = loss / (length - length // 2)
            per_byte = loss / (high_bytes[:n] - low_bytes[:n])
            cost = {
                "seconds": seconds[length],
                "tokens_per_second": read[length] / seconds[length] if seconds[length] else None,
                "peak_bytes": peak_bytes(measuring),
                "tokens_read": length,
            }
            key = partial(measuring.key, self.label, text, length)
            yield measuring.row(key("nats_per_byte"), per_byte.tolist(), **cost)
            if length == train:
                edges = _bins(length)
                means = torch.stack([(whole[b][0][:n] - whole[a][0][:n]) / (b - a) for a, b in zip(edges, edges[1:])])
                peak = means[means.mean(1).argmax()]
                yield measuring.row(key("nats_per_token_peak"), peak.tolist(), **cost)
            # written last: it says that the others are there
            yield measuring.row(key("nats_per_token"), per_token.tolist(), **cost)
        if measuring.results:
            measuring.results.forget_snapshots(_stream(measuring, text))

    def todo(self, measuring: Measuring, lengths: list[int]) -> list[int]:
        text = measuring.loaded_text
        train, missing = measuring.model.train_length, []
        for n in lengths:
            metrics = ["nats_per_token", *(["nats_per_token_peak"] if n == train else [])]
            keys = [measuring.key(self.label, text, n, metric) for metric in metrics]
            if not all(measuring.done(key, self.count(measuring, n)) for key in keys):
                missing.append(n)
        return missing

    def _passes(self, measuring: Measuring, lengths: list[int]) -> Iterator[tuple[list[int], int]]:
        """Yield (slices, how far they are read): slices that reach equally far together, at most `batch` of them."""
        counts = {n: self.count(measuring, n) for n in lengths}
        reach = {i: max(n for n in lengths if counts[n] > i) for i in range(max(counts.values()))}
        for far, group in groupby(reach, key=reach.__getitem__):
            rows = list(group)
            for i in range(0, len(rows), measuring.batch):
                yield rows[i : i + measuring.batch], far


class _Pass:
    """One stream over some slices, from its last snapshot if it was killed. Marks and spans beyond its reach are left
    out. Losses that no span asks for are not worked out, and count as 0 in the sums."""

    def __init__(
        self, measuring: Measuring, text: Text, rows: list[int], reach: int, marks: list[int], spans: list[Span]
    ):
        self.measuring, self.text, self.rows, self.reach = measuring, text, rows, reach
        self.marks, self.spans = [m for m in marks if m <= reach], [span for span in spans if span[1] <= reach]
        self.stretches = _stretches(spans, reach, measuring.model.restart)
        self.sums: dict[int, Tensor] = {}
        self.nbytes: dict[int, Tensor] = {}
        self.times: dict[int, float] = {0: 0.0}  # seconds until a mark
        self.seconds = 0.0
        name = f"{_stream(measuring, text)}-{rows[0]}-{rows[-1]}-{reach}"
        self.path = measuring.results.snapshot_path(name) if measuring.results else None

    def run(self) -> None:
        with torch.inference_mode(), evaluating(self.measuring.model):
            self._run()

    def _run(self) -> None:
        c, reach, size = self.measuring, self.reach, len(self.rows)
        pairs = [tokens(self.text, c.model.tokenizer, i, reach + 1) for i in self.rows]
        ids = torch.from_numpy(np.stack([p[0] for p in pairs]))
        # bytes of the tokens that are predicted at positions 1 .. t
        byte_sums = torch.from_numpy(np.stack([p[1] for p in pairs]))[:, 1:].cumsum(1)
        zeros = torch.zeros(size, dtype=torch.float64, device="cpu")
        self.nbytes = {m: byte_sums[:, m - 1].double() if m else zeros for m in self.marks}
        self.sums = {0: zeros}
        del pairs, byte_sums

        cache, t, total = self._resume() or (c.model.new_cache(), 0, zeros)
        segment = max(1, c.segment // size)
        if c.model.device.type == "cuda":  # kernels are compiled at their first call, which no remedy is to pay for
            warm, sizes = c.model.new_cache(), (segment, segment, reach % segment)  # begun, gone on with, cut short
            for n in filter(None, sizes if reach > segment else (reach,)):
                first = ids[:, : n + 1].to(c.model.device)
                c.model.losses(c.model(first[:, :-1], warm), first[:, 1:]).sum().item()
            del warm
        began = saved = time.perf_counter()
        done_before = self.seconds
        c.progress(_until(t, self.stretches) * size)
        while t < reach:
            start, end = next(stretch for stretch in self.stretches if stretch[1] > t)
            if start > t:
                assert c.model.restart is not None
                c.model.restart.skip_to(start, ids, cache, c.model.device)
                left_out = [m for m in self.marks if t < m <= start]
                self.sums |= {m: total.clone() for m in left_out}
                self.times |= dict.fromkeys(left_out, self.seconds)
                t = start
            u = min(end, t + segment)
            hidden = c.model(ids[:, t:u].to(c.model.device), cache)
            losses = torch.zeros(size, u - t, dtype=torch.float64, device="cpu")
            since = min(max(t, low) for low, high in self.spans if high > t)  # the first loss that is asked for
            if since < u:
                targets = ids[:, since + 1 : u + 1].to(c.model.device)
                losses[:, since - t :] = c.model.losses(hidden[:, since - t :], targets)
            running = total[:, None] + losses.cumsum(1)
            for m in self.marks:
                if t < m <= u:
                    self.sums[m] = running[:, m - t - 1].clone()
            total = running[:, -1].clone()
            c.progress((u - t) * size)
            now = time.perf_counter()
            self.seconds = done_before + now - began
            self.times |= {m: self.seconds for m in self.marks if t < m <= u}
            t = u
            late = now - saved > c.snapshot_seconds and isinstance(cache, Cache)  # (another library's is not kept)
            if self.path and (late or t == reach):
                self._save(cache if t < reach and isinstance(cache, Cache) else Cache(), t, total)
                saved = time.perf_counter()

    def _save(self, cache: Cache, t: int, total: Tensor) -> None:
        extra = {"total": total} | {f"sum.{m}": s for m, s in self.sums.items()}
        assert self.path is not None
        cache.save(self.path, extra, {"read": t, "times": {**self.times, t: self.seconds}, "spans": self.spans})

    def _resume(self) -> tuple[Cache, int, Tensor] | None:
        if not self.path or not self.path.exists():
            return None
        try:
            cache, extra, note = Cache.load_with(self.path, self.measuring.model.device)
        except InputError:  # torn: read again from the start
            return None
        read, sums = note["read"], {int(k.removeprefix("sum.")): v for k, v in extra.items() if k.startswith("sum.")}
        known = {tuple(span) for span in note.get("spans", [])}
        missing = any(m <= read and m not in sums for m in self.marks)
        if missing or any(span[0] < read and span not in known for span in self.spans):
            return None  # made when other lengths were asked for
        self.sums, self.times = sums, {int(m): seconds for m, seconds in note["times"].items()}
        self.seconds = self.times[read]
        return cache, read, extra["total"]


def _stream(measuring: Measuring, text: Text) -> str:
    """Return how the names of a stream's snapshots begin."""
    return measuring.snapshot_name("lm", text.name, text.hash)


def _spans(lengths: list[int], train: int | None) -> list[Span]:
    """Return the stretches (after, up to) whose losses lengths are measured by, in order."""
    spans = {(length // 2, length) for length in lengths}
    if train in lengths:
        spans.add((0, train))  # of the peak
    return sorted(spans)


def _stretches(spans: list[Span], reach: int, restart: Restart | None) -> list[Span]:
    """Return the stretches of a stream that are read: all of it; but under a control nothing that no span asks for and
    no state of one depends on."""
    if restart is None:
        return [(0, reach)]
    stretches: list[Span] = []
    for low, end in (span for span in spans if span[1] <= reach):
        start = restart.block_start(low + 1)
        if stretches and start <= stretches[-1][1]:
            start, end_before = stretches.pop()
            end = max(end, end_before)
        stretches.append((start, end))
    return stretches


def _until(position: int, stretches: list[Span]) -> int:
    """Return how many tokens of the stretches lie before a position."""
    return sum(max(0, min(high, position) - low) for low, high in stretches)


def _bins(length: int | None) -> list[int]:
    return [length * k // PEAK_BINS for k in range(PEAK_BINS + 1)] if length else []
