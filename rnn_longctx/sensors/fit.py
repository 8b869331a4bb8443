"""Fit a model of sensors to a log and its events, and keep it in a folder.

A log is cut in time: the first part is fitted to, a slice behind it sets the alarm's threshold, and the rest is held
    out.
A run's windows grow (`schedule`): what follows what is learned first where little stands between, then over more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rnn_longctx.config import from_dict, home_path, parse_length, to_dict
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import replacing, write_atomic
from rnn_longctx.models.attention import Attention
from rnn_longctx.progress import Say, silent
from rnn_longctx.sensors.model import BINS, Scales, SensorConfig, SensorModel
from rnn_longctx.sensors.read import Log

FITTED, SET = 0.6, 0.7  # of a log's rows: fitted to up to the first, the threshold set on those up to the second
CONTEXT = 2**14  # rows of the log that was fitted to that are read again before those that are scored
TOKENS = 2048  # rows of an update, unless a window is longer
HIDE = 0.1  # of the values, at most, are hidden from an update's windows, so that missing ones are known; at first none
STILL = 200  # first updates, a quarter of all at most, in which which rows are alike is not learned
WARMUP, DECAY = 50, 0.3  # updates; share of the updates in which the rate falls to a fiftieth
ALARMS, FORECASTS = 10.0, 0.1  # weights of the two losses


@dataclass(frozen=True)
class FitConfig:
    """How a model is fitted.

    Attributes:
        schedule: rows of a window and how many updates, in turn, as "128:300,512:600". Of the usual one, stages whose
            windows are longer than what is fitted to are left out.
        device: where it is fitted, and where the model stays.
    """

    schedule: str = "128:350,512:200,2048:150,8192:60"
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _ = self.stages  # (what is no schedule shows before a log is read)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Raises InputError for what is no schedule."""
        try:
            pairs = [part.split(":") for part in self.schedule.split(",")]
            return [(parse_length(rows), parse_length(updates)) for rows, updates in pairs]
        except (ValueError, InputError):
            expected = "windows and updates such as 128:300,512:600"
            raise InputError(f"schedule: expected {expected}, got {self.schedule!r}") from None


@dataclass
class Run:
    """A fitted model, and what it was fitted to.

    Attributes:
        threshold: of the alarm's logit.
        source: the log and events by path, columns and the hash of what the files hold.
    """

    model: SensorModel
    threshold: float = math.inf
    source: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write model.safetensors and sensors.json into a new folder."""
        scales = self.model.scales
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as aside:
            save_file({name: x.contiguous() for name, x in self.model.state_dict().items()}, aside)
        about = {
            "config": to_dict(self.model.config),
            "centre": scales.centre.tolist(),
            "spread": scales.spread.tolist(),
            "edges": [[x for x in row if math.isfinite(x)] for row in scales.edges.tolist()],
            "quantiles": scales.quantiles.tolist(),
            "few": scales.few.tolist(),
            "threshold": self.threshold,
            "source": self.source,
        }
        write_atomic(folder / "sensors.json", json.dumps(about, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Raises InputError for a folder that holds none."""
        folder = home_path(folder)
        try:
            about = json.loads((folder / "sensors.json").read_text())
            edges = np.array([row + [math.inf] * (BINS - 1 - len(row)) for row in about["edges"]])
            centre, spread, quantiles = (np.array(about[name]) for name in ("centre", "spread", "quantiles"))
            few = np.array(about.get("few", [False] * len(centre)))  # (a fresh model alone asks)
            scales = Scales(centre, spread, edges, quantiles, few)
            model = SensorModel(from_dict(SensorConfig, about["config"], str(folder)), scales)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(
                f"{folder} holds no fitted sensors; `rnn-longctx sensors fit` makes such a folder"
            ) from None
        except Exception as error:  # of many kinds, where a file is damaged
            raise InputError(f"{folder}: cannot be read: {one_line(error)}") from None
        return cls(model.eval(), about["threshold"], about["source"])


def new_folder(path: str | Path) -> Path:
    """Return the path of a folder that is to be written. Raises InputError where it holds something already."""
    path = home_path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already, and nothing is written over; give another --out")
    return path


def hashed(path: str | Path) -> str:
    """Return the SHA-256 of what a file holds."""
    with home_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rows_of_log(scales: Scales, log: Log) -> Tensor:
    """Return (T, S + 1) float32: a log's values, standardised, NaN where one is missing, and the time since the row
    before."""
    return torch.from_numpy(np.concatenate([scales.standard(log.values), log.elapsed[:, None]], 1))


def parts(length: int) -> tuple[slice, slice, slice]:
    """Return the rows that are fitted to, that set the threshold, and that are held out."""
    first, second = int(FITTED * length), int(SET * length)
    return slice(0, first), slice(first, second), slice(second, length)


def fit(log: Log, labels: np.ndarray, config: SensorConfig, how: FitConfig, say: Say = silent) -> SensorModel:
    """Return a model fitted to the rows of a log that are for it; labels: (T) bool, of
    `rnn_longctx.sensors.read.labels`.

    Raises InputError: a log too short for the windows, or no event in the rows that are fitted to.
    """
    part = parts(len(log.times))[0]
    stages = how.stages
    if how.schedule == FitConfig.schedule:
        stages = [stage for stage in stages if stage[0] + max(config.horizons) <= part.stop] or stages[:1]
        if left := how.stages[len(stages) :]:
            say(f"windows of {' and '.join(str(rows) for rows, _ in left)} are longer than the log, and left out")
    longest = max(rows for rows, _ in stages)
    if longest + max(config.horizons) > part.stop:
        raise InputError(
            f"schedule: windows of {longest} rows and forecasts of {max(config.horizons)} need more than the "
            f"{part.stop} rows that are fitted to (of {len(log.times)})"
        )
    if not labels[part].any() or labels[part].all():
        raise InputError(f"no event lies in the {part.stop} rows that are fitted to, up to {log.when(part.stop - 1)}")
    torch.manual_seed(how.seed)
    scales = Scales.of(log.values[part])
    model = SensorModel(config, scales).to(how.device)
    rows = rows_of_log(scales, log)[part].to(how.device)
    targets = torch.from_numpy(labels[part]).float().to(how.device)
    say(f"{sum(p.numel() for p in model.parameters()):,} weights, {part.stop:,} rows")
    updates = Updates(model, how.lr, how.seed, sum(n for _, n in stages))
    for length, count in stages:
        losses = [updates.step([(rows, targets, max(1, TOKENS // length))], length) for _ in range(count)]
        say(f"windows of {length}: alarm loss {np.mean(losses[-50:]):.4f} after {updates.done} updates")
    return model.eval()


class Updates:
    """Updates of a model on windows drawn from rows; done: how many were made.

    total: of how many, so that the rate falls at their end and a fresh model's likeness is kept at their beginning;
    None: neither.
    """

    def __init__(self, model: SensorModel, lr: float, seed: int, total: int | None):
        self.model, self.lr, self.total, self.done = model, lr, total, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.rng = np.random.default_rng(seed)
        self.still = 0 if total is None else min(STILL, total // 4)
        self.hooks = hold_likeness(model) if self.still else []

    def step(self, sources: list[tuple[Tensor, Tensor, int]], length: int) -> float:
        """Make an update on windows of `length` rows; return the alarm's loss. sources: rows (T, S + 1), labels (T),
        and how many windows of them."""
        if self.done == self.still:
            for hook in self.hooks:
                hook.remove()
        windows = list(self._windows(sources, length))
        rows, targets = (torch.stack(x).to(self.model.lm.device) for x in zip(*windows))
        most = HIDE if self.total is None else HIDE * self.done / self.total
        hidden = torch.from_numpy(self.rng.random(rows[..., :-1].shape) < most * self.rng.random((len(rows), 1, 1)))
        hidden = hidden.to(rows.device)
        shown = torch.cat([rows[..., :-1].masked_fill(hidden, torch.nan), rows[..., -1:]], -1)
        self.model.train()
        changes, logits = self.model(shown)
        # (what a window's first half asks about may lie before it)
        late = slice(length // 2, None)
        alarm = F.binary_cross_entropy_with_logits(logits[:, late], targets[:, late])
        (ALARMS * alarm + FORECASTS * forecast_loss(self.model, rows, changes)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self._rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        self.done += 1
        return float(alarm.detach())

    def _windows(self, sources: list[tuple[Tensor, Tensor, int]], length: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, targets, count in sources:
            for start in self.rng.integers(0, len(rows) - length + 1, count):
                yield rows[start : start + length], targets[start : start + length]

    def _rate(self) -> float:
        warm = min(1.0, (self.done + 1) / WARMUP)
        left = 1.0 if self.total is None else (self.total - self.done) / (DECAY * self.total)
        return warm * min(1.0, max(0.02, left))


def hold_likeness(model: SensorModel) -> list[RemovableHandle]:
    """Let no gradient pass through the queries and keys of the layers behind the first; return what ends that.

    A fresh row reads rows like itself: its own neighbours as well as those where its lot stood before. That it is in a
    dip is learned first, and before what stood there has a use, softmax attention would learn to read its neighbours
    alone, from where it does not come back. So first what is read is learned, and then where to read."""

    def held(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        queries, keys, values = output.chunk(3, -1)
        return torch.cat([queries.detach(), keys.detach(), values], -1)

    mixers = [block.mixer for block in model.lm.layers[1:]]
    return [mixer.in_proj.register_forward_hook(held) for mixer in mixers if isinstance(mixer, Attention)]


def forecast_loss(model: SensorModel, rows: Tensor, changes: Tensor) -> Tensor:
    """Return the mean smooth L1 loss of forecasts, over horizons and what is not missing.

    Args: rows: (B, T, S + 1); changes: (B, T, horizons, S), as the model returns them.
    """
    values, losses = rows[..., :-1], []
    last = last_seen(values)
    for i, ahead in enumerate(h for h in model.config.horizons if h < rows.shape[1]):
        true, said = values[:, ahead:], last[:, :-ahead] + changes[:, :-ahead, i]
        there = ~true.isnan()
        losses.append(F.smooth_l1_loss(said[there], true[there]))
    return torch.stack(losses).mean() if losses else changes.sum() * 0


def last_seen(values: Tensor) -> Tensor:
    """Return values (B, T, S) with the last one seen in the place of one that is missing; 0, the median, before any."""
    places = torch.arange(values.shape[1], device=values.device)[:, None].expand(values.shape[1:])
    last = torch.where(values.isnan(), -1, places).cummax(1).values
    return values.gather(1, last.clamp(min=0)).where(last >= 0, 0.0)
