"""The range that a model's states keep to within its training length: what "too large" is measured against."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.measure.calibration import Calibration
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import in_evaluation

if TYPE_CHECKING:
    from rnn_longctx.data import Text

EVERY = 16  # tokens between two looks at the state, at least
LOOKS = 2048  # of a longer stream so many, in calls of more tokens: a state changes slowly on its scale
SLICES = 32


@dataclass(frozen=True)
class Envelope:
    """The largest Frobenius norm each head's state reaches within `length` tokens, for each of some slices of a text.

    peaks[layer][slice][head], in the units of the state.
    """

    peaks: tuple[tuple[tuple[float, ...], ...], ...]
    length: int
    text: str
    text_hash: str

    @property
    def slices(self) -> int:
        return len(self.peaks[0])

    @property
    def calibration(self) -> Calibration:
        """What it was measured on, with a digest of the peaks."""
        digest = hashlib.sha256(repr(self.peaks).encode()).hexdigest()[:8]
        return Calibration(self.text, self.text_hash, self.slices, self.length, digest)

    @property
    def label(self) -> str:
        """What it was calibrated on, for a result's key."""
        return str(self.calibration)

    def norms(self, quantile: float = 1.0) -> tuple[tuple[float, ...], ...]:
        """Return [layer][head], the norm that this share of the slices stays below; 1 is the largest of all."""
        layers = [torch.tensor(layer, dtype=torch.float64, device="cpu") for layer in self.peaks]  # each (slices, H)
        return tuple(tuple(layer.quantile(quantile, dim=0).tolist()) for layer in layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Envelope:
        try:
            peaks = tuple(tuple(tuple(map(float, row)) for row in layer) for layer in data["peaks"])
            for layer in peaks:
                torch.tensor(layer, device="cpu")  # of one shape
            return cls(**{**data, "peaks": peaks})
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"the calibration kept with the checkpoint is not one ({error})") from None


@torch.inference_mode()
@in_evaluation
def measure_envelope(model: LanguageModel, ids: Tensor, text: str, text_hash: str) -> Envelope:
    """Read ids (slices, length) and keep each head's largest norms, looked at every 16 tokens (token by token would
    take many times as long), of more than 32K tokens 2,048 times, and at the end.

    Raises:
        InputError: a model without recurrent layers.
    """
    if not model.mixers:
        raise InputError(f"{model.name} has no recurrent layer, so there is no state to measure")
    length = ids.shape[1]
    ids, cache = ids.to(model.device), model.new_cache()
    looks: list[list[Tensor]] = []  # of every layer (slices, H)
    every = max(EVERY, math.ceil(length / LOOKS))
    for t in range(0, length, every):
        model(ids[:, t : t + every], cache)
        looks.append([state.flatten(-2).norm(dim=-1) for state in recurrent_states(cache)])
    peaks = [torch.stack(layer).amax(0).clamp(min=1e-6).tolist() for layer in zip(*looks)]
    rounded = tuple(tuple(tuple(float(f"{v:.6g}") for v in row) for row in layer) for layer in peaks)
    return Envelope(rounded, length, text, text_hash)


def recurrent_states(cache: Any) -> list[Tensor]:
    """Return the states (B, H, P, N) of the recurrent layers, in order; attention's carries have none."""
    return [layer.scan.state for layer in cache.layers if isinstance(layer, Carry)]


def envelope_of(model: LanguageModel, length: int, text: Text | None = None) -> Envelope:
    """Return the envelope kept with the checkpoint, if it is of that length and of the weights as they are, and no text
    is named; else measure it, on the builtin text where none is named.

    Raises:
        InputError: a text that is too short, a state that is not finite, a model without recurrent layers.
    """
    from rnn_longctx.data import load_text, tokens

    model = as_language_model(model)
    if text is None and (calibration := model.calibration):
        envelope = Envelope.from_dict(calibration)
        if envelope.length == length:
            return _finite(envelope, model.name)
    text = text or load_text("builtin")
    known = model.measured("envelope")
    if (key := (length, text.hash)) not in known:
        ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, length)[0]) for i in range(SLICES)])
        known[key] = _finite(measure_envelope(model, ids, text.name, text.hash), model.name)
    return known[key]


def _finite(envelope: Envelope, model: str) -> Envelope:
    """Return the envelope. Raises InputError where a state is not finite: no ratio could be told from it."""
    lost = [i for i, layer in enumerate(envelope.norms()) if not all(map(math.isfinite, layer))]
    if lost:
        raise InputError(
            f"the states of {model} are not finite within {envelope.length} tokens (first in layer {lost[0]}): nothing "
            "to calibrate on; try float32, or look at the weights"
        )
    return envelope
