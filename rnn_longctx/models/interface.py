"""What every model, layer and mixer of this library is to the rest of it: remedies, probes, training and evaluation use
these and no class by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rnn_longctx.models.reading import ReadingHook
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.statistics import Observer

if TYPE_CHECKING:
    from rnn_longctx.data import Tokenizer
    from rnn_longctx.models.cache import Cache
    from rnn_longctx.models.restart import Restart

# (model, ids (B, T), segment) to the logits (B, vocab) after the last token, and the cache
Reader = Callable[[Any, Tensor, int], "tuple[Tensor, Cache]"]


@dataclass(frozen=True)
class StateSize:
    """How many numbers a row keeps between two tokens.

    Attributes:
        fixed: by what they are of ("scan", "conv"), whatever the length.
        per_token: more for every token that was read (attention's keys and values).
    """

    fixed: dict[str, int] = field(default_factory=dict)
    per_token: int = 0

    def __add__(self, other: StateSize) -> StateSize:
        names = [*self.fixed, *(name for name in other.fixed if name not in self.fixed)]
        fixed = {name: self.fixed.get(name, 0) + other.fixed.get(name, 0) for name in names}
        return StateSize(fixed, self.per_token + other.per_token)

    def total(self, length: int = 0) -> int:
        """Numbers a row keeps after `length` tokens."""
        return sum(self.fixed.values()) + length * self.per_token


@runtime_checkable
class RecurrentMixer(Protocol):
    """A layer whose recurrence follows a policy: of this library's models, and of adopted ones.

    Attributes:
        heads, headdim, d_state: the shape (H, P, N) of a row's state.
        policy: data; set it, and the next token follows it.
        observer: is shown the state's statistics, or None.
        backend: the name of one, or None for the first that supports the policy.
        state_dtype: what the state is rounded to between calls, or None.
    """

    policy: ScanPolicy
    observer: Observer | None
    backend: str | None
    state_dtype: torch.dtype | None

    @property
    def heads(self) -> int: ...
    @property
    def headdim(self) -> int: ...
    @property
    def d_state(self) -> int: ...


@runtime_checkable
class LanguageModel(Protocol):
    """A language model whose context is a stream: this library's own, or an adopted one.

    Attributes:
        name, tokenizer, train_length, provenance: filled in by `load` or `adopt`.
        weights_hash: stands for what the model computes now.
        calibration: what is kept with the checkpoint for calibrated remedies, as long as its weights are the same.
        restart: a control that drops the state and reads the last tokens again, or None.
        reader: how a prompt is read where that is not token after token, or None.
        mixers: the recurrent layers, in order; there may be none.
        attends: whether some layer keeps keys and values of the tokens that it has read.
        module: the weights.
    """

    name: str
    train_length: int | None
    tokenizer: Tokenizer
    provenance: dict[str, Any]
    restart: Restart | None
    reader: Reader | None

    @property
    def weights_hash(self) -> str: ...
    @property
    def calibration(self) -> dict[str, Any] | None: ...
    @property
    def mixers(self) -> Sequence[Any]: ...
    @property
    def attends(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def backend(self) -> str: ...
    @property
    def state_dtype(self) -> torch.dtype | None: ...
    @property
    def module(self) -> nn.Module: ...

    def state_size(self) -> StateSize: ...
    def use_backend(self, name: str | None) -> None: ...
    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None: ...
    def measured(self, what: str) -> dict[Any, Any]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def new_cache(self) -> Any: ...
    def __call__(
        self, ids: Tensor, cache: Any = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor: ...
    def reading_with(self, hook: ReadingHook) -> AbstractContextManager[None]: ...
    def stream(self, ids: Tensor, cache: Any = None, segment: int = 4096) -> Iterator[Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor: ...
