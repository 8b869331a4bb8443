"""One look at a model while it reads: which heads leave their range, when, and what the loss does meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.data import Text, tokens
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.files import write_atomic
from rnn_longctx.measure.envelope import envelope_of, recurrent_states
from rnn_longctx.measure.stream import stream_losses
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.precision import computes_as
from rnn_longctx.plain import csv_text
from rnn_longctx.probes.ablation import Ablation, ablate
from rnn_longctx.probes.onset import MARGIN, accused, doubling, not_finite_is_beyond, onsets, verdict
from rnn_longctx.probes.remembrance import remembrance
from rnn_longctx.probes.retention import retention
from rnn_longctx.probes.trace import CHANNELS, record
from rnn_longctx.tasks.passkey import make_passkey

PROMPTS = ("text", "newline", "passkey")


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        about: model, weights_hash, prompt, text, text_hash, length, every, train_length, seed, dtype
            (`rnn_longctx.models.precision`), state_dtype (None: the scan's own).
        trace: of `Trace.table`.
        losses: position (the end of a stretch of `every` tokens) and loss, its mean over rows, nats per token.
        heads: of `rnn_longctx.probes.onset.onsets`, with at_train, horizon and class of `rnn_longctx.probes.retention`
            (where looks reach from within the training length to beyond it, and the head's decays are finite) and
            `channels`: the rows of a head's state that hold most at the end.
        envelope: [layer][head], the largest norms within the training length.
        ablation: of the accused heads, where it was asked for.
        remembrance: of `rnn_longctx.probes.remembrance`, where it was asked for.
    """

    about: dict[str, Any]
    trace: pd.DataFrame
    losses: pd.DataFrame
    heads: pd.DataFrame
    envelope: list[list[float]] = field(repr=False)
    ablation: Ablation | None = None
    remembrance: pd.DataFrame | None = None

    @property
    def verdict(self) -> str:
        sentence = verdict(self.heads, self.losses, self.about["train_length"])
        return f"{sentence}; {self.ablation}" if self.ablation else sentence

    def summary(self) -> dict[str, Any]:
        """Return one row to compare models by: training length, heads, how many are accused and the first of their
        onsets, the largest ratio, where the loss doubles (tokens), loss at the end; and what the ablation recovered."""
        left, tail = self.heads[self.heads["onset"].notna()], self.losses["loss"]
        row = {
            "train_length": self.about["train_length"],
            "length": self.about["length"],
            "heads": len(self.heads),
            "accused": len(left),
            "first_onset": left["onset"].min(),
            "worst_ratio": self.heads["worst"].max(),
            "loss_doubles": doubling(self.losses, self.about["train_length"]),
            "loss": float(tail.iloc[len(tail) // 2 :].mean()),
        }
        if self.ablation:
            a = self.ablation
            row |= {"fewest": len(a.fewest), "recovered": a.recovered, "others": max(a.others, default=float("nan"))}
        return row

    def save(self, directory: str | Path) -> list[Path]:
        """Write trace.parquet, heads.csv, losses.csv, probe.json, and remembrance.csv where it was measured; return the
        paths. Raises InputError: no such place."""
        out = home_path(directory)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.trace.to_parquet(out / "trace.parquet", index=False)
        except OSError as error:
            raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
        write_atomic(out / "heads.csv", csv_text(self.heads).encode())
        write_atomic(out / "losses.csv", csv_text(self.losses).encode())
        more: dict[str, Any] = {"verdict": self.verdict, "envelope": self.envelope}
        if self.ablation:
            more["ablation"] = vars(self.ablation)
        (out / "probe.json").write_text(json.dumps(self.about | more, indent=1) + "\n")
        names = ["trace.parquet", "heads.csv", "losses.csv", "probe.json"]
        if self.remembrance is not None:
            write_atomic(out / "remembrance.csv", csv_text(self.remembrance).encode())
            names.append("remembrance.csv")
        return [out / name for name in names]


def scalar_rows(probe: Probe) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield a position (tokens) and what is worth a line in a log there: loss, heads beyond their range, the largest
    ratio and, for each layer, the mean norm and retention."""
    limits = {(i, h): v for i, row in enumerate(probe.envelope) for h, v in enumerate(row)}
    losses = probe.losses.set_index("position")["loss"]
    beyond = probe.trace.assign(norm=not_finite_is_beyond(probe.trace["norm"]))
    for position, looks in beyond.groupby("position"):
        mean = looks.groupby(["layer", "head"])[["norm", "retention"]].mean()
        ratio = mean["norm"] / pd.Series(limits)
        row = {"heads_beyond": float((ratio > MARGIN).sum()), "largest_ratio": float(ratio.max())}
        if position in losses:
            row["loss"] = float(losses[position])
        for layer, some in mean.groupby("layer"):
            row |= {f"norm/layer{layer}": some["norm"].mean(), f"retention/layer{layer}": some["retention"].mean()}
        yield int(str(position)), row


@in_evaluation
def probe(
    model: Any,
    text: Text,
    length: int,
    *,
    prompt: str = "text",
    every: int = 256,
    slices: int = 1,
    seed: int = 0,
    calibration_text: Text | None = None,
    prove: bool = False,
    remember: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Probe:
    """Read `length` tokens and watch every head.

    Args:
        model: this library's, or one of another library, which is adopted.
        text: what is read, and what the ablation's loss is of.
        prompt: text; newline (nothing but newlines, as in Stuffed Mamba, arXiv 2410.07145); passkey (its filler).
        every: tokens between two looks.
        slices: rows read side by side.
        calibration_text: what envelopes are measured on where the checkpoint keeps none; None is the builtin text.
        prove: cap the accused heads alone, and others, and measure the loss again (`rnn_longctx.probes.ablation`).
        remember: measure effective remembrance too, which reads three times as many tokens.
        say: called with a line as things are known.
        progress: called with the tokens of each segment of the prompt that was read, of all rows together.
    Raises:
        InputError: a length below `every`, an unknown prompt, a text too short, no training length known, a model
            without recurrent layers, a remedy for prompts (decimate, chunk-select, lamb) on the model: nothing of it
            would be seen.
    """
    lm: LanguageModel = as_language_model(model)
    train_length = _check(lm, length, every, slices)
    ids = prompt_ids(lm, text, length, prompt, slices, seed)
    envelope = envelope_of(lm, train_length, calibration_text)
    norms = [list(row) for row in envelope.norms()]
    with record(lm, every=every) as trace, torch.inference_mode():
        losses, channels = _read(lm, ids, every, progress)
    table = trace.table()
    heads = _heads(table, norms, channels, train_length, reaches=every <= train_length <= length)
    say(verdict(heads, losses, train_length))
    ablation = None
    if prove:
        ids_of_text = ids if prompt == "text" else prompt_ids(lm, text, length, "text", slices, seed)
        ablation = ablate(lm, ids_of_text, accused(heads), norms, train_length, seed=seed, say=say)
    remembered = remembrance(lm, ids[:, :-1]) if remember else None
    about = {
        "model": lm.name,
        "weights_hash": lm.weights_hash,
        "prompt": prompt,
        "text": text.name,
        "text_hash": text.hash,
        "length": length,
        "every": every,
        "slices": slices,
        "seed": seed,
        "train_length": train_length,
        "envelope_of": envelope.label,
        "dtype": computes_as(lm),
        "state_dtype": None if lm.state_dtype is None else dtype_name(lm.state_dtype),
    }
    return Probe(about, table, losses, heads, norms, ablation, remembered)


def _check(model: LanguageModel, length: int, every: int, slices: int) -> int:
    """Return the training length of a model that can be probed. Raises InputError for another one."""
    if model.train_length is None:
        raise InputError(f"{model.name} does not say its training length: give --train-length")
    if model.reader is not None:
        raise InputError("a probe reads token after token, where a remedy for prompts changes nothing: take it off")
    if slices < 1:
        raise InputError(f"slices: expected at least 1 row, got {slices}")
    if length < every:
        raise InputError(f"{length} tokens are fewer than one look every {every} tokens needs")
    return model.train_length


def prompt_ids(model: LanguageModel, text: Text, length: int, prompt: str, slices: int, seed: int) -> Tensor:
    """Return ids (slices, length + 1) of a kind of prompt. Raises InputError for an unknown one."""
    tokenizer = model.tokenizer
    if prompt == "text":
        rows = [tokens(text, tokenizer, seed * slices + i, length + 1)[0] for i in range(slices)]
    elif prompt == "newline":
        newline = encode_after(tokenizer, "x", "\n")[0]  # several might be joined in one token
        if tokenizer.decode(newline) != "\n":
            raise InputError(f"tokenizer {tokenizer.name} cannot say a newline; choose another prompt")
        rows = [np.resize(newline, length + 1)] * slices
    elif prompt == "passkey":
        rows = [
            make_passkey(tokenizer, length + 1, (i + 0.5) / slices, np.random.default_rng([seed, i])).ids
            for i in range(slices)
        ]
    else:
        raise InputError(f"unknown prompt {prompt!r}{nearest(prompt, PROMPTS)}")
    return torch.from_numpy(np.stack(rows))


def _read(
    model: LanguageModel, ids: Tensor, every: int, progress: Callable[[int], None]
) -> tuple[pd.DataFrame, list[list[list[int]]]]:
    """Read ids; return the losses, and [layer][head] the rows of the last state that hold most (of all rows of ids
    together)."""
    cache = model.new_cache()
    means = []
    for _, losses in stream_losses(model, ids, cache=cache):
        means.append(losses.double().mean(0).cpu())
        progress(losses.numel())
    loss = torch.cat(means)
    ends = list(range(every, len(loss) + 1, every))
    curve = pd.DataFrame({"position": ends, "loss": [float(loss[e - every : e].mean()) for e in ends]})
    sizes = [state.square().sum((0, 3)) for state in recurrent_states(cache)]  # (H, P)
    return curve, [size.topk(min(CHANNELS, size.shape[1]), -1).indices.tolist() for size in sizes]


def _heads(
    table: pd.DataFrame, norms: list[list[float]], channels: list[list[list[int]]], train_length: int, reaches: bool
) -> pd.DataFrame:
    """Return a row a head, worst first; with what is left of the first token at the training length, where looks reach
    from within it to beyond it."""
    heads = onsets(table, norms)
    heads["channels"] = [tuple(channels[layer][head]) for layer, head in zip(heads["layer"], heads["head"])]
    if not reaches:
        return heads
    followed = table.groupby(["layer", "head"])["retention"].transform(lambda v: v.notna().all())
    if not followed.any():
        return heads
    far = retention(table[followed], train_length)[["layer", "head", "at_train", "horizon", "class"]]
    return heads.merge(far, on=["layer", "head"], how="left")
