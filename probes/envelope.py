"""The range a model's states keep to within its training length: what "too large" is measured against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from rnn_longctx.errors import InputError

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models import Mamba2LM

EVERY = 16  # tokens between two looks at the state
SLICES = 32


@dataclass(frozen=True)
class Envelope:
    """The largest Frobenius norm each head's state reaches within `length` tokens, over some slices of a text.

    norms[layer][head], in the units of the state.
    """

    norms: tuple[tuple[float, ...], ...]
    length: int
    text: str
    text_hash: str
    slices: int

    @property
    def label(self) -> str:
        """What it was calibrated on, for a result's key."""
        return f"{self.text} {self.text_hash}, {self.slices} x {self.length}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Envelope:
        try:
            return cls(**{**data, "norms": tuple(tuple(map(float, layer)) for layer in data["norms"])})
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"the calibration kept with the checkpoint is not one ({error})") from None


@torch.inference_mode()
def measure_envelope(model: Mamba2LM, length: int, text: Text, slices: int = SLICES) -> Envelope:
    """Read `slices` slices of `length` tokens and keep each head's largest norm, looked at every 16 tokens.

    Raises InputError if the text is too short.
    """
    from rnn_longctx.data import tokens

    rows = [torch.from_numpy(tokens(text, model.tokenizer, i, length)[0]) for i in range(slices)]
    ids, cache = torch.stack(rows).to(model.device), model.new_cache()
    largest = None
    for t in range(0, length, EVERY):
        model(ids[:, t : t + EVERY], cache)
        norms = torch.stack([c.scan.state.flatten(-2).norm(dim=-1).amax(0) for c in cache.layers])  # (L, H)
        largest = norms if largest is None else torch.maximum(largest, norms)
    assert largest is not None
    values = tuple(tuple(layer) for layer in largest.double().clamp(min=1e-6).tolist())
    return Envelope(values, length, text.name, text.hash, slices)


def envelope_of(model: Mamba2LM, length: int, text: Text | None = None) -> Envelope:
    """The envelope kept with the checkpoint, if it is of that length and no text is named; else measured, on the
    builtin text where none is named."""
    from rnn_longctx.data import load_text

    if text is None and model.calibration:
        kept = Envelope.from_dict(model.calibration)
        if kept.length == length:
            return kept
    text = text or load_text("builtin")
    known = model.__dict__.setdefault("_envelopes", {})
    if (length, text.hash) not in known:
        known[length, text.hash] = measure_envelope(model, length, text)
    return known[length, text.hash]
