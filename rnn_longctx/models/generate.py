"""Generation: read the prompt as a stream, then one token after another from the carry.

An answer ends at the end-of-sequence id, a stop string or `max_new_tokens`, whichever comes first. A cache that was
handed in then holds all that was read and said, and the next prompt goes on from there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.ids import rows_of
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import evaluating, in_evaluation
from rnn_longctx.models.segments import SEGMENT, last_hidden
from rnn_longctx.models.stops import (
    TextStream,
    end_ids,
    stop_strings,
    tokenizer_at_hand,
    tokenizer_for_text,
    unused_rows,
)
from rnn_longctx.recurrence import triton

# Tokens between two looks at whether an answer has ended, where a GPU runs ahead, no cache is kept and no text is taken
# on the way; what is said beyond the end is dropped.
LOOK = 16
COLDEST = 1e-30  # a temperature below would take logits past float32's range, and is greedy long before


@torch.no_grad()
@in_evaluation
def prefill(
    model: LanguageModel,
    ids: Tensor,
    cache: StreamCache | None = None,
    segment: int = SEGMENT,
    mask: Tensor | None = None,
) -> tuple[Tensor, StreamCache]:
    """Read ids (B, T) and return the logits (B, vocab) after the last token, and the cache.

    Under a control only the tokens that its state depends on are read.

    Args:
        cache: what was read before; it is moved on in place.
        mask: (B, T) bool, False at left padding. Rows that go on from something, or are read by a remedy's reader, are
            then read apart, those of one length side by side.
    """
    if mask is not None and bool(mask.all()):
        mask = None
    if model.reader is not None and cache is not None:
        raise InputError(
            "a remedy that reads a whole prompt cannot go on from what was read before, and keeps no state itself"
        )
    if mask is not None and (model.reader is not None or (cache is not None and bool(cache.position.any()))):
        return _read_apart(model, ids, cache, segment, mask)
    if model.reader is not None:
        return model.reader(model, ids, segment)
    cache = model.new_cache() if cache is None else cache
    fresh = mask is None and not bool(cache.position.any())
    if model.restart is not None and fresh and (start := model.restart.block_start(ids.shape[1])):
        model.restart.skip_to(start, ids, cache, model.device)
        ids = ids[:, start:]
    if mask is None:
        return model.logits(last_hidden(model.stream(ids, cache, segment))), cache
    for some, real in zip(ids.split(segment, 1), mask.split(segment, 1)):
        last = model(some.to(model.device), cache, real.to(model.device))[:, -1]
    return model.logits(last), cache


def _read_apart(model: Any, ids: Tensor, cache: Any, segment: int, mask: Tensor) -> tuple[Tensor, Any]:
    """Read rows of unequal lengths as `prefill` does, those of one length side by side."""
    lengths: list[int] = mask.sum(1).tolist()
    logits: list[Tensor] = []
    caches: list[Any] = []
    order: list[int] = []
    for length in sorted(set(lengths)):
        rows = [row for row, n in enumerate(lengths) if n == length]
        group = None if cache is None else cache.rows(rows)
        some, group = prefill(model, ids[rows, -length:], group, segment)
        logits.append(some)
        caches.append(group)
        order += rows
    whole = type(caches[0]).concat(caches, order)
    if cache is not None:
        cache.restore(whole)
    return torch.cat(logits)[torch.tensor(order).argsort().to(model.device)], whole if cache is None else cache


class Continuation(Iterator[Tensor]):
    """An endless iterator of what a model says after `prefill`: a token (B,) at a time. See `continuation`."""

    def __init__(
        self, model: Any, logits: Tensor, cache: Any, temperature: float = 0.0, generator: torch.Generator | None = None
    ):
        self.model, self.temperature, self.generator = model, temperature, generator
        self._cache, self._logits = cache, logits
        self._decoder = None if Decoder.refuses(model, cache) or triton.interpreted() else Decoder(model, cache)
        self._unused = unused_rows(tokenizer_at_hand(model), logits.shape[-1], logits.device)
        self._token: Tensor | None = None  # said, and not read yet

    @torch.no_grad()
    def __next__(self) -> Tensor:
        self.read()
        logits = self._logits if self._unused is None else self._logits.masked_fill(self._unused, -torch.inf)
        if self.temperature > 0:
            probabilities = (logits / max(self.temperature, COLDEST)).softmax(-1)
            self._token = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        else:
            self._token = logits.argmax(-1)
        return self._token

    @torch.no_grad()
    def read(self) -> None:
        """Read the token that was said last, which otherwise waits until the next one is asked for."""
        if self._token is None:
            return
        if self._decoder is not None:  # in whose steps no mode enters
            self._logits = self._decoder(self._token)
        else:
            with evaluating(self.model):  # a token at a time: between two of them the model is as it was
                self._logits = self.model.logits(self.model(self._token[:, None], self._cache)[:, -1])
        self._token = None

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are queued on a GPU, so that looking at a token would wait for all of them."""
        return self._decoder is not None

    def cache(self) -> Any:
        """Return what was read so far: the cache that is moved on, or a copy of a decoder's state."""
        return self._cache if self._decoder is None else self._decoder.cache()


def continuation(
    model: LanguageModel,
    logits: Tensor,
    cache: StreamCache,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Continuation:
    """Return an iterator of the tokens (B,) after `prefill`; greedy where temperature is 0. It stops at no id.

    Rows of the vocabulary that stand for no token are never said. The last token is not read until the next is asked
    for. The cache is moved on, but where a `Decoder` steps on a GPU.
    """
    return Continuation(model, logits, cache, temperature, generator)


def prompt_ids(model: Any, prompt: Any) -> Tensor:
    """Return a prompt as ids (B, T), int64, T >= 1: text, which the model's tokenizer encodes, or whole numbers in the
    model's vocabulary, (B, T) or, as one row, (T). Ids that stand for no token of the tokenizer are read as any other,
    since the model has a row for each. Raises InputError for anything else."""
    if isinstance(prompt, str | bytes):
        if model.tokenizer is None:
            raise InputError(f"the prompt is text, and {model.name} has no tokenizer: give ids (B, T), or a tokenizer")
        prompt = model.tokenizer.encode(prompt)
    expected = "a prompt is text, or token ids (B, T) or (T) as a tensor, array or list of whole numbers"
    ids = rows_of(prompt, expected)
    if 0 in ids.shape:
        raise InputError(f"{expected}, at least one of them; got shape {tuple(ids.shape)}")
    size = getattr(getattr(model, "embedding", None), "num_embeddings", model.config.vocab_size)
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise InputError(f"token ids of {model.name} lie in 0 to {size - 1}; got {int(low)} to {int(high)}")
    return ids


def prompt_rows(model: Any, prompts: Any) -> tuple[Tensor, Tensor | None]:
    """Return the ids of a prompt, or of a list of prompts of one row each and of any lengths: (B, T), padded at the
    left, and a mask (B, T) that is False there, None where nothing is padded."""
    several = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not several or isinstance(prompts[0], Real) or getattr(prompts[0], "ndim", 1) == 0:
        return prompt_ids(model, prompts), None
    rows = []
    for prompt in prompts:
        ids = prompt_ids(model, prompt)
        if len(ids) != 1:
            raise InputError(f"in a list of prompts each is one row; got one of shape {tuple(ids.shape)}")
        rows.append(ids[0])
    longest = max(map(len, rows))
    mask = (
        torch.arange(longest, device="cpu") >= longest - torch.tensor([len(row) for row in rows], device="cpu")[:, None]
    )
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    return ids, None if bool(mask.all()) else mask


class Answer:
    """The answer to one prompt or to several side by side, in the making. Arguments and errors are those of `generate`.

    Attributes:
        texts: one `TextStream` a row, where there are stop strings or text is wanted.
        ends: ids that end a row.
    """

    def __init__(
        self,
        model: Any,
        prompt: Any,
        max_new_tokens: Any,
        temperature: Any,
        seed: Any,
        cache: Any,
        stop: str | Sequence[str],
        text: bool = False,
    ):
        model = as_language_model(model)
        ids, mask = prompt_rows(model, prompt)
        if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens: expected a whole number >= 0, got {max_new_tokens!r:.60}")
        if not isinstance(temperature, Real) or not float(temperature) >= 0:
            raise InputError(f"temperature: expected a number >= 0, got {temperature!r:.60}")
        if not isinstance(seed, Integral | None):
            raise InputError(f"seed: expected a whole number, got {seed!r:.60}")
        self.model, self.ids, self.mask, self.cache = model, ids, mask, cache
        self.most, self.temperature = int(max_new_tokens), float(temperature)
        self.generator = None if seed is None else torch.Generator(model.device).manual_seed(int(seed))
        self.ends: tuple[int, ...] = end_ids(model)
        stops, self._streamed = stop_strings(stop), text
        self.texts = [TextStream(tokenizer_for_text(model), stops) for _ in ids] if text or stops else []
        self.lengths = torch.zeros(len(ids), dtype=torch.int64, device="cpu")  # tokens of every row, its last included
        self._said: list[Tensor] = []
        self._seen = 0  # of these, how many were looked at
        self._going = list(range(len(ids)))

    def steps(self) -> Generator[None, None, None]:
        """Say one token after another. Where this ends, or is closed, the cache holds all that was said."""
        logits, cache = prefill(self.model, self.ids, self.cache, mask=self.mask)
        saying = continuation(self.model, logits, cache, self.temperature, self.generator)
        look = LOOK if saying.runs_ahead and self.cache is None and not self._streamed else 1
        ended: list[int] = []  # rows, with the token before
        aside: list[tuple[list[int], Any]] = []  # rows that ended before others, and what they had read
        while self._going and len(self._said) < self.most:
            token = next(saying)
            if ended and self.cache is not None:
                aside.append((ended, saying.cache().rows(ended)))
            self._said.append(token)
            if len(self._said) % look == 0 or len(self._said) == self.most:
                ended = self._look()
            try:
                yield
            except GeneratorExit:
                break
        if self.cache is not None:
            saying.read()
            self._settle(saying.cache(), aside)

    def tokens(self) -> Tensor:
        """Return what was said so far, (B, n); rows that ended before others are filled up with the first of `ends`."""
        if not self._said:
            return self.ids[:, :0]
        spoken = torch.stack(self._said[: int(self.lengths.max())], 1)
        over = torch.arange(spoken.shape[1], device="cpu") >= self.lengths[:, None]
        return spoken.masked_fill(over.to(spoken.device), self.ends[0] if self.ends else 0)

    def _look(self) -> list[int]:
        """Look at the tokens said since the last look; returns the rows that end in them."""
        new, self._seen = self._said[self._seen :], len(self._said)
        if not self.ends and not self.texts:  # a GPU need not be waited for
            self.lengths += len(new)
            return []
        ended: list[int] = []
        for values in torch.stack(new).tolist():
            self.lengths[self._going] += 1
            for row in self._going:
                ends = values[row] in self.ends
                if self.texts and not ends:  # (the end is no text)
                    self.texts[row].add(values[row])
                    ends = self.texts[row].stopped
                ended += [row] if ends else []
            self._going = [row for row in self._going if row not in ended]
        return ended

    @torch.no_grad()
    def _settle(self, state: Any, aside: list[tuple[list[int], Any]]) -> None:
        """Put what every row has read into the cache that was handed in."""
        if aside:
            early = [row for rows, _ in aside for row in rows]
            late = [row for row in range(len(self.ids)) if row not in early]
            caches = [group for _, group in aside]
            state = type(state).concat([*caches, state.rows(late)] if late else caches, early + late)
        if state is not self.cache:
            self.cache.restore(state)


def generate(
    model: Any,
    prompt: Any,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    cache: Any = None,
    stop: str | Sequence[str] = (),
) -> Tensor:
    """Continue a prompt, or several side by side; returns the new tokens alone, (B, n), n <= max_new_tokens.

    A row ends with an end-of-sequence id (the tokenizer's, or one of the config's: see `rnn_longctx.models.stops`) or
    with the token that makes a stop string whole, which are the last of its tokens. Rows that end before others are
    filled up with the end-of-sequence id (0 where there is none). Rows of the vocabulary that stand for no token of the
    model's tokenizer are never said; losses count them as any other.

    Args:
        model: this library's, or one of another library, which is adopted.
        prompt: ids (B, T), T >= 1, or (T), one row; or text, for a model with a tokenizer; or a list of such rows, of
            unequal lengths too: each is answered as it would be alone.
        temperature: 0 is greedy.
        cache: what was read before the prompt. After the call it holds all that was read and said, of every row the
            prompt and its answer, so that the next prompt goes on from there. That takes one more step of the model.
        stop: a string or several, looked for in the new text alone.
    Raises:
        InputError: no model, no prompt that it reads, what is no number, or below 0; stop strings without a tokenizer.
            Rows that ended at different lengths in a cache that cannot hold such rows (attention that was cropped, or
            drops old keys by itself).
    """
    answer = Answer(model, prompt, max_new_tokens, temperature, seed, cache, stop)
    for _ in answer.steps():
        pass
    return answer.tokens()


def generate_stream(
    model: Any,
    prompt: Any,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    cache: Any = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """Continue one prompt; yields the new text as it is made, in pieces.

    A character of several tokens comes whole, and so does a stop string, which ends the text together with whatever
    else its last token says; an end-of-sequence id is no text. Arguments, errors and the cache are as of `generate`.
    Where the iterator is left early the cache holds what was said up to there.
    """
    answer = Answer(model, prompt, max_new_tokens, temperature, seed, cache, stop, text=True)
    if len(answer.ids) != 1:
        raise InputError(f"text is streamed of one prompt at a time, got {len(answer.ids)}: take generate for several")
    return _pieces(answer)


def _pieces(answer: Answer) -> Iterator[str]:
    (text,) = answer.texts
    with closing(answer.steps()) as steps:
        for _ in steps:
            if piece := text.take():
                yield piece
    if piece := text.rest():
        yield piece
