"""What every model, layer and mixer of this library is to the rest of it: remedies, probes, training and evaluation use
these and no class by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from rnn_longctx.models.carries import Carry, StreamCache
from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.mixer_reading import Rest, Tap
from rnn_longctx.models.reading import ReadingHook
from rnn_longctx.models.restart import Restart
from rnn_longctx.models.rotary import Yarn
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs, SteppedGates
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.span import Span
from rnn_longctx.recurrence.statistics import Observer

if TYPE_CHECKING:
    from rnn_longctx.data import Tokenizer

# (model, ids (B, T), segment) to the logits (B, vocab) after the last token, and the cache
Reader = Callable[["LanguageModel", Tensor, int], "tuple[Tensor, StreamCache]"]


class Shape(Protocol):
    """What a model is built from.

    Attributes:
        mlp: the width of a gated MLP after every mixer, as a multiple of d_model; 0: there is none.
        norm: the norms of the residual, "rms" or "layer".
    """

    d_model: int
    n_layer: int
    vocab_size: int
    norm_eps: float
    tie_embeddings: bool
    residual_in_fp32: bool

    @property
    def mlp(self) -> float: ...
    @property
    def norm(self) -> str: ...
    def make_mixers(self) -> Iterator[Mixer]: ...


class LayerShape(Shape, Protocol):
    """What a mixer is built from: the shape of its model, which of the layers it is in, from 0 on, and whether it is
    the first of its kind."""

    @property
    def layer(self) -> int: ...
    @property
    def first(self) -> bool: ...


class Mixer(Protocol):
    """A layer that mixes tokens: an nn.Module, registered in `rnn_longctx.models.mixers.MIXERS` by its name.

    Its carry is of a kind of its own: any dataclass that `rnn_longctx.models.carries.carry` registers.

    Attributes:
        name, Config: the mixer's name, and a frozen dataclass of its parameters; `of` makes it of one.
        attends: whether it keeps keys and values of the tokens that it has read.

    A class may list `examples`, settings such as ("gla:heads=2",) that its contract tries
    (`rnn_longctx.testing.mixers.examples`): small ones, where a window or a chunk ends within a test's stream.

    A `Config` may have a method `unfit(length)`: why its settings do not go with the longest text that is to be read,
    in tokens, on one line, or None; training, evaluation and comparisons then warn.

    One that chooses what it reads has a method `kept(u, carry, span)`, called as the module is, whose result has
    `blocks`, (B, H, T, K) int64: the numbers of what each head of a token chose, -1 where it found no more
    (`rnn_longctx.models.sparse.SparseAttention.kept`).
    """

    name: ClassVar[str]
    Config: ClassVar[Any]  # a type, of each mixer its own
    attends: ClassVar[bool]

    @classmethod
    def of(cls, config: Any, model: LayerShape) -> Mixer:
        """Make the mixer of one layer of a model. config: of its own `Config`."""
        ...

    def __call__(self, u: Tensor, carry: Any, span: Span) -> tuple[Tensor | DeferredNorm, Any]:
        """Read u (B, T, d_model) after a carry of its own kind, None at the beginning of a stream; return as much, and
        the carry after it, of new tensors. Padding changes no carry, and a document sees nothing of the one before.

        (The module's `forward`.)"""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def new_carry(self, rows: int) -> Any:
        """Return as tensors what None stands for: the carry of rows that have read nothing."""
        ...

    def state_size(self) -> StateSize:
        """Return how many numbers of its carry a row keeps, counters aside."""
        ...


@runtime_checkable
class RecurrentMixer(Protocol):
    """A layer whose recurrence follows a policy: of this library's models, and of adopted ones.

    Those of this library are a `ScanMixer`, too. An adopted one has its library's forward and cache.

    Attributes:
        recurrence: the rule by which a state follows from the one before.
        heads, headdim, d_state: the shape (H, P, N) of a row's state.
        policy: data; set it, and the next token follows it.
        observer: is shown the state's statistics, or None.
        tap: is called with the `MixerReading` of every call, and may return other gates for the scan to read; or None.
            Only a layer that is `tappable` takes one.
        backend: the name of one, or None for the first that supports the policy.
        state_dtype: what the state is rounded to between calls, or None.
        per_channel: whether every channel of the state decays by itself.
        A: (H) or (H, N), at least float32, the rate at which each head decays in a step, below 0; None where decays are
            given token by token, or where a factor on a weight is no factor on log-decays alone.
        no_rates: what the layer does that no weight scales its log-decays alone, where `A` is None.
        bounded: whether log-decays have a lower bound, by a sigmoid: a factor on a rate inside it is none on them.
        one_step_a_head: whether a token has one step a head, from what `in_proj` gives, as Mamba-2's has: the mixer is
            then a `SteppedMixer`. Mamba-1 has one a channel, a recurrence whose gates are given has none.
    """

    policy: ScanPolicy
    observer: Observer | None
    tap: Tap | None
    backend: str | None
    state_dtype: torch.dtype | None

    @property
    def recurrence(self) -> Recurrence: ...
    @property
    def heads(self) -> int: ...
    @property
    def headdim(self) -> int: ...
    @property
    def d_state(self) -> int: ...
    @property
    def tappable(self) -> bool: ...
    @property
    def per_channel(self) -> bool: ...
    @property
    def one_step_a_head(self) -> bool: ...
    @property
    def bounded(self) -> bool: ...
    @property
    def A(self) -> Tensor | None: ...
    @property
    def no_rates(self) -> str: ...

    def scale_rates(self, factor: Tensor) -> None:
        """Multiply every head's log-decay by factor (H), float64, in the weights. Raises InputError where no weight of
        this library's holds it."""
        ...


class ScanMixer(RecurrentMixer, Mixer, Protocol):
    """A recurrent layer of this library's own models (`rnn_longctx.models.mixers.base.Recurrent`).

    Attributes:
        channels: the channels of its convolution and how many inputs of each it keeps; None: there is none.
    """

    @property
    def channels(self) -> tuple[int, int] | None: ...

    def inputs(self, u: Tensor, carry: Carry | None, span: Span) -> tuple[ScanInputs, AnyGates, Rest]:
        """Return what the scan reads of u (B, T, d_model), and what is needed after it."""
        ...

    def scan_state(self, carry: Carry) -> Tensor:
        """Return the state (B, H, P, N) of a carry."""
        ...


@runtime_checkable
class SteppedMixer(RecurrentMixer, Protocol):
    """A recurrent mixer whose tokens have one step a head (see `RecurrentMixer.one_step_a_head`).

    Attributes:
        A: (H), at least float32: the rate at which each head decays, below 0.
        in_proj: the map from the mixer's input (B, T, d_model) to all that it works with.
    """

    @property
    def A(self) -> Tensor: ...
    @property
    def in_proj(self) -> nn.Module: ...

    def steps(self, projected: Tensor) -> Tensor:
        """Return dt (B, T, H), after softplus and clamp, from what `in_proj` gives."""
        ...


def stepped_mixers(model: LanguageModel) -> list[SteppedMixer]:
    """Return the recurrent layers of a model that have one step a head: all of them, where a remedy says that it needs
    steps or rates."""
    return [mixer for mixer in model.mixers if _is_stepped(mixer)]


def steps_write(mixer: RecurrentMixer) -> bool:
    """Return whether a step says both how much of the state stays and how much is written, as Mamba's does. A delta
    rule's beta is given beside the decay, and hangs on no step."""
    return SteppedGates in mixer.recurrence.takes and mixer.A is not None


def _is_stepped(mixer: RecurrentMixer) -> TypeGuard[SteppedMixer]:
    return mixer.one_step_a_head


def erases(mixer: RecurrentMixer) -> bool:
    """Return whether the layer's recurrence erases, as the delta rule does: exp(log_decay) is then what the decay alone
    would leave and not what stays, and outputs are no sums of what tokens wrote."""
    return "erase" in mixer.recurrence.follows


class RotaryMixer(Protocol):
    """A layer of full attention whose rotary positions follow `yarn`: set it, and the next token is read so."""

    yarn: Yarn | None


class LayerByLayer(Protocol):
    """A prompt on its way through a model, layer after layer, so that tokens may be left out between two layers.

    What is handed on is a list of tensors (B, T, ...): every one of them must be cut to the same tokens. The layers
    below the first that leaves tokens out may read the prompt in segments; the others read it once.

        tokens = layers.embed(ids)
        for i in range(n):
            tokens = layers.leave(i, layers.enter(i, tokens))
        hidden, cache = layers.finish(tokens, ids.shape[1])
    """

    def longest(self, rows: int) -> int | None:
        """Return the most tokens a row that may be read at once, or None where there is no such limit."""
        ...

    def embed(self, ids: Tensor) -> list[Tensor]: ...

    def enter(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        """Make tokens ready for a layer; they may be cut after that."""
        ...

    def normed(self, layer: int, tokens: list[Tensor]) -> Tensor:
        """Return what the layer's mixer reads, (B, T, d_model), of tokens that have entered it."""
        ...

    def leave(self, layer: int, tokens: list[Tensor]) -> list[Tensor]:
        """Let the layer read tokens that have entered it; its carry moves on."""
        ...

    def finish(self, tokens: list[Tensor], length: int) -> tuple[Tensor, StreamCache]:
        """Return the hidden states (B, d_model) of the last token, and the cache. length: tokens of the prompt."""
        ...


class Layer(Protocol):
    """A residual layer of a model: h <- h + mixer(norm(h)), and where there is one h <- h + mlp(norm2(h))."""

    @property
    def norm(self) -> nn.Module: ...
    @property
    def mixer(self) -> Mixer: ...
    @property
    def norm2(self) -> nn.Module | None: ...
    @property
    def mlp(self) -> nn.Module | None: ...


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
        rotary: its layers of full attention whose rotary positions can be scaled; there may be none.
        attends: whether some layer keeps keys and values of the tokens that it has read.
        rotary_scaling: how its attention's positions are scaled, as transformers calls it ("dynamic"), or None.
        eos_token_id: the id or ids that its config ends an answer with, beside the tokenizer's, or None.
        module: the weights.
        own_forward: whether the module has a forward and generate of its own, being another library's: these follow
            policies, and no way to read (`restart`, `reader`).
        foldable: whether its weights are this library's to write: `fold` changes them and `save` stores them.

    A model reads on from caches of its own kind alone, which `new_cache` begins: so `cache` is Any where it is given.
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
    def mixers(self) -> Sequence[RecurrentMixer]: ...
    @property
    def rotary(self) -> Sequence[RotaryMixer]: ...
    @property
    def attends(self) -> bool: ...
    @property
    def rotary_scaling(self) -> str | None: ...
    @property
    def eos_token_id(self) -> int | list[int] | None: ...
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
    @property
    def own_forward(self) -> bool: ...
    @property
    def foldable(self) -> bool: ...

    def state_size(self) -> StateSize: ...
    def use_backend(self, name: str | None) -> None: ...
    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None: ...
    def measured(self, what: str) -> dict[Any, Any]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def new_cache(self) -> StreamCache: ...
    def __call__(
        self, ids: Tensor, cache: Any = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor: ...
    def reading_with(self, hook: ReadingHook) -> AbstractContextManager[None]: ...
    def stream(self, ids: Tensor, cache: Any = None, segment: int = 4096) -> Iterator[Tensor]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor: ...

    def refuse_own(self, ways: str) -> None:
        """Let the module's own forward and generate, where it has them, raise InputError: remedies are on that are ways
        to read, and only this library's reading follows them. ways: their names; "" lets them work again."""
        ...

    def layer_by_layer(self) -> LayerByLayer | None:
        """Return a new prompt's way through the layers, or None where that is not written for this kind of model."""
        ...
