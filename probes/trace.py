"""What the states of a model do while it reads: `record` watches every layer's scan from inside, in one pass.

    with torch.inference_mode(), rnn_longctx.record(model, every=256) as trace:
        for hidden in model.stream(ids):
            ...
    trace.table()

Every `every` tokens the scan says of each head's state S (P, N): sums, the largest size, and the log-decay so far. No
state is copied unless `whole` asks for it. Everything else is worked out of those:

    mean, variance, rms, max, norm     of the numbers of S; norm is Frobenius'
    retention                          exp(log_decay): what is left of the stream's first token
    decay                              mean log-decay a token since the look before, in nats
    input_scale                        mean input scale since then (of a policy whose gates are affine: dt is decay / A)
    horizon                            tokens until 1/e is left, at that rate
    median, channels                   with `whole`: of S, and the rows of S (channels of the head) that hold most
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.policy import ScanPolicy, per_head
from rnn_longctx.recurrence.statistics import Statistics

if TYPE_CHECKING:
    from rnn_longctx.models.lm import Mamba2LM

KEYS = ["stream", "row", "layer", "head", "position"]
OF_BOTH = ["mean", "variance", "rms", "max", "norm"]  # of a state, and of a convolution's inputs
LOOKED = [*OF_BOTH, "retention", "decay", "input_scale", "horizon"]
CHANNELS = 3  # of a head, the ones named with `whole`


class Course:
    """What follows from one layer's statistics, given in the order in which they were read."""

    def __init__(self, mixer: Any, every: int):
        self.heads, self.every = mixer.heads, every
        self.A = mixer.A.detach().double()
        self._last: tuple[int, Tensor] | None = None  # position and log-decay of the look before
        self._streams = 0

    def add(self, s: Statistics, policy: ScanPolicy) -> dict[str, Any]:
        position = int(s.position[0])
        if self._last is None or position <= self._last[0] or len(s.log_decay) != len(self._last[1]):
            self._streams += 1
            self._last = (position - self.every, torch.zeros_like(s.log_decay[..., 0]))
            fresh = position == self.every
        else:
            fresh = position == self._last[0] + self.every
        steps = torch.diff(s.log_decay, prepend=self._last[1][..., None], dim=-1) / self.every
        if not fresh:  # the first look at a stream that had begun before
            steps[..., 0] = float("nan")
        self._last = (int(s.position[-1]), s.log_decay[..., -1].clone())
        A, decay = self.A.to(steps.device), steps
        if A.ndim == 2 or steps.ndim == 4:  # a rate a channel of the state: their mean says it
            A, decay = A.mean(-1), (steps.mean(-2) if steps.ndim == 4 else steps)
        mul, add, gain = (per_head(v, self.heads, A) for v in (policy.mul, policy.add, policy.gain))
        rate = torch.as_tensor(mul * A, device=A.device).reshape(-1, 1)
        shift = torch.as_tensor(add, dtype=A.dtype, device=A.device).reshape(-1, 1)
        gains = torch.as_tensor(gain, dtype=A.dtype, device=A.device).reshape(-1, 1)
        known = not policy.caps and policy.min_dt == 0.0 and policy.window is None
        log_decay = s.log_decay.mean(-2) if s.log_decay.ndim == 4 else s.log_decay
        return {
            "stream": self._streams - 1, "position": s.position, "mean": s.mean, "variance": s.rms**2 - s.mean**2,
            "rms": s.rms, "max": s.peak, "norm": s.norm, "retention": log_decay.exp(), "decay": decay,
            "input_scale": gains * (decay - shift) / rate if known else torch.full_like(decay, float("nan")),
            "horizon": -1 / decay.clamp(max=-1e-12),
        }  # fmt: skip


class Watcher:
    """The observer of one layer (`recurrence.ssd.Observer`). What it is shown is kept where it was made, and worked
    out when it is asked for: a model on a GPU need not wait."""

    def __init__(self, mixer: Any, layer: int, every: int, whole: bool):
        self.mixer, self.layer, self.every, self.whole = mixer, layer, every, whole
        self._seen: list[tuple[Statistics, ScanPolicy, dict[str, Any]]] = []

    def __call__(self, s: Statistics) -> None:
        more = {}
        if s.state is not None:
            more["median"] = s.state.flatten(-2).median(-1).values.movedim(2, -1)
            more["channels"] = s.state.norm(dim=-1).topk(min(CHANNELS, s.state.shape[-2]), -1).indices
        self._seen.append((replace(s, state=None), self.mixer.policy, more))

    def looks(self) -> list[dict[str, Any]]:
        """A call each, of what the module's docstring names."""
        course = Course(self.mixer, self.every)
        return [course.add(s.cpu(), policy) | more for s, policy, more in self._seen]


class Convolution:
    """What a layer's convolution holds at the same positions: its last d_conv - 1 inputs, all channels together."""

    def __init__(self, mixer: Any, layer: int, every: int):
        self.mixer, self.layer, self.every = mixer, layer, every
        self.looks: list[dict[str, Any]] = []
        self._position, self._before = 0, None

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [self.mixer.register_forward_pre_hook(self._begin),
                 self.mixer.in_proj.register_forward_hook(self._look)]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, mixer: Any, args: tuple) -> None:
        carry = args[1]
        self._position = 0 if carry is None else int(carry.scan.position[0])
        self._before = None if carry is None else carry.conv

    def _look(self, in_proj: Any, args: tuple, projected: Tensor) -> None:
        c, taps = self.mixer.config, self.mixer.config.d_conv - 1
        x = projected[..., c.d_inner : c.d_inner + c.conv_dim]
        before = x.new_zeros(len(x), taps, c.conv_dim) if self._before is None else self._before.transpose(1, 2)
        first = self._position // self.every * self.every + self.every
        ends = torch.tensor(range(first, self._position + x.shape[1] + 1, self.every), dtype=torch.int64, device="cpu")
        if not len(ends) or not taps:
            return
        # Tokens of this call, or of the ones before it where they are negative. Made on the device, and the index too:
        # a copy from the CPU would wait for all that is queued there.
        first -= self._position
        at = torch.arange(first, x.shape[1] + 1, self.every, device=x.device)[:, None]
        at = at + torch.arange(-taps, 0, device=x.device)
        recent = x[:, at.clamp(min=0)]  # (B, n, taps, channels)
        if first < taps:
            recent = torch.where((at < 0)[..., None], before.to(x.dtype)[:, at.clamp(max=-1) + taps], recent)
        recent = recent.flatten(2).float()
        mean, rms = recent.mean(-1), recent.square().mean(-1).sqrt()
        self.looks.append({"position": ends, "mean": mean, "variance": rms**2 - mean**2, "rms": rms,
                           "max": recent.abs().amax(-1), "norm": rms * recent.shape[-1] ** 0.5})  # fmt: skip


class Trace:
    """What was seen, a row a look: `table()`; `convolution()`, of this library's own models."""

    def __init__(self, watchers: list[Watcher], convolutions: list[Convolution]):
        self._watchers, self._convolutions = watchers, convolutions

    def convolution(self) -> pd.DataFrame:
        """Columns row, layer, position, mean, variance, rms, max, norm: of the last d_conv - 1 inputs of a layer's
        convolution, all channels together. Empty for an adopted model, whose convolution is its own."""
        parts = []
        for one in self._convolutions:
            for look in one.looks:
                rows, n = look["mean"].shape
                frame = {
                    "row": torch.arange(rows, device="cpu").repeat_interleave(n), "layer": one.layer,
                    "position": look["position"].repeat(rows),
                }  # fmt: skip
                frame |= {k: v.double().cpu().flatten().numpy() for k, v in look.items() if k != "position"}
                parts.append(pd.DataFrame(frame))
        return (
            pd.concat(parts, ignore_index=True)
            if parts
            else pd.DataFrame(columns=["row", "layer", "position", *OF_BOTH])
        )

    def table(self) -> pd.DataFrame:
        """Columns stream, row, layer, head, position and those in the module's docstring; positions in tokens,
        log-decays in nats. A stream is what was read from one cache, where streams are read one after the other: which
        cache it was is not seen, and positions that grow are taken for one stream. A row is one of its batch. Empty
        where fewer than `every` tokens were read."""
        parts = []
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
                parts.append(pd.DataFrame(frame))
        if not parts:
            whole = any(watcher.whole for watcher in self._watchers)
            return pd.DataFrame(columns=[*KEYS, *LOOKED, *(["median", "channels"] if whole else [])])
        return pd.concat(parts).sort_values(KEYS, ignore_index=True)


@contextmanager
def record(model: Mamba2LM, layers: Iterable[int] | None = None, every: int | str = 256,
           whole: bool = False) -> Iterator[Trace]:  # fmt: skip
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
    from rnn_longctx.models.adopt.adopting import as_language_model
    from rnn_longctx.models.lm import Mamba2LM as Own
    from rnn_longctx.models.modes import warn_of_training

    lm = as_language_model(model)
    warn_of_training(lm)
    count = len(lm.mixers)
    try:
        wanted = list(range(count)) if layers is None else list(dict.fromkeys(index(i) for i in layers))
    except TypeError:
        raise InputError(f"layers: expected whole numbers such as [0, 2], got {layers!r:.60}") from None
    for layer in wanted:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer} is not there: the model has {count} recurrent layers, 0 to {count - 1}")
    every = parse_length(every, "every")
    watchers = [Watcher(lm.mixers[i], i, every, whole) for i in wanted]
    convolutions = [Convolution(lm.mixers[i], i, every) for i in wanted] if isinstance(lm, Own) else []
    with ExitStack() as stack:
        stack.enter_context(watching(watchers))
        for convolution in convolutions:
            stack.enter_context(convolution.watching())
        yield Trace(watchers, convolutions)


@contextmanager
def watching(watchers: list[Any]) -> Iterator[None]:
    """Each watcher sees its `mixer` inside the block."""
    if any(w.mixer.observer is not None for w in watchers):
        raise InputError("the model is being watched already: leave that `record` or monitor first")
    try:
        for w in watchers:
            w.mixer.observer = w
        yield
    finally:
        for w in watchers:
            w.mixer.observer = None
