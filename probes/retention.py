"""Which heads see how far: what is left of the first token, from a table of `rnn_longctx.record`.

    retention(T)    exp(sum of log-decay over the first T tokens), the mean of the log-decays over rows and streams
    horizon         tokens until 1/e is left, at the mean log-decay a token
    class           `global` where retention(training length) > theta, else `local`

LongMamba (arXiv 2504.16053) tells heads (channels, in Mamba-1) apart in this way, with theta 0.05: global ones see
past the training length and are those that it filters. Under a remedy that changes the gates these are the decays
under it. Caps, windows and resets drop more than decays say, and a rule that erases changes more: there this is what
the decays alone would leave (docs/results/remedies-on-new-gates.md says where that is a bound).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError

THETA = 0.05  # LongMamba's
COLUMNS = ("stream", "row", "layer", "head", "position", "retention", "decay")


def retention(table: pd.DataFrame, train_length: int | str, theta: float = THETA) -> pd.DataFrame:
    """Return, for each layer and head, what is left of a stream's first token.

    Where `record` looked before and after the training length, but not at it, the log-decay is taken to grow evenly
    between the two looks. `record(model, every=...)` with a divisor of the training length is exact.

    Args:
        table: of `rnn_longctx.record(...).table()`.
        train_length: tokens (2048, "2k").
        theta: what must be left at the training length for a head to be global, in (0, 1).
    Returns:
        Sorted by layer and head, columns
            layer, head
            at_train, at_end    share that is left of the first token at the training length and at the last look,
                                0 to 1 (geometric mean over rows and streams)
            end                 the last look, in tokens (mean over rows and streams)
            horizon             tokens; infinity where nothing is forgotten
            class               "global" or "local"
    Raises:
        InputError: another table or an empty one, a stream that was not looked at up to the training length (it ends
            before, or the first look is after), retentions that are not numbers, arguments out of range.
    """
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"expected a table of record, as in trace.table(), got {type(table).__name__} {table!r:.40}")
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise InputError(f"expected a table of record, which has the column {missing[0]!r}")
    train_length = parse_length(train_length, "train_length")
    if not 0 < theta < 1:
        raise InputError(f"theta must lie in (0, 1), got {theta:g}")
    if table.empty:
        raise InputError("the table is empty: record with an `every` below the tokens read")
    if table["retention"].isna().any():
        raise InputError("the table's retention is not a number everywhere: the log-decay was not followed")
    for stream, seen in table.groupby("stream")["position"]:
        if seen.max() < train_length:
            raise InputError(
                f"stream {stream} was looked at up to {seen.max()} tokens, the training length is {train_length}: "
                "read further, or leave the stream out"
            )
        if seen.min() > train_length:
            raise InputError(
                f"stream {stream} was first looked at after {seen.min()} tokens, past the training length of "
                f"{train_length}: record it from its start with a smaller `every`"
            )
    table = table.sort_values("position", kind="stable")
    with np.errstate(divide="ignore"):  # a retention too small to be written down is 0, its log -inf
        logs = table.assign(left=np.log(table["retention"].to_numpy(dtype=float)))
    streams = pd.DataFrame(
        [
            (layer, head, _at(one, train_length), one["left"].iloc[-1], float(one["position"].iloc[-1]))
            for (layer, head, _, _), one in logs.groupby(["layer", "head", "stream", "row"])
        ],
        columns=["layer", "head", "at_train", "at_end", "end"],
    )
    heads = streams.groupby(["layer", "head"]).mean()
    heads[["at_train", "at_end"]] = np.exp(heads[["at_train", "at_end"]])
    # looks lie evenly, so the mean over looks is the mean over tokens; of a stream that had begun the first is unknown
    decay = table.groupby(["layer", "head"])["decay"].mean()
    heads["horizon"] = np.where(decay < 0, -1 / decay.where(decay < 0, -1.0), np.inf)
    heads["class"] = np.where(heads["at_train"] > theta, "global", "local")
    return heads.reset_index()


def _at(stream: pd.DataFrame, length: int) -> float:
    """Return the log of what is left after `length` tokens, of one head of one stream."""
    position, left = stream["position"].to_numpy(), stream["left"].to_numpy()
    after = int(np.searchsorted(position, length))
    if position[after] == length:  # not through the line below: -inf beside a finite number is no number
        return float(left[after])
    share = (length - position[after - 1]) / (position[after] - position[after - 1])
    return float((1 - share) * left[after - 1] + share * left[after])
