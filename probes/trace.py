"""What the states of a model do while it reads: `record` watches every layer's scan from inside, in one pass.

    with torch.inference_mode(), rnn_longctx.record(model, every=256) as trace:
        for hidden in model.stream(ids):
            ...
    trace.table()

Every `every` tokens the scan says of each head's state S (P, N): sums, the largest size, and the log-decay so far. No
state is copied unless `whole` asks for it. Everything else is worked out of those:

    mean, variance, rms, max, norm     of the numbers of S; norm is Frobenius'
    retention                          exp(log_decay): what is left of the stream's first token; where the recurrence
                                       erases (the delta rule), what the decay alone would leave
    decay                              mean log-decay a token since the look before, in nats
    input_scale                        mean input scale since then; of steps, it is decay / A, and not a number where a
                                       policy does more to the gates than mul and add
    horizon                            tokens until 1/e is left, at that rate
    median, channels                   with `whole`: of S, and the rows of S (channels of the head) that hold most
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import index
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import counted, parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.measure.taps import tapping
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.interface import LanguageModel, RecurrentMixer, steps_write
from rnn_longctx.models.mixer_reading import MixerReading
from rnn_longctx.models.modes import warn_of_training
from rnn_longctx.recurrence.gates import AnyGates, SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy, per_head
from rnn_longctx.recurrence.statistics import Statistics

KEYS = ["stream", "row", "layer", "head", "position"]
OF_BOTH = ["mean", "variance", "rms", "max", "norm"]  # of a state, and of a convolution's inputs
LOOKED = [*OF_BOTH, "retention", "decay", "input_scale", "horizon"]
CHANNELS = 3  # of a head, the ones named with `whole`


class Course:
    """What follows from one layer's statistics, given in the order in which they were read.

    Attributes:
        rates: (H) or (H, N), what the log-decay of a unit step is; -1 where decays are given and there are no steps.
        stepped: whether the decays are of steps.
    """

    def __init__(self, mixer: RecurrentMixer, every: int):
        self.heads, self.every = mixer.heads, every
        A = mixer.A
        self.stepped = steps_write(mixer)
        rates = -torch.ones(self.heads, device="cpu") if A is None or not self.stepped else A.detach()
        self.rates = rates.double()
        self._last: tuple[int, Tensor] | None = None  # position and log-decay of the look before
        self._streams = 0

    def add(self, s: Statistics, policy: ScanPolicy) -> dict[str, Any]:
        """Return what the module's docstring names, by name: tensors (B, H, n), the stream and the positions (n)."""
        decay = self._decay(s)
        log_decay = s.log_decay.mean(-2) if s.log_decay.ndim == 4 else s.log_decay
        scale = self.steps(decay, policy) if self.stepped else torch.full_like(decay, float("nan"))
        return {
            "stream": self._streams - 1,
            "position": s.position,
            "mean": s.mean,
            "variance": s.rms**2 - s.mean**2,
            "rms": s.rms,
            "max": s.peak,
            "norm": s.norm,
            "retention": log_decay.exp(),
            "decay": decay,
            "input_scale": scale,
            "horizon": -1 / decay.clamp(max=-1e-12),
        }

    def steps(self, decay: Tensor, policy: ScanPolicy) -> Tensor:
        """Return the mean steps, times the policy's gain, that explain mean log-decays (B, H, n), nats a token; where
        there are no steps the log-decays themselves without their sign. Not a number where more than mul and add
        stands between."""
        A = self.rates.to(decay.device)
        A = A.mean(-1) if A.ndim == 2 else A
        mul, add, gain = (per_head(v, self.heads, A) for v in (policy.mul, policy.add, policy.gain))
        rate = torch.as_tensor(mul * A, device=A.device).reshape(-1, 1)
        shift = torch.as_tensor(add, dtype=A.dtype, device=A.device).reshape(-1, 1)
        gains = torch.as_tensor(gain, dtype=A.dtype, device=A.device).reshape(-1, 1)
        known = not policy.caps and policy.min_dt == 0.0 and policy.window is None
        return gains * (decay - shift) / rate if known else torch.full_like(decay, float("nan"))

    def _decay(self, s: Statistics) -> Tensor:
        """(B, H, n): the mean log-decay a token since the look before; of channels that decay by themselves the mean.
        Not a number at the first look at a stream that had begun before."""
        position = int(s.position[0])
        if self._last is None or position <= self._last[0] or len(s.log_decay) != len(self._last[1]):
            self._streams += 1
            self._last = (position - self.every, torch.zeros_like(s.log_decay[..., 0]))
            known = position == self.every
        else:
            known = position == self._last[0] + self.every
        decay = torch.diff(s.log_decay, prepend=self._last[1][..., None], dim=-1) / self.every
        if not known:
            decay[..., 0] = float("nan")
        self._last = (int(s.position[-1]), s.log_decay[..., -1].clone())
        return decay.mean(-2) if decay.ndim == 4 else decay


class LayerTap:
    """What a layer's calls show beside its states, at the same positions: what its convolution holds, and the input
    scales where its gates are given.

    Attributes:
        looks: at the last inputs of the convolution, all channels together; a call each.
        scales: (B, H, n), mean input scales since the look before, of the last call; None: they follow from steps.
    """

    def __init__(self, mixer: RecurrentMixer, layer: int, every: int):
        self.mixer, self.layer, self.every = mixer, layer, every
        self.looks: list[dict[str, Any]] = []
        self.scales: Tensor | None = None
        self._position = 0  # tokens up to the end of the last call
        self._sum: Tensor | None = None  # (B, 1, H) of the input scales since the last look

    def __call__(self, reading: MixerReading) -> None:
        start = 0 if reading.carry is None else int(reading.carry.scan.position[0])
        tokens = reading.inputs.x.shape[1]
        ends = range(start // self.every * self.every + self.every, start + tokens + 1, self.every)
        self.scales = None if isinstance(reading.gates, SteppedGates) else self._scales(reading.gates, start, ends)
        self._position = start + tokens
        rest = reading.rest
        if ends and rest.convolved is not None and rest.conv is not None and (taps := rest.conv.shape[-1]):
            self._look(rest.convolved, None if reading.carry is None else reading.carry.conv, taps, start, ends)

    def _scales(self, gates: AnyGates, start: int, ends: range) -> Tensor:
        scale = gates.worked_out(torch.float64, self.mixer.policy).input_scale  # (B, T, H)
        before = torch.zeros_like(scale[:, :1])  # of the tokens since the last look
        if start % self.every:
            before = torch.full_like(before, float("nan"))
            if self._sum is not None and start == self._position and len(self._sum) == len(scale):
                before = self._sum
        total = torch.cat([torch.zeros_like(before), scale.cumsum(1)], 1)
        sums = torch.diff(total[:, [0, *(end - start for end in ends)]], dim=1)
        sums[:, :1] += before
        last = ends[-1] - start if ends else 0
        self._sum = total[:, -1:] - total[:, last : last + 1] + (0 if ends else before)
        return sums.transpose(1, 2) / self.every

    def _look(self, x: Tensor, before: Tensor | None, taps: int, start: int, ends: range) -> None:
        """x (B, T, channels) was read, after `before` (B, channels, taps)."""
        before = x.new_zeros(len(x), taps, x.shape[2]) if before is None else before.transpose(1, 2)
        # Tokens of this call, or of the ones before it where they are negative. Made on the device, and the index too:
        # a copy from the CPU would wait for all that is queued there.
        first = ends[0] - start
        at = torch.arange(first, x.shape[1] + 1, self.every, device=x.device)[:, None]
        at = at + torch.arange(-taps, 0, device=x.device)
        recent = x[:, at.clamp(min=0)]  # (B, n, taps, channels)
        if first < taps:
            recent = torch.where((at < 0)[..., None], before.to(x.dtype)[:, at.clamp(max=-1) + taps], recent)
        recent = recent.flatten(2).float()
        mean, rms = recent.mean(-1), recent.square().mean(-1).sqrt()
        self.looks.append(
            {
                "position": torch.tensor(ends, dtype=torch.int64, device="cpu"),
                "mean": mean,
                "variance": rms**2 - mean**2,
                "rms": rms,
                "max": recent.abs().amax(-1),
                "norm": rms * recent.shape[-1] ** 0.5,
            }
        )


class Watcher:
    """The observer of one layer (`recurrence.statistics.Observer`). What it is shown is kept where it was made, and
    worked out when it is asked for: a model on a GPU need not wait.

    Args: tap: of the same layer, where it can be tapped.
    """

    def __init__(self, mixer: RecurrentMixer, layer: int, every: int, whole: bool, tap: LayerTap | None = None):
        self.mixer, self.layer, self.every, self.whole, self.tap = mixer, layer, every, whole, tap
        self._seen: list[tuple[Statistics, ScanPolicy, dict[str, Any]]] = []

    def __call__(self, s: Statistics) -> None:
        more = {}
        if self.tap is not None and self.tap.scales is not None:
            more["input_scale"] = self.tap.scales
        if s.state is not None:
            more["median"] = s.state.flatten(-2).median(-1).values.movedim(2, -1)
            more["channels"] = s.state.norm(dim=-1).topk(min(CHANNELS, s.state.shape[-2]), -1).indices
        self._seen.append((replace(s, state=None), self.mixer.policy, more))

    def looks(self) -> list[dict[str, Any]]:
        """Return what the module's docstring names, a dictionary a call."""
        course = Course(self.mixer, self.every)
        return [course.add(s.cpu(), policy) | more for s, policy, more in self._seen]


class Trace:
    """What was seen, a row a look: `table()`; `convolution()`, of this library's own models."""

    def __init__(self, watchers: list[Watcher]):
        self._watchers = watchers

    def convolution(self) -> pd.DataFrame:
        """Return a table of what the convolutions held.

        Columns row, layer, position, mean, variance, rms, max, norm: of the last d_conv - 1 inputs of a layer's
        convolution, all channels together. Empty for layers without one, and for an adopted model, whose convolution is
        its own."""
        frames = []
        for tap in (watcher.tap for watcher in self._watchers if watcher.tap is not None):
            for look in tap.looks:
                rows, n = look["mean"].shape
                frame: dict[str, Any] = {
                    "row": torch.arange(rows, device="cpu").repeat_interleave(n),
                    "layer": tap.layer,
                    "position": look["position"].repeat(rows),
                }
                frame |= {k: v.double().cpu().flatten().numpy() for k, v in look.items() if k != "position"}
                frames.append(pd.DataFrame(frame))
        if not frames:
            return pd.DataFrame(columns=["row", "layer", "position", *OF_BOTH])
        return pd.concat(frames, ignore_index=True)

    def table(self) -> pd.DataFrame:
        """Return a table of the states.

        Columns stream, row, layer, head, position and those in the module's docstring; positions in tokens, log-decays
        in nats. A stream is what was read from one cache, where streams are read one after the other: which
        cache it was is not seen, and positions that grow are taken for one stream. A row is one of its batch. Empty
        where fewer than `every` tokens were read."""
        frames = []
        for watcher in self._watchers:
            for look in watcher.looks():
                rows, heads, n = look["norm"].shape
                frame = {
                    "stream": look["stream"],
                    "row": torch.arange(rows, device="cpu").repeat_interleave(heads * n),
                    "layer": watcher.layer,
                    "head": torch.arange(heads, device="cpu").repeat_interleave(n).repeat(rows),
                    "position": look["position"].repeat(rows * heads),
                }
                for name, value in look.items():
                    if name == "channels":  # (B, H, n, k)
                        frame[name] = [tuple(v) for v in value.flatten(0, 2).tolist()]
                    elif name not in frame:
                        frame[name] = value.double().cpu().flatten().numpy()
                frames.append(pd.DataFrame(frame))
        if not frames:
            whole = any(watcher.whole for watcher in self._watchers)
            return pd.DataFrame(columns=[*KEYS, *LOOKED, *(["median", "channels"] if whole else [])])
        return pd.concat(frames).sort_values(KEYS, ignore_index=True)


@contextmanager
def record(
    model: Any, layers: Iterable[int] | None = None, every: int | str = 256, whole: bool = False
) -> Iterator[Trace]:
    """Watch the states of a model while it reads inside the `with` block, one stream after the other. Without
    gradients (`torch.inference_mode()`) that takes the memory of a segment and of the table. The model stays in the
    mode that it is in, and an adopted one in training mode is warned of.

    Args:
        model: this library's, or one of another library, which is adopted.
        layers: which recurrent layers, counted from 0; None watches all.
        every: tokens between two looks (256, "2k").
        whole: look at the states themselves too, for their medians and channels: the scan is cut at every look, and
            slower.
    Raises:
        InputError: no such layer, an `every` below 1, a model that is being watched already.
    """
    lm: LanguageModel = as_language_model(model)
    warn_of_training(lm)
    chosen = _layers(layers, len(lm.mixers))
    every = parse_length(every, "every")
    taps = {i: LayerTap(lm.mixers[i], i, every) for i in chosen if lm.mixers[i].tappable}
    watchers = [Watcher(lm.mixers[i], i, every, whole, taps.get(i)) for i in chosen]
    with watching(watchers), tapping([lm.mixers[i] for i in taps], list(taps.values())):
        yield Trace(watchers)


def _layers(layers: Iterable[int] | None, count: int) -> list[int]:
    if not count:
        raise InputError("the model has no recurrent layer, so there is no state to watch")
    try:
        chosen = list(range(count)) if layers is None else list(dict.fromkeys(index(i) for i in layers))
    except TypeError:
        raise InputError(f"layers: expected whole numbers such as [0, 2], got {layers!r:.60}") from None
    for layer in chosen:
        if not 0 <= layer < count:
            raise InputError(
                f"layer {layer} is not there: the model has {counted(count, 'recurrent layer')}, 0 to {count - 1}"
            )
    return chosen


@contextmanager
def watching(watchers: list[Any]) -> Iterator[None]:
    """Show each watcher the states of its `mixer` inside the block."""
    if any(w.mixer.observer is not None for w in watchers):
        raise InputError("the model is being watched already: leave that `record` or monitor first")
    try:
        for w in watchers:
            w.mixer.observer = w
        yield
    finally:
        for w in watchers:
            w.mixer.observer = None
