"""A model of another library as a stream: what `adopt` makes of it."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rnn_longctx.config import counted, format_length
from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.cache import AdoptedCache, attention_layers, cache_name, unattended, widest_attention
from rnn_longctx.models.adopt.layerwise import AdoptedBlocks
from rnn_longctx.models.adopt.mixer import AdoptedMixer
from rnn_longctx.models.adopt.packed import read_packed
from rnn_longctx.models.adopt.stepped import SteppedAdopted
from rnn_longctx.models.adopt.wrapped import unreadable
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer, tokenizer_of
from rnn_longctx.models.hashing import Identified, computed_on, computes_in
from rnn_longctx.models.ids import rows_of
from rnn_longctx.models.interface import LayerByLayer, RotaryMixer
from rnn_longctx.models.losses import token_losses
from rnn_longctx.models.precision import state_dtype
from rnn_longctx.models.reading import Hooked
from rnn_longctx.models.restart import Restart, read_restarting
from rnn_longctx.models.segments import kernels_there, longest, too_long
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.backends import Call
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.recurrence.rule import compute_dtype

_reading: ContextVar[bool] = ContextVar("reading", default=False)  # whether it is we who call the library's forward


class Adopted(Hooked, Identified):
    """A model of another library as a stream. See `LanguageModel`.

    Attributes:
        model: the library's; of a wrapper, the one inside it.
        mixers: its recurrent layers, in order.
        name, weights_hash, train_length, tokenizer, calibration, restart, reader: as in `LanguageModel`.
    """

    library = "transformers"
    own_forward = True
    foldable = False

    def __init__(self, model: nn.Module, mixers: list[AdoptedMixer]):
        self.model: Any = model
        self.mixers = mixers
        config: Any = getattr(model, "config", None)
        self.config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        self.train_length: int | None = None
        self.tokenizer: Any = LazyTokenizer(tokenizer_of(self.name), self.name, getattr(self.config, "vocab_size", 0))
        self.provenance: dict = {}
        self.restart: Restart | None = None
        self.reader: Any = None
        self._ways: str = ""  # the remedies that its own forward refuses, and the hooks that do
        self._guards: list[RemovableHandle] = []
        self.base: Any = getattr(model, "base_model", model)  # without the head
        self._takes = set(inspect.signature(self.base.forward).parameters)
        self._warned = False  # of a call too wide for the library's kernels
        places = [getattr(m.module, "layer_idx", None) for m in self.mixers]
        if twice := next(
            (m.name for m, at in zip(self.mixers, places) if at is not None and places.count(at) > 1), None
        ):
            raise InputError(
                f"{self.name} holds a recurrent layer more than once ({twice}): an adapter that keeps a copy of whole "
                "layers must be merged first (merge_and_unload), and of two models each is adopted alone"
            )
        for mixer in self.mixers:
            mixer.stand()
        if kernels_there() and self.mixers and isinstance(self.mixers[0], SteppedAdopted):
            self.mixers[0].module.register_forward_pre_hook(self._measure, with_kwargs=True)

    def __repr__(self) -> str:
        trained = "an unknown length" if self.train_length is None else f"{format_length(self.train_length)} tokens"
        remedies = "+".join(str(handle.remedy) for handle in vars(self).get("_remedies", []))
        what = f"{counted(len(self.mixers), 'recurrent layer')}, trained at {trained}"
        return f"<Adopted {type(self.model).__name__} {self.name!r}: {what}, {remedies or 'no remedy'} on it>"

    @property
    def module(self) -> nn.Module:
        return self.model

    def settings(self) -> list[str]:
        return [
            f"{m.name} limits dt in single tokens"
            for m in self.mixers
            if isinstance(m, SteppedAdopted) and m.limit_in_decode
        ]

    @property
    def scan_state_elements(self) -> int:
        return sum(m.heads * m.headdim * m.d_state for m in self.mixers)

    @property
    def conv_state_elements(self) -> int:
        convs = [m.conv for m in self.mixers if m.conv is not None]
        return sum(c.in_channels * (c.kernel_size[0] - 1) for c in convs)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    @property
    def backend(self) -> str:
        """The scan that the present policies choose here; the library's name where its own runs."""
        names = set()
        for m in self.mixers:
            dtype = compute_dtype(self.dtype, m.state_dtype)
            stepped = isinstance(m, SteppedAdopted)
            call = Call(self.device, dtype, m.per_channel, m.headdim, m.d_state, stepped)
            chosen = m.recurrence.backends.choose(m.policy, m.backend, call) if m.active else None
            names.add(self.library if chosen is None else chosen.name)
        return "+".join(sorted(names))

    @property
    def vocab_size(self) -> int:
        return getattr(self.config, "vocab_size", None) or self.embedding.num_embeddings

    def state_size(self) -> StateSize:
        fixed = {"scan": self.scan_state_elements, "conv": self.conv_state_elements}
        return StateSize(fixed, self._attention_size() if self.attends else 0)

    def _attention_size(self) -> int:
        """Return how many numbers of keys and values all layers of attention together keep for a token."""
        recurrent = {mixer.module for mixer in self.mixers}
        return attention_layers(self.config) * widest_attention(m for m in self.model.modules() if m not in recurrent)

    def use_backend(self, name: str | None) -> None:
        """Force one scan backend for every layer (None: choose), wherever a policy is active."""
        for mixer in self.mixers:
            mixer.recurrence.backends.choose(PLAIN, name)
        for mixer in self.mixers:
            mixer.backend = name

    @property
    def attends(self) -> bool:
        """Whether attention stands beside the recurrence: a hybrid keeps keys and values, a pure model states alone."""
        return self.hybrid and self._attention

    @property
    def hybrid(self) -> bool:
        """Whether it is of a family of hybrids, though all its own layers may be recurrent."""
        return not self._takes.isdisjoint(("past_key_values", "position_ids"))

    rotary: tuple[RotaryMixer, ...] = ()  # its own library's to scale

    @property
    def rotary_scaling(self) -> str | None:
        return (getattr(self.config, "rope_parameters", None) or {}).get("rope_type")

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """What the library's own generate ends an answer with."""
        return getattr(getattr(self.model, "generation_config", None) or self.config, "eos_token_id", None)

    @cached_property
    def _attention(self) -> bool:
        return attention_layers(self.config) > 0

    @property
    def state_dtype(self) -> torch.dtype | None:
        return self.mixers[0].state_dtype

    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Keep states in another type, as `LM.use_state_dtype` does, in the model's own forward and generate too: our
        scan runs then, under any policy."""
        checked = state_dtype(dtype, self.dtype)
        for mixer in self.mixers:
            mixer.state_dtype = checked

    def refuse_own(self, ways: str) -> None:
        """Let the library's own forward and generate raise InputError: remedies are on that are ways to read, and only
        our reading follows them. ways: their names; none lets it work again."""
        while self._guards:
            self._guards.pop().remove()
        self._ways = ways
        guarded = (self.base, self.first_layer) if ways else ()
        refuse = torch.compiler.disable(self._refuse) if guarded else self._refuse  # (it imports all of the compiler)
        self._guards = [module.register_forward_pre_hook(refuse) for module in guarded]

    @property
    def first_layer(self) -> nn.Module:
        """A module that every call of the model goes through: one of base.forward passes the hooks of base itself
        by."""
        return self.mixers[0].module

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let parts of the library's model be called, whatever `refuse_own` refuses: it is we who read."""
        ours = _reading.set(True)
        try:
            yield
        finally:
            _reading.reset(ours)

    def _refuse(self, module: nn.Module, args: Any) -> None:
        if not _reading.get():
            raise InputError(
                f"{self._ways} is on {self.name} and is a way to read, which its own forward and generate do not "
                "follow: read with rnn_longctx.generate or rnn_longctx.evaluate, or remove() it"
            )

    @property
    def embedding(self) -> Any:
        if not hasattr(self.model, "get_input_embeddings"):
            self._readable()
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Any:
        """The map from hidden states to logits, or None."""
        return self.model.get_output_embeddings()

    @property
    def d_model(self) -> int:
        return self.config.hidden_size

    @property
    def device(self) -> torch.device:
        weight = getattr(self.embedding, "weight", None)
        return computed_on(self.embedding, weight if isinstance(weight, Tensor) else next(self.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding's weights; where those are packed, of the first parameter that is not."""
        weights = itertools.chain([getattr(self.embedding, "weight", None)], self.parameters())
        return next((d for d in map(computes_in, weights) if d is not None), torch.float32)

    # --- reading

    def __call__(
        self, ids: Tensor, cache: AdoptedCache | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        return self.forward(ids, cache, mask, reset)

    def forward(
        self, ids: Tensor, cache: AdoptedCache | None = None, mask: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        """Read ids (B, T) and return the hidden states (B, T, d_model) after the last norm.

        Args:
            cache: what the stream has read so far; it is moved on in place. None starts and forgets a stream.
            mask: (B, T) bool, False at left padding (only before a row's first token).
            reset: (B, T) bool, True where a new document begins. Each is read as a row of its own, in its own call of
                the model, so that documents cost what they would unpacked.
        """
        cache = cache if cache is not None else self.new_cache()
        if mask is not None and bool(mask.all()):
            mask = None
        if reset is not None and bool(reset.any()):
            if mask is not None or self.restart is not None:
                raise InputError("documents packed into one row go with no padding and no control in an adopted model")
            return read_packed(self.read, self.new_cache, ids, cache, reset)
        if self.restart is not None:
            if mask is not None or len(set(cache.position.tolist())) > 1:
                raise InputError(f"the control {self.restart} needs rows of equal lengths in an adopted model")
            return read_restarting(self.hooked_read(), self.restart, ids, cache, None)
        return self.hooked_read()(ids, cache, mask)

    def read(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None = None) -> Tensor:
        """Read as `forward` does, without the reader's control, in calls no longer than `longest`."""
        self._readable()
        batch, length = ids.shape
        most = longest(self, batch)
        if most is None or length <= most:
            return self._read(ids, cache, mask)
        hidden = []
        for t in range(0, length, most):
            some = None if mask is None or bool(mask[:, t : t + most].all()) else mask[:, t : t + most]
            hidden.append(self._read(ids[:, t : t + most], cache, some))
        return torch.cat(hidden, 1)

    def _readable(self) -> None:
        """Raise InputError where our reading would not equal the model's own forward, as that is now."""
        if reason := unreadable(self.model):
            raise InputError(f"{reason}: mitigate it, and read with its own forward")

    def _read(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None) -> Tensor:
        """Read in one call of the library."""
        batch, length = ids.shape
        if cache.torn:
            raise InputError(
                "a call on this cache broke off, and its layers have read different tokens: start a new one, or keep a "
                "clone() before calls that may fail"
            )
        if cache.seen and len(cache.position) != batch:
            raise InputError(f"the cache holds {counted(len(cache.position), 'row')}, the ids {batch}")
        if not length:
            return torch.zeros(batch, 0, self.d_model, dtype=self.dtype, device=self.device)
        before = cache.position if cache.seen else torch.zeros(batch, dtype=torch.int64, device="cpu")
        padding = cache.padding if cache.padding is not None else torch.zeros(batch, dtype=torch.int64, device="cpu")
        read = torch.full((batch,), length, device="cpu") if mask is None else mask.sum(1).cpu()
        if mask is not None:
            begun = torch.arange(length, device="cpu") >= length - read[:, None]
            if bool((begun != mask.cpu().bool()).any()) or bool(((read < length) & (before > 0)).any()):
                raise InputError("padding may stand only before a row's first token (left padding)")
            if length == 1:
                raise InputError("padding is read together with at least one token more: the library does not mask one")
            padding = padding + length - read
        try:
            with self.reading():
                hidden = self._call(ids, cache, mask, before, padding)
        except BaseException:
            cache.torn = cache.seen > 0
            if not cache.torn:
                cache.library = None
            raise
        cache.seen, cache.padding, cache.position = cache.seen + length, padding, before + read
        return hidden

    def _call(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None, before: Tensor, padding: Tensor) -> Tensor:
        """Let the library read ids (B, T), T > 0, and move its cache on. before, padding: (B,) on the CPU, tokens read
        before and columns of padding up to here."""
        total = cache.seen + ids.shape[1]
        inputs: dict[str, Any] = {}
        key = cache_name(self.base)
        if bool(padding.any()) and (self.attends or mask is not None):
            # a pure model's mask is of this call's tokens, a hybrid's of all
            columns = torch.arange(cache.dropped if self.attends else cache.seen, total, device="cpu")
            inputs["attention_mask"] = (columns >= padding[:, None]).long().to(ids.device)
        if "position_ids" in self._takes:  # some families count a cached call's tokens from 0
            at = (torch.arange(cache.seen, total, device="cpu") - padding[:, None]).clamp(min=0)
            inputs["position_ids"] = at.to(ids.device)
        if cache.library is None and self.hybrid and not self._attention:
            cache.library = unattended()(config=self.config)
        if cache.seen:
            self.place_rows(cache, before)
        out = self.base(input_ids=ids, use_cache=True, return_dict=True, **{key: cache.library}, **inputs)
        if (library := self.moved_on(out, cache.library)) is None:  # checkpointed layers in training mode
            raise InputError(f"{self.name} keeps no cache where gradient checkpointing is on in training: model.eval()")
        cache.library = library
        return out[0]

    def place_rows(self, cache: AdoptedCache, before: Tensor) -> None:
        """Say where the rows stand, to the mixers that count them: before (B,) on the CPU, tokens read."""
        for mixer in self.mixers:
            if mixer.active:
                mixer.place(mixer.layer_of(cache.library), before)

    def moved_on(self, out: Any, library: Any) -> Any:
        """Return the library's cache after a call that gave `out` and was handed `library`; None: there is none."""
        return out.get(cache_name(self.base))

    def _measure(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Warn once of a call too long for the kernels of mamba-ssm: a person's own, since ours are cut."""
        if self._warned or torch.compiler.is_compiling() or all(mixer.active for mixer in self.mixers):
            return
        u = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3), None)
        if u is not None and (warning := too_long(self, *u.shape[:2])):
            self._warned = True
            warnings.warn(warning, RuntimeWarning, stacklevel=2)

    def stream(self, ids: Tensor, cache: AdoptedCache | None = None, segment: int = 4096) -> Iterator[Tensor]:
        """Yield the hidden states of ids (B, T), or (T), a segment at a time, in the memory of one (and attention's
        cache)."""
        ids, cache = rows_of(ids), self.new_cache() if cache is None else cache
        for t in range(0, ids.shape[1], segment):
            yield self(ids[:, t : t + segment].to(self.device), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., vocab) float32 from hidden states (..., d_model)."""
        head = self.head
        if head is None:
            raise InputError(f"{type(self.model).__name__} has no head for logits: load it as a causal language model")
        logits = head(hidden.to(computes_in(getattr(head, "weight", None)) or hidden.dtype))
        if (factor := getattr(self.config, "lm_head_multiplier", None)) is not None:  # FalconH1
            logits = logits * factor
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:  # GraniteMoeHybrid
            logits = logits / divisor
        if (cap := getattr(self.config, "logits_soft_cap", None)) is not None:  # RecurrentGemma
            logits = torch.tanh(logits / cap) * cap
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return -log p(target) in nats, (B, T), from hidden states (B, T, d_model); never all logits at once. A target
        of -100 is ignored: 0, without a gradient."""
        return token_losses(self.logits, self.config.vocab_size, hidden, targets)

    def new_cache(self) -> AdoptedCache:
        return AdoptedCache(self.mixers)

    def layer_by_layer(self) -> LayerByLayer | None:
        if self.hybrid:
            return None
        return AdoptedBlocks(self.base, self.new_cache(), self.reading, lambda rows: longest(self, rows))
