"""Rows that start from a stored state, not from zero: what reading a text of one's choice left behind.

Reads a file of `rnn-longctx generate --save-state` (or `Cache.save`), its first row's scan states. The convolution
starts empty, as it always does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rnn_longctx.config import counted, home_path
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.legacy import is_of
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy, nested
from rnn_longctx.recurrence.ssd.window import window_state

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@REMEDIES.register
@dataclass(frozen=True)
class StoredStart(Remedy):
    """Start every row from the state that a file holds.

    Attributes:
        file: the state that `generate --save-state` kept, of the same weights.
    """

    name = "stored-start"
    needs = frozenset({Need.RECURRENCE})
    starts = True
    file: str  # or FILE@hash, as results name it

    def __post_init__(self) -> None:
        file, _, expected = self.file.partition("@")
        object.__setattr__(self, "file", file)
        if expected and expected != self.hash:
            raise InputError(f"stored-start: {file} has changed: it is {self.hash}, not {expected}")

    @property
    def hash(self) -> str:
        """Of the file's bytes; empty while there is none."""
        path = home_path(self.file)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.is_file() else ""

    def __str__(self) -> str:
        return f"stored-start:file={self.file}" + (f"@{self.hash}" if self.hash else "")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        cache, _, note = Cache.load_with(self.file)
        states = [window_state(layer.scan)[0] for layer in cache.layers]
        shapes = [(m.heads, m.headdim, m.d_state) for m in model.mixers]
        if [tuple(s.shape) for s in states] != shapes:
            held = f"{counted(len(states), 'layer')} of {tuple(states[0].shape)}" if states else "no layers"
            raise InputError(
                f"stored-start: {self.file} holds {held}, the model has {len(shapes)} of (H, P, N) = {shapes[0]}"
            )
        read_by = note.get("weights") if isinstance(note, dict) else None  # (`Cache.save` alone does not say)
        now = model.weights_hash
        if read_by is not None and not is_of(read_by, model, now):
            raise InputError(
                f"stored-start: {self.file} was read by {note['model']} {read_by}, not by {model.name} {now}"
            )
        return Plan(tuple(ScanPolicy(start=nested(state)) for state in states), weights=now)
