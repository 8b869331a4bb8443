"""What a pilot keeps beside its results, so that one that was killed goes on: the time that it has taken, the sizes
that it chose, the speeds that it measured, and which steps ended how."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rnn_longctx.files import write_atomic

FILE = "pilot_state.json"
SAVED = 2.0  # seconds between two savings while a step runs
# How a step ended: its cells are there; the remedy is not for this model; it cannot be measured, whatever the time;
# it was stopped, as it took longer than predicted.
MEASURED, NOT_APPLICABLE, FAILED, STOPPED = "measured", "not applicable", "failed", "stopped"


class Ledger:
    """The file of a pilot's folder. The time of a run is counted from `began`, that of runs before it is in the file.

    Attributes:
        before: seconds that runs before this one took, those that were killed among them.
        steps: by name, each a dictionary: outcome, seconds, predicted, and why where it is not measured.
        speeds: as `rnn_longctx.eval.pilot.speed.Speeds` keeps them; sizes: as `Sizes`, by the budget that they fit.
        finalists: the remedies that are measured again on more text, chosen under those sizes; None: not known yet.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], began: float):
        self.path, self.settings, self.began = folder / FILE, settings, began
        stored = self._read()
        self.before = float(stored.get("spent", 0.0))
        self.steps: dict[str, dict[str, Any]] = stored.get("steps", {})
        self.speeds: dict[str, Any] = stored.get("speeds", {})
        self.sizes: dict[str, Any] = stored.get("sizes", {})
        self.finalists: list[str] | None = stored.get("finalists")
        self._saved = began

    def _read(self) -> dict[str, Any]:
        """Return what is stored for the same model, text and settings; {} where that is another's, or torn."""
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) and stored.get("settings") == self.settings else {}

    @property
    def spent(self) -> float:
        """Seconds of all runs, this one included."""
        return self.before + time.monotonic() - self.began

    def save(self) -> None:
        """Write it down."""
        self._saved = time.monotonic()
        content = {
            "settings": self.settings,
            "spent": self.spent,
            "sizes": self.sizes,
            "finalists": self.finalists,
            "speeds": self.speeds,
            "steps": self.steps,
        }
        write_atomic(self.path, json.dumps(content, indent=1).encode())

    def leave_out(self) -> None:
        """Write it down without the time of this run, which measured nothing."""
        self.began = time.monotonic()
        self.save()

    def tick(self) -> None:
        """Write it down where that was some time ago: what a killed step took counts as well."""
        if time.monotonic() - self._saved > SAVED:
            self.save()

    def end(self, name: str, outcome: str, seconds: float, predicted: float, why: str = "") -> None:
        """Write down how a step ended."""
        self.steps[name] = {"outcome": outcome, "seconds": seconds, "predicted": predicted} | (
            {"why": why} if why else {}
        )
        self.save()
