"""What the sheets of results say, in a line of plain words for each model.

A remedy is named the best at a length only where its loss there is surely below that without one, and where its recall,
wherever that was measured, is nowhere more than GUARD below the bare model's or a control's. What an interval is too
wide to carry, or one slice has none for, is called undecided, or not surely better.
"""

from __future__ import annotations

import math

import pandas as pd

from rnn_longctx.config import format_length
from rnn_longctx.eval.stats import paired_bootstrap
from rnn_longctx.eval.tables.sheets import DIAGNOSTICS, RECALL, SETTING, Sheet, sheets

GUARD = 0.1  # of recall: a remedy that loses more is not called the best, and no setting that does is chosen

PART = 0.1  # of the rise: a part of a hybrid that gives back surely more has failed, surely less has not


def conclusion(frame: pd.DataFrame) -> str:
    """What the numbers say, a line per model, in plain words. Nothing in it is not in the table."""
    lines: dict[tuple[object, ...], list[str]] = {}
    everything = sheets(frame)
    for sheet in everything:
        setting = tuple(sheet.where[c] for c in SETTING)
        recalls = [s for s in everything if s.kind == "accuracy" and tuple(s.where[c] for c in SETTING) == setting]
        clauses = _loss_clauses(sheet, recalls) if sheet.kind == "loss" else _recall_clauses(sheet)
        if clauses and sheet.note:
            clauses[0] = f"[{sheet.note}] {clauses[0]}"
        lines.setdefault(setting, []).extend(clauses)
    return "\n".join((f"{key[0]}: " if len(lines) > 1 else "") + "; ".join(c) + "." for key, c in lines.items() if c)


def _loss_clauses(sheet: Sheet, recalls: list[Sheet]) -> list[str]:
    clauses = []
    if "none" in sheet.cells:
        clauses.append(f"without a remedy: {sheet.verdict('none').text}")
        clauses += _hybrid_clauses(sheet)
    return clauses + _best_clauses(sheet, recalls)


def _best_clauses(sheet: Sheet, recalls: list[Sheet]) -> list[str]:
    """Return which remedy is the best at the longest length that one was measured at, by how much its loss is lower,
    its recall, and which remedy has a lower loss and why it is not the best."""
    if not sheet.remedies():
        return []
    length = max(max(sheet.cells[r]) for r in sheet.remedies())
    bare = sheet.cells.get("none", {}).get(length)
    losses = {r: sheet.cells[r][length].value for r in sheet.remedies() if length in sheet.cells[r]}
    losses = {r: v for r, v in losses.items() if math.isfinite(v) and not sheet.broken(r)}
    lower = [r for r, v in losses.items() if bare is None or not v >= bare.value]
    forgot = {r: reason for r in lower if (reason := _lost_recall(sheet, r, recalls))}
    remaining = [r for r in lower if r not in forgot]
    sure = [r for r in remaining if _surely_lower(sheet, r, length)]
    lowest, best = sheet.lowest(lower, length), sheet.lowest(sure or remaining, length)
    at = format_length(length)
    if lowest is None:
        return [f"no remedy has a loss {'below that without one' if losses else 'that is a number'} at {at}"]
    lowest_loss = f"{lowest} has the lowest loss, {losses[lowest]:.3f}"
    if best is None:
        return [f"no remedy is best at {at}: {lowest_loss}, but recalls less ({forgot[lowest]})"]
    is_lowest = losses[best] == losses[lowest]
    if sure:
        text = f"best remedy at {at} is {best}: its loss is {losses[best]:.3f}{', the lowest' if is_lowest else ''}"
    else:
        why = ", since the loss without one was not measured" if bare is None else ""
        loss = "the lowest loss," if is_lowest else "a loss of"
        text = f"no remedy is surely better than none at {at}{why}: {best} has {loss} {losses[best]:.3f}"
    text += _difference(sheet, best, length) + _against_recompute(sheet, best, length)
    text += "; its recall " + (_recall_beside(sheet, best, recalls) or "was not measured")
    if sheet.verdict(best).first_failing is not None:
        text += f"; it {sheet.verdict(best).text}"
    if not is_lowest:
        reason = f"recalls less ({forgot[lowest]})" if lowest in forgot else "is not surely better than none"
        text += f"; {lowest_loss}, but {reason}"
    return [text]


def _difference(sheet: Sheet, name: str, length: int) -> str:
    """Return by how much a remedy's loss is below that without one, and whether that is beyond its interval."""
    saved = sheet.gain("none", name, length) if "none" in sheet.cells else None
    if saved is None:
        return ""
    if not math.isfinite(saved.gain):
        return ", where the loss without a remedy is not a number"
    interval = f"95% {saved.low:.3f} to {saved.high:.3f}" if math.isfinite(saved.low) else "one slice has no interval"
    surely = "surely" if saved.low > 0 else "not surely"
    return f", {surely} lower than without a remedy (by {saved.gain:.3f}, {interval})"


def _against_recompute(sheet: Sheet, name: str, length: int) -> str:
    """Return a remedy's loss as a multiple of the control's that reads the last tokens again, and its context gain."""
    against = sheet.best_recompute(length)
    if against is None:
        return ", not compared with recomputing from the last tokens"
    if not math.isfinite(sheet.cells[against][length].value):
        return f", not compared with {against}, whose loss is not a number"
    text = f", {sheet.cells[name][length].value / sheet.cells[against][length].value:.2f}x the loss of {against}"
    gain = sheet.gain(against, name, length)
    if gain and math.isfinite(gain.low):
        finding = "uses older context" if gain.low > 0 else "shows no use of older context"
        text += f"; it {finding} (gain {gain.gain:+.3f}, 95% {gain.low:+.3f} to {gain.high:+.3f})"
    elif gain and math.isfinite(gain.gain):
        text += f"; whether it uses older context is undecided (gain {gain.gain:+.3f} on one slice)"
    return text


def _recall_beside(sheet: Sheet, name: str, recalls: list[Sheet]) -> str:
    """Return a remedy's recall in each task, at the longest length that it was measured at; "": nowhere."""
    texts = []
    for recall in recalls:
        if same := _named(sheet, name, recall):
            length = max(recall.cells[same])
            bare = recall.cells.get("none", {}).get(length)
            beside = "" if bare is None else f" ({bare.value:.2f} without a remedy)"
            texts.append(
                f"of {recall.task} at {format_length(length)} is {recall.cells[same][length].value:.2f}{beside}"
            )
    return ", ".join(texts)


def _surely_lower(sheet: Sheet, name: str, length: int) -> bool:
    """Whether a remedy's loss is surely below that without one; of one that blew up there is no interval, nor doubt."""
    saved = sheet.gain("none", name, length) if "none" in sheet.cells else None
    return saved is not None and (saved.low > 0 or not math.isfinite(saved.gain))


def _named(sheet: Sheet, name: str, other: Sheet) -> str | None:
    """What a remedy of one sheet is called on another, if it is there."""
    return next((n for n in other.cells if other.mitigations[n] == sheet.mitigations[name]), None)


def _lost_recall(sheet: Sheet, name: str, recalls: list[Sheet]) -> str | None:
    """Where a remedy's recall falls farthest below that of the bare model or a control, if by more than GUARD."""
    worst, words = GUARD + 1e-9, None
    for recall in recalls:
        values = recall.cells[same] if (same := _named(sheet, name, recall)) else {}
        for rival in (n for n in recall.cells if n == "none" or recall.is_control(n)):
            for length in sorted(values.keys() & recall.cells[rival].keys()):
                value, other = values[length].value, recall.cells[rival][length].value
                if other - value > worst:
                    worst, whose = other - value, "without a remedy" if rival == "none" else f"with {rival}"
                    words = f"{recall.task} at {format_length(length)} {value:.2f}, {other:.2f} {whose}"
    return words


def _hybrid_clauses(sheet: Sheet) -> list[str]:
    """Of a hybrid: how much of what the loss rises beyond the training length comes back where attention alone, and
    where the recurrence alone, is held to that length (`mitigations.diagnostics`). It points at a part of which
    surely more than PART of the rise comes back, and acquits one of which surely less does."""
    if not any(name.startswith(DIAGNOSTICS) for name in sheet.cells):
        return []
    bare, train = sheet.cells["none"], sheet.train_length or 0
    short = max((k for k in bare if k <= train), default=None)
    length = max((k for k in bare if k > train), default=None)
    if short is None or length is None:
        return ["which part of the hybrid fails was not measured (it takes a length within training's, and one beyond)"]
    rise, at = bare[length].value - bare[short].value, f"at {format_length(length)}"
    if not math.isfinite(rise):
        return ["which part of the hybrid fails cannot be said where its loss is not a number"]
    if round(rise, 3) <= 0:  # (a share of next to nothing says nothing)
        return [f"{at} the loss is not above that at {format_length(short)}: no part of the hybrid is seen to fail"]
    n = min(len(bare[length].samples), len(bare[short].samples))  # slice i begins at the same place
    surely = n > 0 and paired_bootstrap(bare[length].samples[:n], bare[short].samples[:n]).low > 0
    shares, suspects, open_, measured = [], [], [], 0
    for kind, component in zip(DIAGNOSTICS, ("attention", "the recurrence")):
        name = sheet.diagnostic(kind, length)
        gain = sheet.gain("none", name, length) if name else None
        if gain is None:
            shares.append(f"{component}'s share was not measured")
            continue
        if not math.isfinite(gain.gain):
            shares.append(f"with {name} the loss is not a number")
            continue
        measured += 1
        share, low, high = (value / rise for value in gain[:3])
        shares.append(
            f"{name} recovers {share:.0%}" + (f" (95% {low:.0%} to {high:.0%})" if math.isfinite(low) else "")
        )
        if surely and low > PART:
            suspects.append(component)
        elif not (surely and high <= PART):
            open_.append(component)
    text = f"{at} the hybrid's loss is {rise:.3f} above that at {format_length(short)}: {', '.join(shares)}"
    if measured == len(DIAGNOSTICS):
        if suspects or not open_:
            text += f", which points at {' and '.join(suspects) or 'neither alone'}"
        if open_:
            text += f"; {'which part' if len(open_) > 1 else f'whether {open_[0]}'} fails is undecided"
    return [text]


def _recall_clauses(sheet: Sheet) -> list[str]:
    reach = {n: sheet.recall_length(n) or 0 for n in sheet.cells}
    best = max(sheet.remedies(), key=lambda n: reach[n], default=None)

    def words(name: str) -> str:
        extent = f"up to {format_length(reach[name])}" if reach[name] else "nowhere"
        if reach[name] and reach[name] == max(sheet.cells[name]):
            extent = f"to at least {format_length(reach[name])} (the longest measured)"
        return f"{extent} {'without a remedy' if name == 'none' else f'with {name}'}"

    text = f"{sheet.task} accuracy above {RECALL} "
    if "none" not in sheet.cells:
        return [text + words(best)] if best else []
    if best is None:
        return [text + words("none")]
    further = reach[best] > reach["none"]
    return [text + words("none") + (f", {words(best)}" if further else ", and no remedy reaches further")]
