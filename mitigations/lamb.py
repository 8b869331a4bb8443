"""Attention-guided token filtering (LAMB, ACL 2025 short papers, 96): heads that see far keep of a prompt the tokens
that its last ones, the question, attend to, and skip the others: log-decay 0, input scale 0.

    hidden attention of the question's token i to token j in a head
    a_ij = C_i^T B_j dt_j exp(sum of log-decays after j, up to i)
    kept: the `tokens` tokens j of the largest max over i of |a_ij|, and the question itself

The formula is the paper's; how its own code applies it was not to be had. What follows is this project's choice:

- A filtered state decays by the tokens kept alone. So of the log-decays before the question only their share counts,
  tokens / (tokens before the question). With all of them an early token is faint before it can be chosen: on the demo
  at 16K five to seven passkeys of ten are found that way, and ten with the share, which was chosen on them.
- A head sees far where exp(sum of log-decays over the training length) > theta, on the prompt's average (LongMamba).
- The prompt is read three times, in segments each: for the question's C and the sums of log-decays, for the tokens of
  the largest a_ij so far, and with the filter. Logarithms are compared, so that no product of decays underflows.
- How many tokens: the training length. How long the question is: 64 tokens, at most half the training length.

A strategy for prompts: without a question there is no choice, so that losses of a stream are not defined. What is
generated afterwards is read by every head. A prompt of at most the training length is read as it is. Memory does not
grow with the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.measure.taps import tapping
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, same_everywhere, train_length
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.mixer_reading import MixerReading
from rnn_longctx.models.segments import last_hidden
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import quiet

if TYPE_CHECKING:
    from rnn_longctx.data import Text

SKIPPED = ScanPolicy(min_dt=torch.finfo(torch.float32).tiny)  # tokens of step 0, whatever other remedies do to gates


@REMEDIES.register
@dataclass(frozen=True)
class Lamb(Remedy):
    """Let heads that see far skip what the question does not attend to.

    Attributes:
        tokens: how many such a head keeps, the question not counted; None: the training length.
        query: tokens of the question.
        theta: what must be left of a token after the training length for a head to see far, in (0, 1).
    """

    name = "lamb"
    needs = frozenset({Need.RECURRENCE, Need.STEPS, Need.KEYS, Need.TRAIN_LENGTH})
    examples = ("lamb:tokens=9,query=5,theta=0.3",)
    tokens: int | None = quiet(None)
    query: int = quiet(64)
    theta: float = quiet(0.05)

    def __post_init__(self) -> None:
        if (self.tokens is not None and self.tokens < 1) or self.query < 1:
            raise InputError(f"lamb: tokens and query are at least 1 token, got {self.tokens} and {self.query}")
        if not 0 < self.theta < 1:
            raise InputError(f"lamb: theta must lie in (0, 1), got {self.theta:g}")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        length = train_length(model, "lamb")
        tokens = self.tokens or length

        @torch.no_grad()
        def reader(model: LanguageModel, ids: Tensor, segment: int) -> tuple[Tensor, StreamCache]:
            query = min(self.query, max(1, length // 2))
            if ids.shape[1] <= max(length, tokens + query):
                return _read(model, ids, segment)
            questions = [Question(ids.shape[1], query, mixer.policy) for mixer in model.mixers]
            choices = [Choice(question, tokens) for question in questions]
            filters = [Filter(choice, math.log(self.theta) / length) for choice in choices]
            for taps in (questions, choices):
                with tapping(model.mixers, taps):
                    for _ in model.stream(ids, None, segment):
                        pass
            with tapping(model.mixers, filters):
                return _read(model, ids, segment)

        return Plan(same_everywhere(model, SKIPPED), reader=reader)


def _read(model: LanguageModel, ids: Tensor, segment: int) -> tuple[Tensor, StreamCache]:
    """Return the logits (B, vocab) after the last of ids (B, T), and the cache."""
    cache = model.new_cache()
    last = last_hidden(model.stream(ids, cache, segment))
    return model.logits(last), cache


class Question:
    """The queries of a prompt's last tokens in one layer, and how it decays up to them: a `Tap` for one stream.

    Attributes:
        body: tokens before the question.
        policy: what the layer's gates are changed by.
        log_decay: (B, H) float64, the sum over those tokens.
    """

    log_decay: Tensor

    def __init__(self, total: int, query: int, policy: ScanPolicy):
        self.body, self.policy = total - query, policy
        self._read = 0
        self._C: list[Tensor] = []
        self._decays: list[Tensor] = []

    def __call__(self, reading: MixerReading) -> None:
        log_decay = reading.gates.worked_out(_dtype(reading), self.policy).log_decay.double()
        body = max(0, self.body - self._read)
        total = log_decay[:, :body].sum(1)
        self.log_decay = self.log_decay + total if self._read else total
        self._read += log_decay.shape[1]
        if body < log_decay.shape[1]:
            self._C.append(reading.inputs.C[:, body:].clone())  # (a view would keep all of the call)
            self._decays.append(log_decay[:, body:].clone())

    @property
    def C(self) -> Tensor:
        """(B, q, G, N)."""
        return torch.cat(self._C, 1)

    @property
    def reach(self) -> Tensor:
        """(B, q, H) float64, the sum of log-decays from the question's first token up to each."""
        return torch.cat(self._decays, 1).cumsum(1)


class Choice:
    """The tokens that a question attends to most, head by head of one layer: a `Tap` for one stream.

    Attributes:
        question: has seen the whole prompt when the first token comes.
        scores, positions: (B, H, <= tokens) the largest log |a_ij| so far, and which tokens j they are of.
    """

    scores: Tensor
    positions: Tensor

    def __init__(self, question: Question, tokens: int):
        self.question, self.tokens = question, tokens
        self._read = 0

    def __call__(self, reading: MixerReading) -> None:
        question, dtype = self.question, _dtype(reading)
        if not self._read:
            self._after = question.log_decay
            self.scores = torch.empty(*self._after.shape, 0, dtype=torch.float64, device=self._after.device)
            self.positions = torch.empty_like(self.scores, dtype=torch.int64)
        gates = reading.gates.worked_out(dtype, question.policy)
        body = max(0, min(gates.log_decay.shape[1], question.body - self._read))
        after = self._after[:, None] - gates.log_decay[:, :body].double().cumsum(1)
        self._after = after[:, -1] if body else self._after
        products = hidden_attention(question.C, question.reach, reading.inputs.B[:, :body], dtype)
        scores = products + gates.input_scale[:, :body].double().log() + self.tokens / question.body * after
        positions = torch.arange(self._read, self._read + body, device=scores.device)
        self._read += gates.log_decay.shape[1]
        scores = torch.cat([self.scores, scores.transpose(1, 2)], 2)
        positions = torch.cat([self.positions, positions.expand(*scores.shape[:2], body)], 2)
        self.scores, largest = scores.topk(min(self.tokens, scores.shape[2]), dim=2)
        self.positions = positions.gather(2, largest)


def hidden_attention(C: Tensor, reach: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Return max over queries i of log |C_i^T B_j| + reach_i, (B, T, H) float64: what of log |a_ij| hangs on both.

    Args: C (B, q, G, N); reach (B, q, H); B (B, T, G, N); dtype: of the products.
    """
    products = torch.einsum("bqgn,btgn->bqtg", C.to(dtype), B.to(dtype)).abs().log().double()
    by_head = products.repeat_interleave(reach.shape[-1] // products.shape[-1], dim=-1)
    return (by_head + reach[:, :, None]).amax(1)


class Filter:
    """Let a layer skip, call by call of one stream, what its heads that see far did not choose; a `Tap`.

    Args: least: the log-decay a token above which a head sees far.
    """

    def __init__(self, choice: Choice, least: float):
        self._choice, self._least, self._read = choice, least, 0

    def __call__(self, reading: MixerReading) -> SteppedGates:
        assert isinstance(reading.gates, SteppedGates)
        steps = reading.gates.worked_out(_dtype(reading)).input_scale
        keep = self.keep(steps.shape[1])
        self._read += steps.shape[1]
        return reading.gates.stepping(steps * keep)

    def keep(self, count: int) -> Tensor:
        """Return which of the next `count` tokens each head reads, (B, count, H)."""
        question = self._choice.question
        at = self._choice.positions - self._read
        at = torch.where((at >= 0) & (at < count), at, count)  # (beyond the tokens, where nobody looks)
        keep = torch.zeros(*at.shape[:2], count + 1, dtype=torch.bool, device=at.device).scatter(2, at, True)
        keep |= (question.log_decay / question.body <= self._least)[..., None]
        keep[..., max(0, question.body - self._read) :] = True
        return keep[..., :count].transpose(1, 2)


def _dtype(reading: MixerReading) -> torch.dtype:
    """Return the type to work gates out in: at least float32."""
    return torch.promote_types(reading.inputs.x.dtype, torch.float32)
