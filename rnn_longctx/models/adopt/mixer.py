"""One mixer of another library under our policies: what all families have in common.

Ours stand before the methods of one object, `mixer.forward` and with mamba_ssm `mixer.step`, while a policy asks for it
(`AdoptedMixer.sync`), and pass everything on to the library's otherwise. docs/develop/adoption.md draws it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.beside import Beside, following, tokens_counted
from rnn_longctx.models.interface import RecurrentMixer
from rnn_longctx.models.mixer_reading import Tap
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.statistics import Observer, Statistics

_eras = itertools.count(1)


class AdoptedMixer:
    """One mixer of another library, behind the interface that remedies use; a family's class is below it.

    Attributes:
        module: the library's.
        name: its path in the model.
        heads, headdim, d_state: its shape.
        backend: the scan to force, or None.
        continuing: whether our scan runs under any policy; `sync` after a change.

        tappable: its scan has its library's shape, so what it reads cannot be shown to a `tap`.

    For a family to say:
        recurrence: the rule by which its state follows from the one before.
        one_step_a_head, bounded, A, no_rates: see `RecurrentMixer`.
        per_channel: whether each channel of a head's state decays by itself.
        stays: whether ours stand before the module's methods without a policy too, from `stand` on.
        entries: the module's methods that ours stand before.
    """

    recurrence: Recurrence
    tappable = one_step_a_head = per_channel = stays = bounded = False
    entries: tuple[str, ...] = ("forward",)

    def __init__(self, module: nn.Module, name: str):
        m: Any = module
        self.module, self.name = m, name
        self.backend: str | None = None
        self.heads, self.headdim, self.d_state = self.shape
        self.continuing = False
        self._parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self._policy = PLAIN
        self._observer: Observer | None = None
        self._counting: _Counting | None = None  # shows the observer what it understands
        self._state_dtype: torch.dtype | None = None
        self._era = 0
        self._stands = self._on = False  # whether ours stand before the mixer's own methods, and whether they act
        self._replaced: dict[str, Any] = {}  # what the instance itself held (a hook of accelerate)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Read as the library's mixer does, with our scan where `active`: a family says how."""
        raise NotImplementedError

    # --- what the library's mixer holds

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a row's state: heads, headdim, d_state."""
        raise NotImplementedError

    @property
    def A(self) -> Tensor | None:
        """The decay rates, (H) or (H, N) float32, or None where no weight scales the log-decays alone."""
        return None

    @property
    def no_rates(self) -> str:
        """What the layer does that no weight scales its log-decays alone, where `A` is None."""
        return "makes its decays from the text"

    # --- what is asked of it, and whether ours stand before its methods

    @property
    def policy(self) -> ScanPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: ScanPolicy) -> None:
        self._policy = policy
        self.sync()

    @property
    def observer(self) -> Observer | None:
        """The observer that is shown the states: our scan runs while there is one. Positions that it sees of rows which
        began before count from when our scan came."""
        return self._observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._observer = observer
        self._counting = None if observer is None else _Counting(observer)
        self.sync()

    @property
    def tap(self) -> Tap | None:
        return None

    @tap.setter
    def tap(self, tap: Tap | None) -> None:
        if tap is not None:
            raise InputError(f"{self.name} is a layer of another library, whose scan cannot be tapped")

    def scale_rates(self, factor: Tensor) -> None:
        raise InputError(f"{self.name} is a layer of another library, whose weights are not written")

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The type that states are kept in, see `scan`; another than None takes our scan, as a policy does."""
        return self._state_dtype

    @state_dtype.setter
    def state_dtype(self, dtype: torch.dtype | None) -> None:
        self._state_dtype = dtype
        self.sync()

    @property
    def active(self) -> bool:
        """Whether our scan runs in this mixer's calls."""
        return self._on and self._needed

    @property
    def _needed(self) -> bool:
        watched = self._observer is not None
        return self._policy != PLAIN or self._state_dtype is not None or self.continuing or watched

    def sync(self) -> None:
        """Put ours before the module's methods, or take them away, as what is asked of the mixer needs now.

        Raises:
            InputError: another model that holds the mixer has put a remedy on it.
        """
        if self._needed and not self._on:
            other = getattr(self.module.forward, "__self__", None)
            if isinstance(other, AdoptedMixer) and other is not self and other.active:
                self._policy = PLAIN
                raise InputError(f"{self.name} is under a remedy already, by way of another model that holds it")
            self._era = next(_eras)
        self._on = self._needed
        if (self._on or self.stays) and not self._stands:
            self._stands, self._replaced = True, {n: self.module.__dict__.get(n) for n in self.entries}
            for n in self.entries:
                setattr(self.module, n, getattr(self, n))
        elif not (self._on or self.stays) and self._stands and self.module.__dict__.get("forward") == self.forward:
            # (a hook that was put before ours in the meantime stays, and ours behind it passes everything on)
            for n, replaced in self._replaced.items():
                if replaced is None:
                    delattr(self.module, n)
                else:
                    setattr(self.module, n, replaced)
            self._stands, self._replaced = False, {}

    def stand(self) -> None:
        """Begin to stand before the module's methods, where that is so without a policy too."""
        self.sync()

    def continue_stream(self, on: bool) -> None:
        """Read what the library's own forward cannot: set before a call, and taken back after it."""
        self.continuing = on
        self.sync()

    def original(self, name: str) -> Callable:
        """Return the mixer's own method, or what the instance held in its place. (Looked up anew, so that a model can
        be pickled.)"""
        replaced = self._replaced.get(name)
        return replaced if replaced is not None else getattr(type(self.module), name).__get__(self.module)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the mixer's forward, by their names."""
        return dict(zip(self._parameters, args)) | kwargs

    # --- what lies in the library's cache

    @property
    def conv(self) -> Any:
        """The convolution before the recurrence, or None."""
        return getattr(self.module, "conv1d", None)

    def layer_of(self, library: Any) -> Any:
        """Return this mixer's part of the library's cache."""
        return library.layers[self.module.layer_idx]

    def state_of(self, layer: Any) -> Tensor:
        """Return the state (B, H, P, N) in a layer of the library's cache."""
        return layer.recurrent_states[0]

    def put_state(self, layer: Any, state: Tensor) -> None:
        """Put a state (B, H, P, N) into a layer of the library's cache."""
        layer.recurrent_states[0] = state.reshape(layer.recurrent_states[0].shape)

    def conv_of(self, library: Any) -> Tensor | None:
        """Return the inputs of the convolution, (B, channels, taps), in the library's cache; None: there is none."""
        return self.layer_of(library).conv_states[0]

    def no_log_decay(self, state: Tensor) -> Tensor:
        """Return a total log-decay that nobody has counted, of a state (B, H, P, N)."""
        shape = (*state.shape[:2], state.shape[3]) if self.per_channel else state.shape[:2]
        return torch.full(shape, math.nan, dtype=torch.float64, device=state.device)

    def beside(self, layer: Any) -> Any:
        """Return what this policy keeps there, or None where it has not read all the tokens before."""
        beside = getattr(layer, "beside", None)
        return beside if beside is not None and beside.era == self._era else None

    def carry(self, layer: Any, state: Tensor) -> ScanCarry:
        """Return the carry of a layer that has read something; state (B, H, P, N) is the library's. Where not `active`
        it is counted by nobody."""
        if not self.active:
            state = state.clone() if torch.is_grad_enabled() else state  # (the library writes into it)
            return ScanCarry(state, torch.zeros(len(state), dtype=torch.int64, device="cpu"), self.no_log_decay(state))
        if (beside := self.beside(layer)) is None:
            beside = Beside.uncounted(self._era, len(state))
            self.lay(layer, beside)
        p = self._policy
        placed = p.window is not None or p.reset is not None or any(c.every > 1 for c in p.caps)
        if placed and not bool(beside.from_start.all()):
            raise InputError(
                "this policy counts tokens, and the cache holds tokens read before it was there: start a new cache"
            )
        if beside.window is not None:
            state = beside.window.block
        elif torch.is_grad_enabled():
            state = state.clone()  # the library writes into it, and a backward pass reads it later
        if beside.log_decay is None:
            beside.log_decay = self.no_log_decay(state)
        return ScanCarry(state, beside.position, beside.log_decay, beside.window)

    def place(self, layer: Any, position: Tensor) -> None:
        """Say where the rows of a layer stand, unless it is known. position: (B,) on the CPU."""
        if self.beside(layer) is None:
            self.lay(layer, Beside(self._era, position.clone()))

    def keep(self, layer: Any, carry: ScanCarry) -> None:
        """Keep of a carry what the library's layer has no place for."""
        self.lay(layer, Beside(self._era, carry.position, carry.log_decay, carry.window))

    def lay(self, layer: Any, beside: Beside) -> None:
        """Lay it beside the state. The layer becomes one of a class whose `beside` moves with its rows."""
        if not hasattr(layer, "beside"):
            layer.__class__ = following(type(layer))  # type: ignore[arg-type]
        layer.beside = beside

    # --- our scan in the place of the library's

    def read(
        self,
        call: Call,
        inputs: ScanInputs,
        gates: AnyGates,
        state: Tensor | None,
        seq_idx: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read a call's tokens under the policy, and keep what lies beside the state.

        Args:
            state: (B, H, P, N), the library's, or None where the rows begin.
            seq_idx: (B, T) the document of each token, or None.
            reset: (B, T) bool, True where a document begins, in the place of seq_idx.
        Returns:
            y (B, T, H, P), and the state after it.
        """
        if seq_idx is not None:
            reset = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        y, new = self.recurrence.scan(
            inputs,
            gates,
            Span(call.mask, reset),
            policy=self._policy,
            backend=self.backend,
            state_dtype=self._state_dtype,
            observer=self._counting,
            carry=None if state is None else self.carry(call.layer, state),
        )
        if call.layer is not None and self.active:
            self.keep(call.layer, new)
        return y.contiguous(), self.recurrence.state(new)


@dataclass
class Call:
    """A mixer's forward on its way.

    Attributes:
        layer: of the library's cache, or None.
        mask: (B, T), False at padding.
        fresh: whether its rows begin.
    """

    mixer: AdoptedMixer
    layer: Any
    mask: Tensor | None
    fresh: bool = True


class _Counting:
    """An observer that shows another one the tokens counted, in the place of the scan's positions."""

    def __init__(self, observer: Observer):
        self.observer, self.every, self.whole = observer, observer.every, observer.whole

    def __call__(self, statistics: Statistics) -> None:
        self.observer(replace(statistics, position=tokens_counted(statistics.position)))


if TYPE_CHECKING:

    def _held_to_the_protocol(mixer: AdoptedMixer) -> RecurrentMixer:
        return mixer
