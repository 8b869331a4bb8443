"""Online adaptation: small updates on a log as it arrives, each kept or undone, as `train --stream` does with text.

A log is read a piece at a time. A piece is first scored by the model as it is, so that no row is scored by a model that
saw what followed it; then the model is trained on it, a share of the windows being of the log that it was fitted to, so
that this is not forgotten; then the update is judged (`rnn_longctx.train.online.refusal`): it is kept while, on the
rows that set the threshold, the alarm's loss and the average precision hold, and while the last part of the piece,
which was not trained on, has not become harder by more than 0.02. Otherwise weights and moments go back to what
they were.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.progress import Say, silent
from rnn_longctx.sensors.fit import TOKENS, Updates, parts
from rnn_longctx.sensors.model import SensorModel
from rnn_longctx.sensors.score import average_precision, read_rows
from rnn_longctx.train.config import OnlineConfig
from rnn_longctx.train.online import refusal

COLUMNS = ["piece", "from", "to", "decision", "reason", "loss", "average_precision", "new_before", "new_after"]


RULES = OnlineConfig(tokens=4096, held_out=0.25, loss_tolerance=0.02, passkey_tolerance=0.05)


@dataclass(frozen=True)
class AdaptConfig:
    """How a log is followed.

    Attributes:
        rows: of a piece.
        context: rows before a piece that are read again before it is scored.
        window: rows of a window that is trained on.
        passes: how often a piece is read, about.
        rules: share held out of a piece and of the windows that are replayed, and what an update may cost. The
            tolerances are wider than a text's: a loss of alarms is of few events, and after a drift what held before it
            need not.
    """

    rows: int = 4096
    context: int = 4096
    window: int = 512
    passes: int = 20
    lr: float = 1e-3
    seed: int = 0
    rules: OnlineConfig = RULES


@dataclass(frozen=True, eq=False)
class Adapted:
    """What came of following a log: logits (T), each by the model that had read what lies before its piece alone, and a
    row a piece of COLUMNS."""

    logits: np.ndarray
    decisions: pd.DataFrame


def adapt(
    model: SensorModel,
    new: tuple[Tensor, np.ndarray],
    old: tuple[Tensor, np.ndarray],
    config: AdaptConfig = AdaptConfig(),
    say: Say = silent,
) -> Adapted:
    """Follow a log, and leave the model as the last update kept left it.

    Args:
        new: rows (T, S + 1) and labels (T) bool of the log to follow; a piece's labels are known once the piece is
            over, but for the last `warning` rows.
        old: those of the log that the model was fitted to.
    Raises: InputError: a log shorter than a piece, or pieces that hold no window.
    """
    (rows, labels), known = new, 1 - config.rules.held_out
    if len(rows) < config.rows or int(known * config.rows) <= config.window:
        raise InputError(
            f"a log of {len(rows)} rows is followed in pieces of {config.rows}, and {int(known * config.rows)} of them "
            f"trained on in windows of {config.window}: it needs more rows, or smaller windows"
        )
    fitted, setting, _ = parts(len(old[0]))
    setting = slice(max(setting.start, setting.stop - 4 * config.rows), setting.stop)
    updates = Updates(model, config.lr, config.seed, None)
    replayed = old[0][fitted], torch.from_numpy(old[1][fitted]).float()
    best = _measured(model, old[0][setting], old[1][setting])
    logits, table = [], []
    for number, start in enumerate(range(0, len(rows), config.rows)):
        stop = min(start + config.rows, len(rows))
        first = max(0, start - config.context)
        logits.append(read_rows(model, rows[first:stop]).logits[start - first :])
        if stop - start < config.rows:
            break
        cut, end = start + int(known * config.rows), stop - model.config.warning
        before = _loss(model, rows[first:end], labels[first:end], cut - first)
        state = copy.deepcopy(model.state_dict()), copy.deepcopy(updates.optimizer.state_dict())
        targets = torch.from_numpy(labels[start:cut]).float()
        count = max(1, TOKENS // config.window)
        again = max(1, round(config.rules.replay * count))
        for _ in range(math.ceil(config.passes * (cut - start) / (config.window * max(1, count - again)))):
            pair = (rows[start:cut], targets, max(1, count - again)), (*replayed, again)
            updates.step(list(pair), config.window)
        figures = _measured(model, old[0][setting], old[1][setting])
        after = _loss(model, rows[first:end], labels[first:end], cut - first)
        reason = refusal([figures], [best], before, after, config.rules, "events")
        if reason is None:
            best = (figures[0], min(figures[1], best[1]), max(figures[2], best[2]))
        else:
            model.load_state_dict(state[0])
            updates.optimizer.load_state_dict(state[1])
        row: dict[str, Any] = dict(zip(COLUMNS, (number + 1, start, stop, "kept" if reason is None else "refused")))
        row |= {"reason": reason or "", "loss": figures[1], "average_precision": figures[2]}
        table.append(row | {"new_before": before, "new_after": after})
        line = f"piece {number + 1} {row['decision']}: loss of its last rows {before:.4f} before, {after:.4f} after"
        say(line + (f"; {reason}" if reason else ""))
    return Adapted(np.concatenate(logits), pd.DataFrame(table, columns=COLUMNS))


def _measured(model: SensorModel, rows: Tensor, labels: np.ndarray) -> tuple[int, float, float]:
    """Return how many rows, the alarm's loss on them, and the average precision (0 where no event is among them)."""
    logits = read_rows(model, rows).logits
    return len(rows), _cross_entropy(logits, labels), average_precision(logits, labels) if labels.any() else 0.0


def _loss(model: SensorModel, rows: Tensor, labels: np.ndarray, first: int) -> float:
    """Return the alarm's loss on the rows from `first` on; those before are context."""
    return _cross_entropy(read_rows(model, rows).logits[first:], labels[first:])


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(labels).float()))
