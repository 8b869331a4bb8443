"""A model of sensor rows: layers of this library's mixers over rows of numbers in the place of tokens.

A row is the values of all sensors at one time, those that are missing as NaN, and the time since the row before. It is
embedded as a sum: of each sensor the bin that its value lies in (or "missing"), and its value, standardised, through a
linear map. Bins are a sensor's quantiles; a sensor of few values, such as a lot's number, has one for each. The first
layer is a sliding window, a row with its neighbours; behind it stand the mixers that are asked for.

What a row says: of each sensor the value some rows later, as a change from the last one seen (so that a fresh model is
the persistence forecast), and the logit that an event follows within `warning` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.attention import Attention
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM

LOCAL = "sliding-window:window=8,heads=2"  # what the first layer is
# What a bare name stands for: one head, so that all of a lot's number is compared at once, and places by content alone,
# so that a lag longer than those fitted to is nothing new.
USUAL = {
    "two-stage": "heads=1,block=16,window=16,top=8,positions=none",
    "block-sparse": "heads=1,block=16,window=16,top=8,gate=0,positions=none",
    "full-attention": "heads=1,positions=none",
    "sliding-window": "heads=1,window=16",
}
CLIP = 8.0  # standard deviations: what a value is cut to before it goes through the linear map
BINS = 32
LOUD = 2.0  # factor on fresh vectors of bins
QUIET = 0.5  # factor on a fresh linear map of values
CARRIED = 2.0  # factor on what a fresh layer makes of what it reads
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class SensorConfig:
    """The shape of a model.

    Attributes:
        sensors: their names.
        mixer: of the layers behind the first, in turn.
        horizons: rows ahead that are forecast.
        warning: rows before an event within which the model is to say that it comes.
    """

    sensors: list[str]
    mixer: list[str]
    horizons: list[int] = field(default_factory=lambda: [1, 8, 64])
    warning: int = 12
    d_model: int = 64
    n_layer: int = 2

    def shape(self) -> ModelConfig:
        """Return the shape of its layers. Raises InputError: an unknown mixer, or one that does not fit."""
        if self.n_layer < 2 or not self.mixer:
            raise InputError(f"a model of sensors has a local layer and at least one more, got {self.n_layer} layers")
        layers = [LOCAL, *(self.mixer[i % len(self.mixer)] for i in range(self.n_layer - 1))]
        return ModelConfig(layers, self.d_model, self.n_layer, vocab_size=1, mlp=2)


def for_sensors(mixer: str) -> str:
    """Return a mixer's text, for a bare name with the settings that suit rows of sensors."""
    return f"{mixer}:{USUAL[mixer]}" if mixer in USUAL else mixer


@dataclass(frozen=True)
class Scales:
    """What a sensor's values are measured by, from the rows that a model is fitted to.

    Attributes:
        centre, spread: (S) float64, the median and a robust standard deviation of each.
        edges: (S, BINS - 1), between the bins of each; inf where it has fewer.
        quantiles: (S, 5), at QUANTILES.
        few: (S) bool, whether a sensor has at most BINS values, as a lot's number has.
    """

    centre: np.ndarray
    spread: np.ndarray
    edges: np.ndarray
    quantiles: np.ndarray
    few: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Scales:
        """values: (T, S), NaN where one is missing; each sensor has at least two different ones."""
        centre, spread, edges, few = [], [], [], []
        for column in values.T:
            seen = column[np.isfinite(column)]
            low, middle, high = np.quantile(seen, [0.25, 0.5, 0.75])
            wide = (high - low) / 1.349
            centre.append(middle)
            spread.append(wide if wide > 0 else seen.std())
            distinct = np.unique(seen)
            few.append(len(distinct) <= BINS)
            if few[-1]:
                cuts = (distinct[1:] + distinct[:-1]) / 2
            else:
                cuts = np.unique(np.quantile(seen, np.arange(1, BINS) / BINS))
            edges.append(np.pad(cuts, (0, BINS - 1 - len(cuts)), constant_values=np.inf))
        quantiles = [np.nanquantile(column, QUANTILES) for column in values.T]
        return cls(np.array(centre), np.array(spread), np.array(edges), np.array(quantiles), np.array(few))

    def standard(self, values: np.ndarray) -> np.ndarray:
        """Return (T, S) float32 of values (T, S): in standard deviations from the median; NaN stays."""
        return ((values - self.centre) / self.spread).astype(np.float32)


class RowEmbedding(nn.Module):
    """Rows (B, T, S + 1) of standardised values and elapsed time, in rows, to vectors (B, T, d_model)."""

    edges: Tensor

    def __init__(self, scales: Scales, d_model: int):
        super().__init__()
        sensors = len(scales.centre)
        standard = (scales.edges - scales.centre[:, None]) / scales.spread[:, None]
        self.register_buffer("edges", torch.from_numpy(standard.astype(np.float32)))
        bins = torch.randn(sensors, BINS + 1, d_model)  # the last one: missing
        self.weight = nn.Parameter(bins * LOUD / sensors**0.5)
        self.linear = nn.Linear(sensors + 1, d_model)
        with torch.no_grad():
            self.linear.weight *= QUIET
            if scales.few.any():  # a row is to be like another of the same lot, not like its neighbours
                self.weight[torch.from_numpy(~scales.few)] = 0

    def forward(self, rows: Tensor) -> Tensor:
        values, elapsed = rows[..., :-1], rows[..., -1:]
        missing = values.isnan()
        bins = torch.searchsorted(self.edges, values.nan_to_num().movedim(-1, 0).flatten(1).contiguous())  # (S, B * T)
        bins = bins.unflatten(1, rows.shape[:2]).movedim(0, -1).masked_fill(missing, BINS)
        vectors = sum(self.weight[i][bins[..., i]] for i in range(bins.shape[-1]))
        numbers = torch.cat([values.nan_to_num().clamp(-CLIP, CLIP), elapsed.log1p()], -1)
        return vectors + self.linear(numbers)


class SensorModel(nn.Module):
    """Forecasts and alarms from rows.

    Attributes:
        lm: the layers, which read rows (B, T, S + 1) where a language model reads ids (B, T).
    """

    def __init__(self, config: SensorConfig, scales: Scales):
        super().__init__()
        self.config, self.scales = config, scales
        self.lm = LM(config.shape())
        rows: Any = RowEmbedding(scales, config.d_model)
        self.lm.backbone.embedding = rows
        del self.lm.lm_head  # there are no ids to say
        self.forecast = nn.Linear(config.d_model, len(config.horizons) * len(config.sensors))
        self.alarm = nn.Linear(config.d_model, 1)
        for block in self.lm.layers[1:]:
            if isinstance(block.mixer, Attention):
                alike(block.mixer, rows.linear.weight)
        for layer in (self.forecast, self.alarm):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
        """Read rows (B, T, S + 1) after a cache, which is moved on; return changes (B, T, horizons, S), standardised,
        and logits (B, T)."""
        hidden = self.lm(rows, cache)
        changes = self.forecast(hidden).unflatten(-1, (len(self.config.horizons), len(self.config.sensors)))
        return changes, self.alarm(hidden)[..., 0]


@torch.no_grad()
def alike(mixer: Attention, linear: Tensor) -> None:
    """Let a fresh layer's keys be its queries, so that a row begins by reading rows like itself: that two rows name the
    same lot is seen from the start, and which likeness matters is what is learned. Likeness is of bins: what the linear
    map (d_model, S + 1) adds, which is large where a value is far out, is not compared. Maps are orthogonal, so that
    likenesses are not blurred, and what is read is loud enough for the alarm to see it from the first update on."""
    queries, keys, values = mixer.in_proj.weight.chunk(3)
    basis = torch.linalg.qr(linear).Q
    nn.init.orthogonal_(queries)
    queries -= queries @ basis @ basis.T
    keys.copy_(queries)
    nn.init.orthogonal_(values)
    nn.init.orthogonal_(mixer.out_proj.weight, CARRIED)
