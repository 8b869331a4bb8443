"""This library's streaming models for lm-eval: `HarnessLM`, registered there as "rnn-longctx".

lm-eval asks for three things: the log-likelihood of a continuation, that of a whole text, and a continuation. All
three read their text as a stream, so a context of any length takes the memory of one segment, and every request starts
from an empty state. Importing this file without lm-eval is an InputError.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise InputError(f"this needs lm-eval ({missing}): pip install 'rnn-longctx[eval]'") from None
from tqdm import tqdm

from rnn_longctx.config import parse_length
from rnn_longctx.eval.harness.tokens import PromptTokenizer
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import as_language_model, load_any
from rnn_longctx.models.generate import continuation, prefill
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.losses import LOGITS
from rnn_longctx.models.modes import evaluating
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.models.stops import end_ids

NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # first found wins
Scored = tuple[float, bool]


@dataclass(frozen=True)
class HarnessOptions:
    """What `--model_args` of lm-eval may say beside the model.

    Attributes:
        max_length: the most tokens a request may read; longer ones are refused, never cut. Only whole texts
            (`loglikelihood_rolling`) are read in windows of it, as lm-eval defines them. None: no limit.
        batch_size: the most rows of equal length side by side.
        segment: tokens of all rows read in one call; None chooses for the device.
        mitigation, target_length, train_length, dtype, tokenizer, device: for a model that is loaded here; no
            mitigation, float32 and the CPU where they are not given.
        add_bos_token: whether texts begin with BOS; None: where the tokenizer begins with it.
        prefix_token_id: what an empty context is; None: BOS, or the end-of-document token.
        seed: of sampling, together with the number of the request.
        progress: whether a bar is shown.
        max_batch_size: lm-eval's, which is not needed.
    """

    max_length: int | str | None = None
    batch_size: int | str = 1
    max_batch_size: Any = None
    segment: int | None = None
    mitigation: str | None = None
    target_length: int | None = None
    train_length: int | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if not str(self.batch_size).isdigit() or int(self.batch_size) < 1:
            raise InputError(f"batch_size: expected at least 1 row, got {self.batch_size!r}")

    def reader(self, model: Any) -> LanguageModel:
        """Return the model of a name, loaded and with its remedy on it, or one that was loaded as what reads it.

        Raises:
            InputError: it cannot be loaded, or was loaded already and is to be loaded otherwise.
        """
        loading = {name: getattr(self, name) for name in ("device", "dtype", "tokenizer", "train_length")}
        if isinstance(model, str):
            defaults = {"device": self.device or "cpu", "dtype": self.dtype or "float32"}
            loaded = load_any(model, **loading | defaults)
            mitigate(loaded, self.mitigation or "none", target_length=self.target_length)
            return loaded
        loading |= {"mitigation": self.mitigation, "target_length": self.target_length}
        reader = as_language_model(model)
        if unread := [name for name, value in loading.items() if value is not None]:
            raise InputError(f"{', '.join(unread)}: of a model that is named; {reader.name} is loaded already")
        return reader


@register_model("rnn-longctx")
class HarnessLM(TemplateLM):
    """A model of this library, with whatever remedy is on it, as lm-eval reads one.

    Text is cut into tokens as by lm-eval's own HFLM: context and continuation as one, split after the context's tokens;
    with BOS where the tokenizer adds it, chat markers and special tokens as one id each, and without special tokens in
    answers. An empty context is BOS, or the end-of-document token (NUL in bytes). As there, a whole text that begins
    with BOS is scored with it, after another. Unlike HFLM, no end token stands behind a prompt (see `PromptTokenizer`).

    Args:
        model: a loaded model, or what `rnn_longctx.load` or `load_adopted` reads (`--model_args model=...` of lm-eval).
        options: those of `HarnessOptions`.
    Attributes:
        tokens_read: by the name of a task, the tokens of each prompt: before the continuation, or of a whole text.
    Raises:
        InputError: a model that cannot be loaded, a setting out of range, or one that a loaded model does not take.
    """

    def __init__(self, model: Any, **options: Any):
        super().__init__()
        o = HarnessOptions(**options)
        self.model = o.reader(model)
        self.seed, self.progress = o.seed, o.progress
        self.text = PromptTokenizer(self.model.tokenizer, o.add_bos_token, o.prefix_token_id)
        self.tokenizer: Any = self.text.full or self.model.tokenizer  # lm-eval looks for a chat template there
        self.tokens_read: dict[str | None, list[int]] = {}
        self.max_length = None if o.max_length is None else parse_length(o.max_length, "max_length")
        self.batch_size = int(o.batch_size)
        self.segment = SEGMENTS[self.model.device.type] if o.segment is None else parse_length(o.segment, "segment")
        self._device = self.model.device

    # --- tokens

    @property
    def eot_token_id(self) -> int:
        return self.text.prefix_id if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.prefix_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string, add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template has it. InputError: it has none."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(f"tokenizer {self.tokenizer_name} has no chat template")
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _note(self, request: Any, tokens: int) -> None:
        self.tokens_read.setdefault(request.task_name, []).append(tokens)

    # --- log-likelihoods

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Scored]:
        """Return (log p of the continuation in nats, whether greedy decoding would say it) for every request."""
        pairs = [self._pair(*request.args) for request in requests]
        for request, (context, _, _) in zip(requests, pairs):
            self._note(request, len(context))
        if moved := sum(elsewhere for *_, elsewhere in pairs):
            logging.getLogger(__name__).warning(
                "the tokens of the context are not the first ones of context and continuation in %d of %d requests:"
                " what is read there, as by lm-eval's own models, is not quite that text",
                moved,
                len(requests),
            )
        return self._loglikelihood_tokens([(r.args, *pair[:2]) for r, pair in zip(requests, pairs)])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
        """Return the ids of a context and of a continuation, and whether the first are no prefix of the ids of both.

        Raises:
            InputError: the continuation adds no token, and would be scored as if it were certain.
        """
        if context:
            before, scored = self._encode_pair(context, continuation)
            moved = self.tok_encode(context + continuation)[: len(before)] != before
            before = before or [self.prefix_token_id]  # spaces alone, which are scored
        else:
            scored, moved = self.tok_encode(continuation, add_special_tokens=False), False
            before = [self.prefix_token_id]
            if scored[:1] == before:
                before, scored = scored[:1], scored[1:]
        if not scored:
            end = f"the context that ends in {context[-30:]!r}" if context else "an empty context"
            raise InputError(
                f"the continuation {continuation!r:.60} adds no token to {end}: tokenizer "
                f"{self.tokenizer_name} drops it, or joins the two"
            )
        return before, scored, moved

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log p in nats of each whole text, every token of it predicted once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            size = self.max_length or max(1, len(ids))
            self._note(request, min(size, len(ids)))
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, size, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[i] += value
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Scored]:
        """Return what `loglikelihood` does. A context that several continuations share (the choices of a question) is
        read once, and its state copied; the others go side by side where they are equally long."""
        if self.model.reader is not None:
            raise InputError("a remedy that reads prompts its own way has no log-likelihood of a text; it can generate")
        for _, context, scored in requests:
            self._fits(len(context) + len(scored) - 1)
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            shared.setdefault(tuple(context), []).append(i)
        apart: list[int] = []
        scores: dict[int, Scored] = {}

        with self._bar(requests) as bar, evaluating(self.model):
            for prefix, rows in shared.items():
                if len(rows) == 1 or len(prefix) == 1:
                    apart += rows
                    continue
                cache = self.model.new_cache()
                for hidden in self.model.stream(torch.tensor([prefix[:-1]]), cache, self.segment):
                    bar.update(hidden.shape[1])
                for batch in self._batches(rows, lambda i: len(requests[i][2])):
                    pairs = [(prefix[-1:], tuple(requests[i][2])) for i in batch]
                    scores |= zip(batch, self._score(pairs, cache.rows([0] * len(batch)), bar))
            for batch in self._batches(apart, lambda i: len(requests[i][1]) + len(requests[i][2])):
                pairs = [(tuple(requests[i][1]), tuple(requests[i][2])) for i in batch]
                scores |= zip(batch, self._score(pairs, self.model.new_cache(), bar))

        if lost := sum(not math.isfinite(value) for value, _ in scores.values()):
            logging.getLogger(__name__).warning(
                "%d of %d log-likelihoods are not numbers, and no score means anything: try float32, or other weights",
                lost,
                len(requests),
            )
        for i, (text, *_) in enumerate(requests):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, scores[i])
        return [scores[i] for i in range(len(requests))]

    def _score(self, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], cache: Any, bar: Any) -> list[Scored]:
        """Return the scores of rows of one length in all, (what goes before, what is scored), read from a cache on."""
        whole = torch.tensor([before + scored for before, scored in pairs])  # (B, T + 1)
        first = torch.tensor([len(before) for before, _ in pairs])[:, None]  # (B, 1)
        start = int(first.min()) - 1  # nothing before this position is scored in any row
        total, greedy, t = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool), 0
        for hidden in self.model.stream(whole[:, :-1], cache, max(1, self.segment // len(pairs))):
            u, a = t + hidden.shape[1], max(t, start)
            if a < u:
                losses, hits = self._losses(hidden[:, a - t :], whole[:, a + 1 : u + 1])
                counts = torch.arange(a + 1, u + 1) >= first
                total += losses.masked_fill(~counts, 0).sum(1)
                greedy &= (hits | ~counts).all(1)
            bar.update(hidden.shape[1] * len(pairs))
            t = u
        return list(zip((-total).tolist(), greedy.tolist()))

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p(target) in nats and whether it is the likeliest token, (B, T) on the CPU.

        Only few tokens' logits are held at once.
        """
        flat, goal = hidden.flatten(0, 1), targets.flatten().to(hidden.device)
        rows = max(1, LOGITS // self.model.vocab_size)
        losses, hits = [], []
        for i in range(0, len(flat), rows):
            logits, expected = self.model.logits(flat[i : i + rows]), goal[i : i + rows]
            losses.append(F.cross_entropy(logits, expected, reduction="none").double().cpu())
            hits.append((logits.argmax(-1) == expected).cpu())
        return torch.cat(losses).view(targets.shape), torch.cat(hits).view(targets.shape)

    # --- generation

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model says after each context, up to a stop sequence, an end token of its or max_gen_toks."""
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        for request, prompt, (_, new, _) in zip(requests, prompts, settings):
            self._fits(len(prompt) + new)
            self._note(request, len(prompt))
        answers: dict[int, str] = {}
        with self._bar([(None, prompt, [0]) for prompt in prompts]) as bar:
            # what is drawn must not depend on who sits beside: sampled rows go alone
            for batch in self._batches(
                list(range(len(requests))),
                lambda i: (len(prompts[i]), json.dumps(settings[i]), i if settings[i][2] else None),
            ):
                until, new, temperature = settings[batch[0]]
                texts = self._continue([prompts[i] for i in batch], until, new, temperature, self.seed + batch[0])
                answers |= zip(batch, texts)
                bar.update(sum(len(prompts[i]) for i in batch))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _continue(
        self, prompts: list[list[int]], until: list[str], new: int, temperature: float, seed: int
    ) -> list[str]:
        """Return the answers to prompts of one length, read side by side until the last of them has stopped."""
        generator = torch.Generator(self.model.device).manual_seed(seed) if temperature else None
        logits, cache = prefill(self.model, torch.tensor(prompts), segment=max(1, self.segment // len(prompts)))
        stream = continuation(self.model, logits, cache, temperature, generator)
        ends = {*end_ids(self.model), self.text.eos_id}
        ids: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for _ in range(new):
            for row, token in enumerate(next(stream).tolist()):
                if row in going:
                    ids[row].append(token)
                    # a stop may be a chat marker, which answers go without, or stand around one
                    ways = [self.text.decode(ids[row], skip) for skip in (False, True)] if until else []
                    if token in ends or any(stop in text for stop in until for text in ways):
                        going.discard(row)
            if not going:
                break
        texts = [self.text.decode(row) for row in ids]
        end = "" if self.text.eos_id is None else self.text.decode([self.text.eos_id], False)
        for stop in [*until, end] if end else until:  # a model may spell its end token out
            texts = [text.split(stop)[0] for text in texts]
        return texts

    # --- both

    def _batches(self, rows: list[int], key: Callable[[int], Any]) -> Iterator[list[int]]:
        """Yield rows of equal keys, `batch_size` at a time, those with the greatest keys first (the longest)."""
        groups: dict[Any, list[int]] = {}
        for i in rows:
            groups.setdefault(key(i), []).append(i)
        for _, group in sorted(groups.items(), key=lambda kv: kv[0] if isinstance(kv[0], int) else kv[0][0])[::-1]:
            for i in range(0, len(group), self.batch_size):
                yield group[i : i + self.batch_size]

    def _fits(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise InputError(f"a request reads {tokens} tokens, more than max_length = {self.max_length}")

    def _bar(self, requests: list[Any]) -> Any:
        total = sum(len(context) + len(scored) - 1 for _, context, scored in requests)
        return tqdm(total=total, unit="token", unit_scale=True, disable=not self.progress)


def _settings(kwargs: dict[str, Any]) -> tuple[list[str], int, float]:
    """Return the stop sequences, the most new tokens, and the temperature (0: greedy) of a request.

    Raises:
        InputError: a setting would change what is said, and these models do not have it.
    """
    kwargs = dict(kwargs)
    until = kwargs.pop("until", None) or []
    until = [until] if isinstance(until, str) else [stop for stop in until if stop]
    limits = [int(kwargs.pop(name)) for name in NEW_TOKENS if kwargs.get(name) is not None]
    temperature, sample = kwargs.pop("temperature", None), kwargs.pop("do_sample", None)
    temperature = float((1.0 if sample else 0.0) if temperature is None else temperature)
    if sample is False:
        temperature = 0.0
    new = limits[0] if limits else 256  # 256: what lm-eval takes
    unknown = sorted(k for k, v in kwargs.items() if k in ("top_p", "top_k", "min_p", "repetition_penalty") and v)
    if (unknown and temperature) or kwargs.get("num_beams", 1) != 1:
        raise InputError(f"generation here is greedy or by temperature, without {', '.join(unknown) or 'beams'}")
    if new < 1 or temperature < 0:
        raise InputError(f"generation needs max_gen_toks >= 1 and temperature >= 0, got {new} and {temperature}")
    return until, new, temperature
