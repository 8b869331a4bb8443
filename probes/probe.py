"""One look at a model while it reads: which heads leave their range, when, and what the loss does meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import home_path
from rnn_longctx.data import Text, tokens
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.precision import computes_as
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.probes.ablation import Ablation, ablate
from rnn_longctx.probes.onset import MARGIN, accused, doubling, not_finite_is_beyond, onsets, verdict
from rnn_longctx.probes.remembrance import remembrance
from rnn_longctx.probes.retention import retention
from rnn_longctx.probes.trace import CHANNELS, record
from rnn_longctx.tasks.passkey import make_passkey

if TYPE_CHECKING:
    from rnn_longctx.models.lm import Mamba2LM

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
        said = verdict(self.heads, self.losses, self.about["train_length"])
        return f"{said}; {self.ablation}" if self.ablation else said

    def summary(self) -> dict[str, Any]:
        """One row to compare models by: training length, heads, how many are accused and the first of their onsets, the
        largest ratio, where the loss doubles (tokens), loss at the end; and what the ablation recovered."""
        left, tail = self.heads[self.heads["onset"].notna()], self.losses["loss"]
        row = {
            "train_length": self.about["train_length"], "length": self.about["length"], "heads": len(self.heads),
            "accused": len(left), "first_onset": left["onset"].min(), "worst_ratio": self.heads["worst"].max(),
            "loss_doubles": doubling(self.losses, self.about["train_length"]),
            "loss": float(tail.iloc[len(tail) // 2 :].mean()),
        }  # fmt: skip
        if self.ablation:
            a = self.ablation
            row |= {"fewest": len(a.fewest), "recovered": a.recovered, "others": max(a.others, default=float("nan"))}
        return row

    def save(self, directory: str | Path) -> list[Path]:
        """trace.parquet, heads.csv, losses.csv, probe.json, and remembrance.csv where it was measured; returns the
        paths. Raises InputError: no such place."""
        out = home_path(directory)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.trace.to_parquet(out / "trace.parquet", index=False)
        except OSError as error:
            raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
        self.heads.to_csv(out / "heads.csv", index=False)
        self.losses.to_csv(out / "losses.csv", index=False)
        more: dict[str, Any] = {"verdict": self.verdict, "envelope": self.envelope}
        if self.ablation:
            more["ablation"] = vars(self.ablation)
        (out / "probe.json").write_text(json.dumps(self.about | more, indent=1) + "\n")
        names = ["trace.parquet", "heads.csv", "losses.csv", "probe.json"]
        if self.remembrance is not None:
            self.remembrance.to_csv(out / "remembrance.csv", index=False)
            names.append("remembrance.csv")
        return [out / name for name in names]


def scalar_rows(found: Probe) -> Iterator[tuple[int, dict[str, float]]]:
    """Position (tokens) and what is worth a line in a log there: loss, heads beyond their range, the largest ratio and,
    for each layer, the mean norm and retention."""
    limits = {(i, h): v for i, row in enumerate(found.envelope) for h, v in enumerate(row)}
    losses = found.losses.set_index("position")["loss"]
    beyond = found.trace.assign(norm=not_finite_is_beyond(found.trace["norm"]))
    for position, seen in beyond.groupby("position"):
        mean = seen.groupby(["layer", "head"])[["norm", "retention"]].mean()
        ratio = mean["norm"] / pd.Series(limits)
        row = {"heads_beyond": float((ratio > MARGIN).sum()), "largest_ratio": float(ratio.max())}
        if position in losses:
            row["loss"] = float(losses[position])
        for layer, some in mean.groupby("layer"):
            row |= {f"norm/layer{layer}": some["norm"].mean(), f"retention/layer{layer}": some["retention"].mean()}
        yield int(str(position)), row


@in_evaluation
def probe(model: Any, text: Text, length: int, *, prompt: str = "text", every: int = 256, slices: int = 1,
          seed: int = 0, calibration_text: Text | None = None, prove: bool = False, remember: bool = False,
          say: Callable[[str], None] = lambda line: None) -> Probe:  # fmt: skip
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
    Raises:
        InputError: a length below `every`, an unknown prompt, a text too short, no training length known, a remedy for
            prompts (decimate, chunk-select) on the model: nothing of it would be seen.
    """
    model = as_language_model(model)
    if model.train_length is None:
        raise InputError(f"{model.name} does not say its training length: give --train-length")
    if model.reader is not None:
        raise InputError("a probe reads token after token, where a remedy for prompts changes nothing: take it off")
    if slices < 1:
        raise InputError(f"slices: expected at least 1 row, got {slices}")
    if length < every:
        raise InputError(f"{length} tokens are fewer than one look every {every} tokens needs")
    ids = prompt_ids(model, text, length, prompt, slices, seed)
    envelope = envelope_of(model, model.train_length, calibration_text)
    norms = [list(row) for row in envelope.norms()]
    with record(model, every=every) as trace, torch.inference_mode():
        losses, channels = _read(model, ids, every)
    table = trace.table()
    heads = onsets(table, norms)
    heads["channels"] = [tuple(channels[layer][head]) for layer, head in zip(heads["layer"], heads["head"])]
    if every <= model.train_length <= length:
        followed = table.groupby(["layer", "head"])["retention"].transform(lambda v: v.notna().all())
        if followed.any():
            far = retention(table[followed], model.train_length)[["layer", "head", "at_train", "horizon", "class"]]
            heads = heads.merge(far, on=["layer", "head"], how="left")
    say(verdict(heads, losses, model.train_length))
    found = None
    if prove:
        asked = ids if prompt == "text" else prompt_ids(model, text, length, "text", slices, seed)
        found = ablate(model, asked, accused(heads), norms, model.train_length, seed=seed, say=say)
    kept = remembrance(model, ids[:, :-1]) if remember else None
    about = {
        "model": model.name, "weights_hash": model.weights_hash, "prompt": prompt, "text": text.name,
        "text_hash": text.hash, "length": length, "every": every, "slices": slices, "seed": seed,
        "train_length": model.train_length, "envelope_of": envelope.label,
        "dtype": computes_as(model), "state_dtype": model.state_dtype and str(model.state_dtype)[6:],
    }  # fmt: skip
    return Probe(about, table, losses, heads, norms, found, kept)


def prompt_ids(model: Mamba2LM, text: Text, length: int, prompt: str, slices: int, seed: int) -> Tensor:
    """ids (slices, length + 1) of a kind of prompt."""
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


def _read(model: Mamba2LM, ids: Tensor, every: int) -> tuple[pd.DataFrame, list[list[list[int]]]]:
    """The losses, and [layer][head] the rows of the last state that hold most (of all rows of ids together)."""
    cache, parts, t = model.new_cache(), [], 0
    segment = max(1, SEGMENTS[model.device.type] // len(ids))
    for hidden in model.stream(ids[:, :-1], cache, segment):
        goal = ids[:, 1 + t : 1 + t + hidden.shape[1]].to(hidden.device)
        parts.append(model.losses(hidden, goal).double().mean(0).cpu())
        t += hidden.shape[1]
    loss = torch.cat(parts)
    ends = list(range(every, len(loss) + 1, every))
    curve = pd.DataFrame({"position": ends, "loss": [float(loss[e - every : e].mean()) for e in ends]})
    states = [carry.scan.state.square().sum((0, 3)) for carry in cache.layers]  # (H, P)
    return curve, [s.topk(min(CHANNELS, s.shape[1]), -1).indices.tolist() for s in states]
