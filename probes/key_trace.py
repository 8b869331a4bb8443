"""What becomes of a passkey in the states of a model: how much of it each head still holds at growing gaps between key
and question, and what an answer needs.

Some rows are read side by side that are alike in all but the key, five digits. So whatever differs between their states
is the key: its *signal* in a head is the root mean square, over rows, of the distance of the row's state from the mean
of all rows. Read on, at every gap the question is asked from copies of the caches, as they are and with states put
into them. Of a recurrence that fades and adds, with a the decay since the key,

    state at the gap = a * (state at the key) + what was written later

the two causes of loss are told apart without reading again: `undecayed` has a = 1, `unwritten` no later writes. Where a
recurrence erases as well (the delta rule) there is no such sum, and these two are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import format_length, home_path
from rnn_longctx.data import Text, Tokenizer, tokens
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.files import write_atomic
from rnn_longctx.measure.taps import tapping, taps_everywhere
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import LanguageModel, erases
from rnn_longctx.models.mixer_reading import MixerReading, Tap
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.plain import csv_text
from rnn_longctx.recurrence.gates import AnyGates, DeltaGates
from rnn_longctx.tasks.base import TooShort
from rnn_longctx.tasks.passkey import PAPER, draw_key
from rnn_longctx.tasks.prompts import FILLER, Hidden, Prompt, fill, piece

SEGMENT = 2048  # tokens of each row that are read at once
BEFORE = 512  # tokens of filler before the key, or a few more
TRIES = 200  # keys drawn, of which those of as many tokens as the first are taken
MOST = 1e4  # times that a signal is amplified: what is smaller is float32's rounding
SETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of heads that are restored together
ALL = {"layer": -1, "head": -1}  # of a row whose state is that of all heads
ENOUGH = 0.9  # of the rows
CAUSES = {  # what it means where a state brings the answers back
    "undecayed": "they come back if the key's share of the states had not decayed, so decay loses them",
    "unwritten": "they come back without what was written after the key, so later writes cover them",
    "amplified": "they come back if what is left were as large as at first, so it is weak, not wrong",
}
READINGS = ("plain", "held", "frozen")


@dataclass(frozen=True)
class KeyTrace:
    """What was seen of a key.

    Attributes:
        about: model, weights_hash, text, n, seed, reading, dtype.
        signals: a row a gap, layer and head: `signal` (units of the state), `kept` (the signal as a share of that
            right after the key), `decay` (what the decays alone have left of it), `norm` (of the mean state).
        answers: a row a gap and intervention (`state`, see `trace_key`), with the layer and head that it is of, -1 for
            all of them: `right` (share of the rows), `loss` (nats per answer token, mean over rows), `n`.
    """

    about: dict[str, Any]
    signals: pd.DataFrame
    answers: pd.DataFrame

    @property
    def verdict(self) -> str:
        """What loses the key, at the first gap where fewer than 90% of the rows answer, in everyday words."""
        whole = self.answers[self.answers["layer"] < 0].set_index(["gap", "state"])["right"]
        gaps = [int(gap) for gap in self.answers["gap"].unique()]
        lost = [gap for gap in gaps if whole[gap, "read"] < ENOUGH]
        if not lost:
            return f"no key is lost up to a gap of {format_length(max(gaps))}"
        if lost[0] == 0:
            return "keys are not even found right after they were read"
        right = whole[lost[0]]
        helps = [words for state, words in CAUSES.items() if right.get(state, 0.0) >= ENOUGH]
        causes = "; ".join(helps) or "no single state that was put in brings them back"
        return f"at a gap of {format_length(lost[0])} {right['read']:.0%} of the keys are found: {causes}"

    def by_gap(self, value: str) -> pd.DataFrame:
        """Return `right` or `loss` with all heads' states changed together, a row a state and a column a gap."""
        whole = self.answers[self.answers["layer"] < 0]
        return whole.pivot_table(index="state", columns="gap", values=value, sort=False)

    def heads(self, top: int = 5) -> pd.DataFrame:
        """Return of each gap the heads that lower the answers' loss most when restored alone, with what they hold."""
        alone = self.answers[(self.answers["state"] == "restored") & (self.answers["layer"] >= 0)]
        best = alone.sort_values(["gap", "loss"]).groupby("gap").head(top)
        columns = ["gap", "layer", "head", "right", "loss", "kept", "decay"]
        return best.merge(self.signals, on=["gap", "layer", "head"])[columns]

    def save(self, directory: str | Path) -> list[Path]:
        """Write signals.csv and answers.csv, with what they are of; return the paths. Raises InputError: no such
        place."""
        out = home_path(directory)
        paths = [out / "signals.csv", out / "answers.csv"]
        try:
            out.mkdir(parents=True, exist_ok=True)
            for path, table in zip(paths, (self.signals, self.answers), strict=True):
                write_atomic(path, csv_text(table.assign(**self.about)).encode())
        except OSError as error:
            raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
        return paths


@torch.inference_mode()
@in_evaluation
def trace_key(
    model: Any,
    gaps: Sequence[int],
    n: int = 10,
    *,
    haystack: Text | None = None,
    reading: str = "plain",
    each_head: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> KeyTrace:
    """Read a key and then filler, and ask for it at every gap, with these `state`s:

        read        as they are
        restored    those of right after the key; with a layer and head, of that head alone
        damaged     those of right after the key, but for one head, whose state is as it is
        best M      the M heads restored that lower the loss most when restored alone
        undecayed   the key's share at its full size, later writes as they are
        unwritten   the key's share as it has decayed, without later writes
        amplified   what differs between rows, head by head at its size of right after the key

    Args:
        model: one of this library's with recurrent layers.
        gaps: tokens between key and question; the paper's filler is rounded up to whole repetitions.
        n: rows, each with a key of its own.
        haystack: a text as filler, slice `seed` of it, the same in all rows.
        reading: how the tokens of the gap are read: plain; held (no head decays); frozen (no head writes or erases).
        each_head: whether heads are tried one by one.
        say: called with a line as answers are known.
    Raises:
        InputError: no gaps, fewer than two rows, an unknown reading, an adopted model, one without recurrent layers, a
            control on it, a text too short.
    """
    lm: LanguageModel = as_language_model(model)
    _check(lm, gaps, n, reading)
    prompts = _prompts(lm.tokenizer, max(gaps), n, haystack, seed)
    ask, cache, position = _Asker(lm, prompts), lm.new_cache(), 0
    _read(lm, prompts.begun, cache)
    if len(_layers(cache)) != len(lm.mixers):
        raise InputError(f"{lm.name} has layers that keep states in a way of their own: no others can be put there")
    key = cache.snapshot()
    signals, answers = [_signals(0, key, key)], [{"gap": 0, "state": "read", **ALL, **ask(key)[0], "n": n}]
    for gap in sorted({-(-g // prompts.step) * prompts.step for g in gaps}):
        with ExitStack() as stack:
            if reading != "plain":
                stack.enter_context(tapping(lm.mixers, [_tap(reading)] * len(lm.mixers)))
            _read(lm, prompts.filler[position:gap].expand(n, -1), cache)
        position = gap
        signals.append(_signals(gap, key, cache))
        for row in _interventions(lm, key, cache.snapshot(), ask, each_head):
            answers.append({"gap": gap, **row, "n": n})
            if row["layer"] < 0:
                say(f"gap {gap}: {row['state']}: right {row['right']:.2f}, loss {row['loss']:.3f}")
    about = {
        "model": lm.name,
        "weights_hash": lm.weights_hash,
        "text": "passkey" if haystack is None else haystack.name,
        "reading": reading,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "seed": seed,
    }
    return KeyTrace(about, pd.concat(signals, ignore_index=True), pd.DataFrame(answers))


def _check(model: LanguageModel, gaps: Sequence[int], n: int, reading: str) -> None:
    if not taps_everywhere(model) or not model.mixers:
        raise InputError(f"keys are traced in the recurrent layers of this library's own models: {model.name} has none")
    if model.restart is not None or model.reader is not None:
        raise InputError("a key is traced token after token: take the control or way to read off")
    if n < 2 or not gaps or min(gaps) < 1:
        raise InputError(f"expected gaps of at least 1 token and at least 2 keys, got gaps={list(gaps)}, n={n}")
    if reading not in READINGS:
        raise InputError(f"unknown reading {reading!r}{nearest(reading, READINGS)}")


@dataclass(frozen=True)
class _Prompts:
    """Prompts that are alike in all but the key.

    Attributes:
        begun: (n, t) ids up to the end of the key's sentence.
        filler: (gap,) ids behind it.
        question, reply: (n, ·) ids.
        step: tokens that gaps are multiples of, lest a sentence of the filler be broken off.
    """

    begun: Tensor
    filler: Tensor
    question: Tensor
    reply: Tensor
    step: int


def _prompts(tokenizer: Tokenizer, gap: int, n: int, haystack: Text | None, seed: int) -> _Prompts:
    cycle = piece(tokenizer, FILLER, FILLER)
    step = 1 if haystack is not None else len(cycle)
    before, after = (-(-tokens // step) * step for tokens in (BEFORE, gap))
    if haystack is None:
        filler = np.resize(cycle, before + after)
    else:
        filler = tokens(haystack, tokenizer, seed, before + after)[0]
    rng = np.random.default_rng([seed, n])
    bare = [_without_filler(tokenizer, draw_key(rng)) for _ in range(TRIES)]
    alike = [p for p in bare if (len(p.ids), len(p.reply)) == (len(bare[0].ids), len(bare[0].reply))][:n]
    if len(alike) < n:
        raise InputError(f"{n} keys of as many tokens were not found: tokenizer {tokenizer.name}")
    begun = [np.concatenate([p.ids[: p.position], filler[:before], p.ids[p.position : p.question]]) for p in alike]
    question = [p.ids[p.question :] for p in alike]
    stacked = (torch.from_numpy(np.stack(rows)) for rows in (begun, question, [p.reply for p in alike]))
    begun_ids, question_ids, reply = stacked
    return _Prompts(begun_ids, torch.from_numpy(filler[before:].astype(np.int64)), question_ids, reply, step)


def _without_filler(tokenizer: Tokenizer, key: str) -> Prompt:
    try:
        fill(tokenizer, 1, PAPER, [Hidden(0.0, key)])
    except TooShort as error:
        return fill(tokenizer, error.least, PAPER, [Hidden(0.0, key)])
    raise AssertionError("a prompt fits into one token")


def _read(model: LanguageModel, ids: Tensor, cache: Any) -> None:
    for segment in ids.split(SEGMENT, 1):
        model(segment.to(model.device), cache)


def _tap(reading: str) -> Tap:
    """Return what changes the gates of a layer whose heads do not decay (held), or change nothing but decay
    (frozen)."""

    def tap(call: MixerReading) -> AnyGates:
        gates = call.gates.worked_out(torch.promote_types(call.inputs.x.dtype, torch.float32))
        if reading == "held":
            return replace(gates, log_decay=torch.zeros_like(gates.log_decay))
        still = torch.zeros_like(gates.input_scale)
        if isinstance(gates, DeltaGates):
            return replace(gates, input_scale=still, erase=still)
        return replace(gates, input_scale=still)

    return tap


def _layers(cache: Any) -> dict[int, Carry]:
    """Return the carries of the recurrent layers, by their places among all layers."""
    return {i: carry for i, carry in enumerate(cache.layers) if isinstance(carry, Carry)}


def _with_states(cache: Any, states: dict[int, Tensor]) -> Any:
    """Return the cache with other states in these layers."""
    changed = cache.snapshot()
    changed.layers = [
        replace(carry, scan=replace(carry.scan, state=states[i])) if i in states else carry
        for i, carry in enumerate(cache.layers)
    ]
    return changed


def _decay(key: Carry, later: Carry) -> Tensor:
    """Return what the decays have left, (B, H, 1, 1), or (B, H, 1, N) where every channel decays by itself."""
    left = (later.scan.log_decay - key.scan.log_decay).exp()
    return left[:, :, None, None] if left.ndim == 2 else left[:, :, None]


def _deviation(state: Tensor) -> Tensor:
    return state - state.mean(0)


def _size(state: Tensor) -> Tensor:
    """Return the root mean square over rows of the norms of states (B, H, P, N), (H) float64."""
    return state.double().square().sum((2, 3)).mean(0).sqrt()


def _signals(gap: int, key: Any, later: Any) -> pd.DataFrame:
    """Return the rows of `KeyTrace.signals` of one gap."""
    rows = []
    for number, (layer, carry) in enumerate(_layers(later).items()):
        before = _layers(key)[layer]
        signal, at_key = _size(_deviation(carry.scan.state)), _size(_deviation(before.scan.state))
        decay = _decay(before, carry).mean((0, 2, 3))
        norm = carry.scan.state.mean(0).double().square().sum((1, 2)).sqrt()
        columns = (signal, signal / at_key, decay, norm)
        for head, values in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            rows.append((gap, number, head, *values))
    return pd.DataFrame(rows, columns=["gap", "layer", "head", "signal", "kept", "decay", "norm"])


class _Asker:
    """Asks the question after a cache, of all rows, or of several copies of them."""

    def __init__(self, model: LanguageModel, prompts: _Prompts):
        self.model, self.n, self.replies = model, len(prompts.reply), prompts.reply.to(model.device)
        self.ids = torch.cat([prompts.question, prompts.reply[:, :-1]], 1).to(model.device)

    def __call__(self, cache: Any, copies: int = 1) -> list[dict[str, float]]:
        """Return `right` and `loss` of each copy; the cache stays as it is."""
        ids, replies = self.ids.repeat(copies, 1), self.replies.repeat(copies, 1)
        hidden = self.model(ids, cache.snapshot())[:, -replies.shape[1] :]
        losses = self.model.losses(hidden, replies).double().mean(1)
        right = (self.model.logits(hidden).argmax(-1) == replies).all(1).double()
        per_copy = zip(right.view(copies, -1).mean(1).tolist(), losses.view(copies, -1).mean(1).tolist(), strict=True)
        return [{"right": r, "loss": loss} for r, loss in per_copy]


def _interventions(model: LanguageModel, key: Any, later: Any, ask: _Asker, each_head: bool) -> Iterator[dict]:
    """Yield the rows of `KeyTrace.answers` of one gap; see `trace_key`."""
    at_key = {i: carry.scan.state for i, carry in _layers(key).items()}
    now = {i: carry.scan.state for i, carry in _layers(later).items()}
    tries = {"read": now, "restored": at_key}
    if not any(erases(mixer) for mixer in model.mixers):
        left = {i: _decay(_layers(key)[i], carry).to(carry.scan.state.dtype) for i, carry in _layers(later).items()}
        tries["undecayed"] = {i: now[i] + (1 - left[i]) * at_key[i] for i in now}
        tries["unwritten"] = {i: left[i] * at_key[i] for i in now}
    tries["amplified"] = {i: _amplified(now[i], at_key[i]) for i in now}
    for name, states in tries.items():
        yield {"state": name, **ALL, **ask(_with_states(later, states))[0]}
    if not each_head:
        return
    alone = []
    for number, i in enumerate(now):
        for name, base, other in (("restored", now, at_key), ("damaged", at_key, now)):
            for head, row in enumerate(_one_by_one(later, base, other, i, ask)):
                yield {"state": name, "layer": number, "head": head, **row}
                if name == "restored":
                    alone.append((row["loss"], i, head))
    alone.sort()
    for size in (size for size in SETS if size < len(alone)):
        mixed = {i: state.clone() for i, state in now.items()}
        for _, i, head in alone[:size]:
            mixed[i][:, head] = at_key[i][:, head]
        yield {"state": f"best {size}", **ALL, **ask(_with_states(later, mixed))[0]}


def _one_by_one(
    later: Any, base: dict[int, Tensor], other: dict[int, Tensor], layer: int, ask: _Asker
) -> list[dict[str, float]]:
    """Ask with the states of `base`, but for one head of a layer, which is of `other`: each head in turn, all at
    once."""
    heads = base[layer].shape[1]
    states = {i: state.repeat(heads, 1, 1, 1) for i, state in base.items()}
    copies = states[layer].unflatten(0, (heads, ask.n))
    for head in range(heads):
        copies[head, :, head] = other[layer][:, head]
    return ask(_with_states(later.rows(list(range(ask.n)) * heads), states), heads)


def _amplified(now: Tensor, at_key: Tensor) -> Tensor:
    """Return states whose differences between rows are, head by head, as large as they were at the key."""
    size, size_at_key = _size(_deviation(now)), _size(_deviation(at_key))
    factor = size_at_key / torch.maximum(size, size_at_key / MOST)
    return now.mean(0) + factor.to(now.dtype)[:, None, None] * _deviation(now)
