"""The short reading that a pilot's estimate rests on: how fast the model reads, without and with remedies, and what
memory a row takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rnn_longctx.data import Text, tokens
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot.estimate import Predictor
from rnn_longctx.eval.pilot.speed import ROWS, reading_speed, token_seconds
from rnn_longctx.eval.pilot.steps import candidates, controls
from rnn_longctx.mitigations import mitigate

TRYING = 0.03  # share of the budget that may go into measuring the speed of each kind of reading


def measure_speeds(predictor: Predictor, text: Text, longest: int, budget: float, tick: Callable[[], None]) -> None:
    """Measure how fast the model reads without a remedy; with each control; and, where calibration takes little, with
    each of the first remedies. What was measured before is taken as it is.

    Args: longest: tokens of the text that may be read; budget: seconds, of the whole pilot; tick: called after each
        remedy.
    """
    measuring, speeds, train_length = predictor.measuring, predictor.speeds, predictor.train_length
    model, segment, started = measuring.model, measuring.segment, time.monotonic()
    n = min(max(2 * segment // ROWS, 3 * train_length), longest)
    rows = [torch.from_numpy(tokens(text, model.tokenizer, i, n + 1)[0]) for i in range(ROWS)]
    ids = torch.stack(rows)
    share = TRYING * budget
    seconds = min(1.0, share / 10)
    if "none" not in speeds.reading:
        speeds.reading["none"], speeds.row_bytes = reading_speed(model, ids, segment, seconds)
        speeds.token = token_seconds(model, ids[:, :64])
    dear = speeds.putting_on("a-floor", train_length) > max(1.0, share)
    for name in [*controls(train_length), *([] if dear else candidates(train_length))]:
        known, control = name in speeds.reading, name in controls(train_length)
        late = time.monotonic() - started > share  # then what is not measured is guessed
        if not control and (known or late):
            continue
        try:
            with mitigate(model, name, target_length=2 * train_length) as handle:
                least = 2 * train_length if model.restart else 0
                if not known:
                    warm = model.device.type == "cuda"
                    speeds.reading[name], carried = reading_speed(model, ids, segment, seconds, least, warm)
                    speeds.row_bytes = max(speeds.row_bytes, carried)
        except InputError:  # which is said when the remedy's turn comes
            continue
        speeds.ready.add(name)
        if handle.plan.restart:
            predictor.handles[name] = handle
        tick()
