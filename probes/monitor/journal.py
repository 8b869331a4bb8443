"""Write reports down as they come: a log of JSON lines, and a file of metrics for Prometheus. Neither holds text or
ids."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.files import write_atomic
from rnn_longctx.probes.monitor.judge import STATUSES, Report


class Journal:
    """The files of a watch.

    Args:
        log: the file to which every report is appended as a line of JSON, or None.
        metrics: the file that is rewritten with the last report, in Prometheus' exposition format, or None.
    Raises:
        InputError: a file that cannot be written.
    """

    def __init__(self, log: str | Path | None, metrics: str | Path | None):
        self._metrics, self._log = metrics, None
        if log is not None:
            try:
                self._log = home_path(log).open("a")
            except OSError as error:
                raise InputError(f"cannot write {log}: {error.strerror}") from None
        try:
            self.write([], None, 0)
        except InputError:
            self.close()
            raise

    def write(self, reports: Sequence[Report], last: Report | None, warnings: int) -> None:
        """Append new reports to the log, and show the last of all and the number of warnings so far as metrics."""
        if self._log is not None and reports:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._log.writelines(json.dumps(_line(report, now)) + "\n" for report in reports)
            self._log.flush()
        if self._metrics is not None:
            metrics = exposition(last or Report(0, "ok", (), 0, 0.0, None), warnings)
            # rewritten at every look, with nothing lost in a crash: it does not wait for the disk
            write_atomic(home_path(self._metrics), metrics.encode(), sync=False)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def exposition(report: Report, warnings: int) -> str:
    """Return a report as metrics in Prometheus' exposition format."""
    ratio = "Largest ratio of a state's norm to its envelope (of heads outside their margins, if any)."
    metrics = [
        ("status", "gauge", "0 ok, 1 warning, 2 drift, 3 collapsed.", STATUSES.index(report.status)),
        ("worst_ratio", "gauge", ratio, report.worst),
        ("position", "gauge", "Tokens read.", report.position),
        ("warnings_total", "counter", "Changes of status to another than ok.", warnings),
    ]
    lines = []
    for name, kind, text, value in metrics:
        shown = "+Inf" if math.isinf(value) else f"{value:.6g}" if isinstance(value, float) else str(value)
        full = f"rnn_longctx_monitor_{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {shown}"]
    return "\n".join(lines) + "\n"


def _line(report: Report, now: str) -> dict[str, object]:
    return {
        "time": now,
        "position": report.position,
        "status": report.status,
        "heads": [[layer, head, _number(ratio)] for layer, head, ratio in report.heads],
        "outside": report.outside,
        "worst": _number(report.worst),
        "shift": _number(report.shift),
        "action": report.action,
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)
