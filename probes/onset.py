"""Which heads leave the range that training showed them, when, and what it says in words.

A head *leaves its range* at the first look from which the norm of its state stays above MARGIN times its envelope, the
largest norm it reached within the training length (`rnn_longctx.measure.envelope`). Heads are ranked by how far beyond
it they stand at the end. A state that is not finite has left its range at its first such look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rnn_longctx.errors import InputError

# A head that keeps a share r of what it read a training length ago grows on to 1 / (1 - r) times its norm there and
# stops (fed with one constant; with noise to less). Three times is a head that keeps two thirds, or does not stop.
MARGIN = 3.0
NAMED = 6  # heads that a verdict names


def onsets(table: pd.DataFrame, norms: Sequence[Sequence[float]], margin: float = MARGIN) -> pd.DataFrame:
    """Return a row a head, worst first.

    Args:
        table: of `Trace.table`; of several streams and rows, a head's norm at a position is their mean.
        norms: [layer][head], the envelope, in the units of the state.
    Returns:
        Columns layer, head, onset (tokens, NaN where it stays in range), ratio (norm over envelope at the last look),
        worst (the largest ratio), retained (of the first token, at the last look).
    Raises:
        InputError: an empty table.
    """
    if table.empty:
        raise InputError("nothing was recorded: the text is shorter than the tokens between two looks")
    table = table.assign(norm=not_finite_is_beyond(table["norm"]))
    mean = table.groupby(["layer", "head", "position"], as_index=False).agg(
        norm=("norm", "mean"), retention=("retention", "mean")
    )
    rows = []
    for _, one in mean.groupby(["layer", "head"]):
        layer, head = int(one["layer"].iloc[0]), int(one["head"].iloc[0])
        ratio = one["norm"].to_numpy() / norms[layer][head]
        inside = np.flatnonzero(ratio <= margin)
        first = 0 if not len(inside) else int(inside[-1]) + 1  # beyond from here to the end
        rows.append(
            {
                "layer": layer,
                "head": head,
                "onset": float(one["position"].iloc[first]) if first < len(one) else np.nan,
                "ratio": ratio[-1],
                "worst": ratio.max(),
                "retained": float(one["retention"].iloc[-1]),
            }
        )
    heads = pd.DataFrame(rows)
    # NaN last: heads that left come before those that only stand high
    heads["left"] = heads["onset"].notna()
    return heads.sort_values(["left", "ratio"], ascending=False, ignore_index=True).drop(columns="left")


def not_finite_is_beyond(norms: pd.Series) -> pd.Series:
    """Return norms, infinite where they are not finite: beyond any range."""
    return norms.where(np.isfinite(norms), np.inf)


def accused(heads: pd.DataFrame) -> list[tuple[int, int]]:
    """Return (layer, head) of those that left their range, worst first."""
    left = heads[heads["onset"].notna()]
    return list(zip(left["layer"].tolist(), left["head"].tolist()))


def doubling(losses: pd.DataFrame, train_length: int) -> float | None:
    """Return the position (tokens) from which the loss stays above twice its mean within the training length, or None.

    losses: columns position (end of a stretch, ascending) and loss (its mean, nats per token). None, too, where one
    within the training length is no number: twice of it is none."""
    early = losses[losses["position"] <= train_length]
    base = float((early if len(early) else losses.head(1))["loss"].to_numpy().mean())
    if not np.isfinite(base):
        return None
    low = np.flatnonzero(losses["loss"].to_numpy() <= 2 * base)
    first = 0 if not len(low) else int(low[-1]) + 1
    return float(losses["position"].iloc[first]) if first < len(losses) else None


def verdict(heads: pd.DataFrame, losses: pd.DataFrame | None = None, train_length: int | None = None) -> str:
    """Say in one sentence what `onsets` and a loss curve (see `doubling`) show."""
    left = heads[heads["onset"].notna()]
    clauses = []
    if left.empty:
        clauses.append(f"no head of {len(heads)} leaves its range (the furthest stands at {heads['worst'].max():.1f}x)")
    else:
        shown = left.head(NAMED)
        names = [
            f"layer {layer} {'heads' if len(some) > 1 else 'head'} {', '.join(str(h) for h in sorted(some['head']))}"
            for layer, some in shown.groupby("layer")
        ]
        who = _and(names) + (f" (the worst {NAMED} of {len(left)})" if len(left) > NAMED else "")
        verb = "leaves its range" if len(left) == 1 else "leave their range"
        first, last = shown["onset"].min(), shown["onset"].max()
        when = f"at {_tokens(first)} tokens" if first == last else f"at {_tokens(first)} to {_tokens(last)} tokens"
        clauses.append(f"{who} {verb} {when}")
        share = shown["retained"].max()  # at the last look, not where they leave
        clauses.append(f"first token retained {'up to ' if len(shown) > 1 else ''}{share:.2f} at the end")
    if losses is not None and len(losses) and train_length is not None:
        at = doubling(losses, train_length)
        clause = "the loss does not double" if at is None else f"loss doubles at {_tokens(at)}"
        bad = losses["position"][~np.isfinite(losses["loss"])]
        if len(bad):
            within = at is None and bad.iloc[0] <= max(train_length, losses["position"].iloc[0])
            clause = f"{'' if at is None else f'{clause}; '}the loss is not a number from {_tokens(bad.iloc[0])} on"
            clause += ", within the training length, so whether it doubles cannot be said" if within else ""
        clauses.append(clause)
    return "; ".join(clauses)


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _tokens(count: float) -> str:
    """1434 -> 1.4K"""
    for size, unit in ((1024**2, "M"), (1024, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
