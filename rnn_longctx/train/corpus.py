"""Training data with random access: the batch of step i is a function of (seed, i) and nothing else.

So a run that was killed goes on with the very batches it would have seen, and no reader's state is ever
saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rnn_longctx.data import Tokenizer, load_text, training_sequence
from rnn_longctx.errors import InputError
from rnn_longctx.train.config import DataConfig, TrainConfig


@dataclass(frozen=True)
class Batch:
    """`ids` (B, T + 1) int64: inputs are ids[:, :-1], targets ids[:, 1:]; `answer` (B, T) bool marks the
    targets that are passkey answers; `carried` (B) bool, of a run that passes states on, the rows that go on from the
    state their last stream ended with."""

    ids: torch.Tensor
    answer: torch.Tensor
    carried: torch.Tensor | None = None


@dataclass
class Corpus:
    """One token array for training and one held out, uint8 for bytes and int32 otherwise, and what is in
    them."""

    train: torch.Tensor
    held_out: torch.Tensor
    texts: list[dict[str, str | int]]  # name, hash, bytes
    tokenizer: Tokenizer

    def to(self, device: torch.device) -> Corpus:
        return Corpus(self.train.to(device), self.held_out.to(device), self.texts, self.tokenizer)

    def batch(self, config: TrainConfig, step: int) -> Batch:
        """Random windows of the text; some rows end in a passkey prompt (before it: text, then end of
        document). `config` is that of one stage (`TrainConfig.at`).

        Where rows go on from their last stream (`passing.start: previous`), a row reads the text in order instead, from
        a random place of its own and on from the text's beginning at its end; any rows may then end in a prompt."""
        assert isinstance(config.train_length, int)
        rng = np.random.default_rng([config.seed, step])
        size, length = config.batch_size, config.train_length + 1
        follows = config.passing is not None and config.passing.start == "previous"
        if follows:
            places = np.random.default_rng([config.seed, 0, 1]).integers(0, len(self.train), size)
            found = places + step * config.train_length
        else:
            found = rng.integers(0, len(self.train) - length + 1, size)
        starts = torch.from_numpy(found).to(self.train.device)
        passkey = config.data.passkey
        count = int(passkey.fraction * size + rng.random())  # its mean is exactly fraction * size
        rows = rng.permutation(size)[:count] if follows else np.arange(count)  # no row of a stream always has them
        keys = np.zeros((count, length), dtype=np.int64)
        from_text = np.ones((count, length), dtype=bool)
        answer = np.zeros((size, length), dtype=bool)
        for i, row in enumerate(rows):
            n = int(rng.integers(passkey.lengths[0], passkey.lengths[1] + 1))
            keys[i, -n:], answer[row, -n:] = training_sequence(self.tokenizer, n, rng, passkey.style)
            from_text[i, -n:] = False
            if self.tokenizer.eos_id is not None:
                keys[i, -n - 1] = self.tokenizer.eos_id
                from_text[i, -n - 1] = False
        device = self.train.device
        ids = self.train[(starts[:, None] + torch.arange(length, device=device)) % len(self.train)].long()
        if count:
            keep = torch.from_numpy(from_text).to(device)
            ids[rows] = torch.where(keep, ids[rows], torch.from_numpy(keys).to(device))
        carried = None
        if config.passing is not None and follows:
            carried = torch.from_numpy(rng.random(size) < config.passing.carry).to(device)
        return Batch(ids, torch.from_numpy(answer[:, 1:]).to(device), carried)

    def validation(self, length: int, batch_size: int, most: int = 1024) -> Iterator[torch.Tensor]:
        """Disjoint windows (<= batch_size, length + 1) of the held-out text, evenly spread, at most
        `most`."""
        fit = len(self.held_out) // (length + 1)
        chosen = np.unique(np.linspace(0, max(0, fit - 1), min(fit, most)).astype(np.int64))
        for i in range(0, len(chosen), batch_size):
            rows = [self.held_out[k * (length + 1) : (k + 1) * (length + 1)] for k in chosen[i : i + batch_size]]
            yield torch.stack(rows).long()


def load_corpus(config: DataConfig, tokenizer: Tokenizer, length: int) -> Corpus:
    """Load and encode the texts. The last `held_out` share of each, whole documents where it has several, is
    kept for validation. Raises InputError when a text is missing or too short for windows of `length` + 1
    tokens."""
    train: list[torch.Tensor] = []
    held_out: list[torch.Tensor] = []
    texts: list[dict[str, str | int]] = []
    for spec in config.text:
        text = load_text(spec)
        cut = int(len(text) * (1 - config.held_out))
        boundary = text.data.rfind(b"\0", 0, cut)
        if config.held_out and boundary > 0:
            cut = boundary + 1
        while 0 < cut < len(text) and text.data[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
            cut -= 1
        train.append(_encode(tokenizer, text.data[:cut] + b"\0"))
        held_out.append(_encode(tokenizer, text.data[cut:] + b"\0"))
        texts.append({"name": text.name, "hash": text.hash, "bytes": len(text)})
    corpus = Corpus(torch.cat(train), torch.cat(held_out), texts, tokenizer)
    if len(corpus.train) < length + 1:
        names = ", ".join(config.text)
        raise InputError(f"data.text: {names} gives {len(corpus.train)} tokens; train_length {length} needs more")
    return corpus


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
