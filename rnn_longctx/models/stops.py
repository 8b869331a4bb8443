"""Where an answer ends, what may be said in it, and its text as it is made.

ends       the tokenizer's end-of-sequence id, and those of the model's config (`LanguageModel.eos_token_id`)
unused     rows of a model's vocabulary that stand for no token of its tokenizer (padding, holes): never said
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.interface import LanguageModel


def tokenizer_at_hand(model: LanguageModel) -> Any:
    """The model's tokenizer, or None where it has none or it cannot be had."""
    return model.tokenizer.at_hand() if isinstance(model.tokenizer, LazyTokenizer) else model.tokenizer


def tokenizer_for_text(model: LanguageModel) -> Any:
    """The model's tokenizer. Raises InputError where it has none or it cannot be had."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, and what it says no text: give it one")
    return model.tokenizer.load() if isinstance(model.tokenizer, LazyTokenizer) else model.tokenizer


def end_ids(model: LanguageModel) -> tuple[int, ...]:
    """The ids that end an answer, the tokenizer's first."""
    of_config = model.eos_token_id
    ids = [of_config] if of_config is None or isinstance(of_config, int) else list(of_config)
    return tuple(dict.fromkeys(i for i in [getattr(tokenizer_at_hand(model), "eos_id", None), *ids] if i is not None))


def unused_rows(tokenizer: Any, size: int, device: torch.device | str = "cpu") -> Tensor | None:
    """True (size,) at the rows of a vocabulary that stand for no token; None where every row stands for one, or there
    is no tokenizer."""
    if tokenizer is None:
        return None
    unused = torch.arange(size, device="cpu") >= tokenizer.vocab_size
    unused[[i for i in getattr(tokenizer, "unused", ()) if i < size]] = True
    return unused.to(device) if bool(unused.any()) else None


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several as several. Raises InputError for anything else."""
    strings: tuple[Any, ...] = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    if not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop: expected a string or a list of them, none of them empty; got {stop!r:.60}")
    return strings


class TextStream:
    """The text of an answer, token by token.

    `take` gives what is whole: bytes that do not make a character yet are held back, and so is the beginning of a stop
    string until it is whole or cannot become one.

    Attributes:
        stopped: whether the text holds a stop string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        self._ids: list[int] = []  # some whose text is known, since that of the next hangs on them; then the others
        self._known = 0  # how many
        self._text = ""  # not taken yet

    def add(self, token: int) -> None:
        self._ids.append(token)
        text = self._new()
        if text.endswith("\ufffd"):  # a character that is not whole, as a rule
            return
        self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
        self._text += text
        self.stopped = self.stopped or any(stop in self._text for stop in self.stops)

    def take(self) -> str:
        """The text since the last call that nothing to come can change."""
        held = 0 if self.stopped else max((_overlap(self._text, stop) for stop in self.stops), default=0)
        text, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return text

    def rest(self) -> str:
        """What was held back, where the answer ends."""
        text, self._text = self._text + self._new(), ""
        self._ids, self._known = [], 0
        return text

    def _new(self) -> str:
        known = self.tokenizer.decode(self._ids[: self._known]) if self._known else ""
        return self.tokenizer.decode(self._ids)[len(known) :] if self._ids else ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
