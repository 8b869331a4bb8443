"""What a run shows of its steps: a progress bar on a terminal, else a line a row of its log."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rnn_longctx.progress import Say, to_stdout


@contextmanager
def progress(steps: int, done: int, say: Say, answers: str) -> Iterator[Any]:
    """Give two functions, for a row of the log and for a step that has none. They move a progress bar where `say` is a
    terminal, else they say a line a row, and one for the first step, which shows that the run goes. answers: the tasks
    whose answers the second loss of a line is of."""
    if say is not to_stdout or not sys.stdout.isatty():

        def first(step: int, loss: float) -> None:
            if step == done + 1:
                say(f"step {step}/{steps} loss {loss:.3f}")

        yield lambda row: say(_line(row, steps, answers)), first
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"step {done}/{steps}", total=steps, completed=done)

        def show(row: dict[str, Any]) -> None:
            if row["skipped"]:  # to stay
                bar.console.print(_line(row, steps, answers))
            bar.update(task, completed=row["step"], description=_line(row, steps, answers, short=True))

        yield show, lambda step, loss: bar.update(task, completed=step, description=f"step {step}/{steps}")


def _line(row: dict[str, Any], steps: int, answers: str, short: bool = False) -> str:
    text = f"step {row['step']}/{steps} loss {row['loss']:.3f}"
    if not math.isnan(row["passkey_loss"]):
        text += f" {answers} loss {row['passkey_loss']:.3f}"
    text += f" {row['tokens_per_second'] / 1e3:.0f}K tok/s"
    if not short:  # what a bar leaves no room for
        text += f" lr {row['lr']:.2e} grad {row['grad_norm']:.3f} {row['seconds']:.0f} s"
        if not math.isnan(row["state_norm"]):  # a layer has a state
            text += f" state norm {row['state_norm']:.3g}, largest head's {row['state_norm_max']:.3g}"
    return text + (f" SKIPPED: {row['skipped']}" if row["skipped"] else "")
