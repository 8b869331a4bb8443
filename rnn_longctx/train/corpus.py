"""Training data with random access: the batch of step i is a function of (seed, i) and nothing else.

So a run that was killed goes on with the very batches it would have seen, no reader's state is ever saved, and every
rank makes the same batch and takes its rows of it. A small text is held; what is streamed lies on disk as tokens and is
mapped (`rnn_longctx.data.stored`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from rnn_longctx.config import counted
from rnn_longctx.data import Shard, Source, Text, Tokenizer, load_text, open_streamed, stored
from rnn_longctx.data.text import GOLDEN
from rnn_longctx.errors import InputError
from rnn_longctx.progress import Say, silent
from rnn_longctx.train.config import DataConfig, MixedText, TrainConfig
from rnn_longctx.train.mix import place, rows_with_examples

HELD_OUT = 2**24  # tokens held out of a text that is streamed, at most
LEGS = 512  # a mixture's rows that go on from their last stream begin anew after so many steps, at the latest


@dataclass(frozen=True)
class Batch:
    """The sequences of one step.

    Attributes:
        ids: (B, T + 1) int64; inputs are ids[:, :-1], targets ids[:, 1:].
        answer: (B, T) bool, the targets that are answers of examples.
        carried: (B) bool, of a run that passes states on: the rows that go on from what their last stream ended with.
        reset: (B, T) bool, the inputs that begin a document, if the state is dropped there.
        counted: (B, T) bool, the targets whose loss counts, if some do not: others are 0 in the mean over all.
    """

    ids: torch.Tensor
    answer: torch.Tensor
    carried: torch.Tensor | None = None
    reset: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    def rows(self, rows: slice) -> Batch:
        """Return some of its rows, such as a rank's."""
        optional = (None if t is None else t[rows] for t in (self.carried, self.reset, self.counted))
        return Batch(self.ids[rows], self.answer[rows], *optional)


@dataclass
class Corpus:
    """The tokens of the texts, uint8 for bytes and int32 otherwise.

    Attributes:
        sources: an array for each text trained on, or one of all where they have no weights and are held.
        held_out: never trained on.
        shares: of the rows that each source is drawn for.
    """

    sources: list[torch.Tensor]
    held_out: torch.Tensor
    texts: list[dict[str, str | int]]  # name, hash, bytes
    tokenizer: Tokenizer
    shares: list[float] = field(default_factory=lambda: [1.0])
    mapped: frozenset[int] = frozenset()  # sources that lie on disk
    device: torch.device | str = "cpu"

    def to(self, device: torch.device) -> Corpus:
        """Return the corpus on a device: what is held moves; what is mapped stays, and its rows move."""
        sources = [tokens if i in self.mapped else tokens.to(device) for i, tokens in enumerate(self.sources)]
        return replace(self, sources=sources, held_out=self.held_out.to(device), device=device)

    @property
    def train(self) -> torch.Tensor:
        """Return the training tokens of a corpus that is one array."""
        (only,) = self.sources
        return only

    def __len__(self) -> int:
        """Return the number of tokens to train on."""
        return sum(map(len, self.sources))

    def batch(self, config: TrainConfig, step: int) -> Batch:
        """Return the batch of a step: random windows of the text, some of which end in an example of a task (before
        it: text, then end of document). `config` is that of one stage (`TrainConfig.at`).

        Where rows go on from their last stream (`passing.start: previous`), a row reads the text in order instead, from
        a random place of its own and on from the text's beginning at its end; any rows may then end in an example. Of
        several texts, such a row reads one for as long as it goes on, and then one drawn anew."""
        assert isinstance(config.train_length, int)
        rng = np.random.default_rng([config.seed, step])
        size, length = config.batch_size, config.train_length + 1
        follows = config.passing is not None and config.passing.start == "previous"
        chosen, carried = np.zeros(size, dtype=np.int64), None
        if len(self.sources) > 1:
            chosen, places, carried = (self._legs if follows else self._drawn)(config, step, rng)
        elif follows:
            begun = np.random.default_rng([config.seed, 0, 1]).integers(0, len(self.train), size)
            places = begun + step * config.train_length
        else:
            places = rng.integers(0, len(self.train) - length + 1, size)
        examples = place(config.data, self.tokenizer, rng, (size, length), shuffled=follows)
        answer = np.zeros((size, length), dtype=bool)
        answer[examples.rows] = examples.answers
        ids = self._read(chosen, places, length)
        if len(examples.rows):
            text, tokens = (torch.from_numpy(array).to(self.device) for array in (examples.text, examples.ids))
            ids[examples.rows] = torch.where(text, ids[examples.rows], tokens)
        if follows and carried is None:
            assert config.passing is not None
            carried = rng.random(size) < config.passing.carry
        batch = Batch(
            ids,
            torch.from_numpy(answer[:, 1:]).to(self.device),
            None if carried is None else torch.from_numpy(carried).to(self.device),
        )
        if not (config.data.reset or config.data.mask_first):
            return batch
        assert self.tokenizer.eos_id is not None
        ended = ids[:, :-1].eq(self.tokenizer.eos_id)  # inputs whose target is the first token of a document
        reset = None
        if config.data.reset:
            reset = ended.roll(1, 1)
            reset[:, 0] = False
            if follows:  # the token before: the text's, or the end of the prompt that the last stream ended with
                reset[:, 0] = self._read(chosen, places - 1, 1)[:, 0] == self.tokenizer.eos_id
                if step:
                    last = np.random.default_rng([config.seed, step - 1])
                    for rows in rows_with_examples(config.data, last, size, shuffled=True):
                        reset[rows, 0] = True
        return replace(batch, reset=reset, counted=~ended if config.data.mask_first else None)

    def _read(self, chosen: np.ndarray, places: np.ndarray, length: int) -> torch.Tensor:
        """Return windows (B, length) int64 of the sources `chosen` (B), from the places (B) on, round their ends."""
        ids = torch.empty(len(chosen), length, dtype=torch.int64, device=self.device)
        for i, tokens in enumerate(self.sources):
            rows = np.flatnonzero(chosen == i)
            if len(rows):
                starts = torch.from_numpy(places[rows]).to(tokens.device)
                windows = (starts[:, None] + torch.arange(length, device=tokens.device)) % len(tokens)
                ids[torch.from_numpy(rows).to(self.device)] = tokens[windows].long().to(self.device)
        return ids

    def _source(self, config: TrainConfig, step: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Return the source of row `row` in step `step`: a golden-ratio sequence over all rows of the run, so that the
        shares hold over any stretch of it."""
        offset = np.random.default_rng([config.seed, 0, 2]).random()
        edges = np.cumsum(self.shares)
        at = (offset + (step * config.batch_size + row) * GOLDEN) % 1.0
        return np.searchsorted(edges[:-1] / edges[-1], at, side="right")

    def _drawn(self, config: TrainConfig, step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, None]:
        """Draw for each row a source, and a window that lies in it."""
        chosen = self._source(config, np.array(step), np.arange(config.batch_size))
        room = np.array([len(tokens) - config.longest for tokens in self.sources])[chosen]
        return chosen, rng.integers(0, room), None

    def _legs(
        self, config: TrainConfig, step: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return of each row its source, the place where it reads on, and whether it does: else it begins at a place
        drawn anew."""
        assert config.passing is not None and isinstance(config.train_length, int)
        size, first = config.batch_size, step - step % LEGS
        goes_on = _goes_on(config.seed, first, size) < config.passing.carry
        goes_on[0] = False
        seen = goes_on[: step - first + 1]
        began = step - np.argmin(seen[::-1], axis=0)  # the last step at which the row began
        drawn = np.stack([np.random.default_rng([config.seed, int(s), 3]).random(size)[r] for r, s in enumerate(began)])
        chosen = self._source(config, began, np.arange(size))
        sizes = np.array([len(tokens) for tokens in self.sources])[chosen]
        places = (drawn * sizes).astype(np.int64) + (step - began) * config.train_length
        return chosen, places, seen[-1]

    def validation(self, length: int, batch_size: int, most: int = 1024) -> Iterator[torch.Tensor]:
        """Yield disjoint windows (<= batch_size, length + 1) of the held-out text, evenly spread, at most `most`."""
        fit = len(self.held_out) // (length + 1)
        chosen = np.unique(np.linspace(0, max(0, fit - 1), min(fit, most)).astype(np.int64))
        for i in range(0, len(chosen), batch_size):
            rows = [self.held_out[k * (length + 1) : (k + 1) * (length + 1)] for k in chosen[i : i + batch_size]]
            yield torch.stack(rows).long()


@lru_cache(2)
def _goes_on(seed: int, first: int, size: int) -> np.ndarray:
    """Return what is drawn for whether each row goes on, (LEGS, B), of the steps from `first` on."""
    return np.random.default_rng([seed, first, 4]).random((LEGS, size))


def load_corpus(config: DataConfig, tokenizer: Tokenizer, length: int, say: Say = silent) -> Corpus:
    """Read the texts, those that are streamed into stores of tokens. The last `held_out` share of each, whole documents
    where it has several, is kept for validation (of a stored one 16M tokens or little more).

    Raises:
        InputError: a text that is missing, cannot be read, or is too short for windows of `length` + 1 tokens; reset or
            mask_first with a tokenizer that has no end of document.
    """
    if (config.reset or config.mask_first) and tokenizer.eos_id is None:
        option = "reset" if config.reset else "mask_first"
        raise InputError(f"data.{option}: tokenizer {tokenizer.name} has no end-of-document token to go by")
    train: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    texts: list[dict[str, str | int]] = []
    mapped = set()
    for i, entry in enumerate(config.parts):
        text, source = _opened(entry, config.min_document)
        if source is None:
            assert text is not None
            cut = int(len(text) * (1 - config.held_out))
            boundary = text.data.rfind(b"\0", 0, cut)
            if config.held_out and boundary > 0:
                cut = boundary + 1
            while 0 < cut < len(text) and text.data[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
                cut -= 1
            train.append(_encode(tokenizer, text.data[:cut] + b"\0"))
            held_out.append(_encode(tokenizer, text.data[cut:] + b"\0"))
            texts.append({"name": text.name, "hash": text.hash, "bytes": len(text)})
        else:
            store = stored(source, tokenizer, config.min_document, entry.tokens, say)
            tokens = torch.from_numpy(store.tokens)
            cut = _cut(store.tokens, tokenizer.eos_id, config.held_out)
            train.append(tokens[:cut])
            held_out.append(tokens[cut:].clone())
            texts.append({"name": source.name, "hash": store.hash, "bytes": store.bytes})
            mapped.add(i)
    weights = [entry.weight for entry in config.parts]
    if not mapped and None in weights:
        train = [torch.cat(train)]
    shares = [float(len(tokens) if weight is None else weight) for tokens, weight in zip(train, weights)]
    names = [entry.source for entry in config.parts] if len(train) > 1 else [", ".join(p.source for p in config.parts)]
    for name, tokens, share in zip(names, train, shares, strict=True):
        if share and len(tokens) < length + 1:
            held = f"; {sum(map(len, held_out))} are held out, whole documents: see data.held_out" if held_out else ""
            few = f"{name} gives {counted(len(tokens), 'token')} to train on, and train_length {length} needs more"
            raise InputError(f"data.text: {few}{held if config.held_out else ''}")
    return Corpus(train, torch.cat(held_out), texts, tokenizer, shares, frozenset(mapped))


def _opened(entry: MixedText, min_document: int) -> tuple[Text | None, Source | None]:
    """Return a text that is held, or a source to store: what is streamed, and a text of which some documents are left
    out."""
    if (source := open_streamed(entry.source)) is not None:
        return None, source
    text = load_text(entry.source)
    if not (min_document or entry.tokens):
        return text, None
    return None, Source(text.name, f"{text.name} {text.hash}", [Shard(text.hash, text.documents)])


def _cut(tokens: np.ndarray, eos: int | None, held_out: float) -> int:
    """Return where the held-out documents begin: after the last end of document that leaves the share, if there is
    one."""
    cut = stop = len(tokens) - min(int(len(tokens) * held_out), HELD_OUT)
    while held_out and eos is not None and stop > 0:
        start = max(0, stop - 2**20)
        ends = np.flatnonzero(tokens[start:stop] == eos)
        if len(ends):
            return start + int(ends[-1]) + 1
        stop = start
    return cut


def _encode(tokenizer: Tokenizer, data: bytes) -> torch.Tensor:
    if tokenizer.name == "bytes":
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts, start = [], 0
    while start < len(data):  # about a megabyte of whole documents at a time: offsets of a whole text would be big
        stop = data.find(b"\0", start + (1 << 20))
        stop = len(data) if stop < 0 else stop + 1
        parts.append(tokenizer.encode(data[start:stop]).astype(np.int32))
        start = stop
    return torch.from_numpy(np.concatenate(parts))
