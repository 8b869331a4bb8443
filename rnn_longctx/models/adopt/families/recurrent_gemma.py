"""Recurrent blocks of transformers' RecurrentGemma (Griffin's RG-LRU, arXiv 2402.19427) under our policies.

Every channel is a head of headdim and d_state 1 that decays by itself, and what is written follows from the decay:

    S_t = a_t S_{t-1} + sqrt(1 - a_t^2) i_t x_t,   log a_t = -8 r_t softplus(recurrent_param),   y_t = S_t

where r and i are gates of x. A token at position 0 begins a document: nothing of the state before is left, and all of
i x is written. So does a row's first token after padding, of which a block sees what attention's mask says of it.

The library keeps states on the modules, for one stream at a time, and the layers of its cache that are made for them
stay empty (transformers 5.24). As soon as a block is adopted they are there, without a policy too: on the module they
are for the time of a call alone. A cached call of several tokens, whose convolution the library begins anew, and rows
with padding, which its convolution and its scan read whatever the mask says, are ours always. A remedy is not to look
better for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.beside import following
from rnn_longctx.models.adopt.cache import AdoptedCache, cache_in
from rnn_longctx.models.adopt.dispatch import grows, pads_explained, read_mask, static_attention
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import AdoptedMixer, Call
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.conv import linear_conv, unadapted
from rnn_longctx.models.hashing import held
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.ssd.scan import SSD


class RecurrentGemmaMixer(AdoptedMixer):
    """A recurrent block, whose channels are heads with a state of one number; see `AdoptedMixer`."""

    recurrence: Recurrence = SSD
    stays = True
    no_rates = "ties what it writes to its decays, by sqrt(1 - a^2)"

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module, name)
        place = name.split(".")[-2:-1]  # (layers.3.temporal_block: the block itself does not know)
        if not place or not place[0].isdigit():
            raise InputError(f"{name or type(module).__name__} is a block alone: give the model whose layer it is")
        self.place_in_cache = int(place[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.lru_width, 1, 1

    @property
    def conv(self) -> nn.Module:
        return self.module.conv_1d

    def layer_of(self, library: Any) -> Any:
        return library.layers[self.place_in_cache]

    def state_of(self, layer: Any) -> Tensor:
        return layer.recurrent_states[0][..., None, None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block's own forward with the states of this stream, or ours: where `active`, and where the library's
        would be wrong (see above)."""
        arguments = self.arguments(args, kwargs)
        u, cache = arguments["input_states"], cache_in(arguments)
        if self.active:
            grows(self, cache)
        static = static_attention(cache)  # (whose columns are not those of the tokens read; generate gives positions)
        mask = None if static else read_mask(arguments["attention_mask"], u)
        begins = arguments["position_ids"].expand(u.shape[:2]) == 0
        if mask is not None:
            begins = begins | F.pad(mask[:, 1:] & ~mask[:, :-1], (1, 0))
        layer: Any = None if cache is None else self.layer_of(cache)
        if layer is not None and not static and not hasattr(layer, "beside"):
            layer.__class__ = following(type(layer))  # type: ignore[arg-type]  # (its states move with its rows)
        begun = layer is not None and layer.has_previous_state[0]
        several = u.shape[1] > 1
        if self.active or (several and (begun or bool(begins[:, 1:].any()))):
            with pads_explained(mask):
                return self._read(u, begins, mask, layer, begun), None
        if layer is None:
            return self.original("forward")(*args, **kwargs)
        m = self.module
        m.conv1d_state, m.rg_lru.recurrent_states = (
            (layer.conv_states[0], layer.recurrent_states[0]) if begun else (None, None)
        )
        out = self.original("forward")(*args, **kwargs)
        _put(layer, m.conv1d_state, m.rg_lru.recurrent_states)
        m.conv1d_state = m.rg_lru.recurrent_states = None
        return out

    @torch.compiler.disable
    def _read(self, u: Tensor, begins: Tensor, mask: Tensor | None, layer: Any, begun: bool) -> Tensor:
        """Read u (B, T, d_model), whose documents begin where begins (B, T) is True, as the library's forward does, but
        for what is padding: mask (B, T) is False there."""
        m = self.module
        unadapted(m.conv_1d)
        weight, bias = (held(m.conv_1d, name).to(u.device) for name in ("weight", "bias"))
        x = m.linear_x(u)
        if mask is not None:
            x = x * mask[..., None]
        x, conv = linear_conv(x, weight, bias, layer.conv_states[0] if begun else None, begins)
        i, r = (self._gate(x, name) for name in ("input_gate", "recurrent_gate"))
        log_decay = -8.0 * r * F.softplus(held(m.rg_lru, "recurrent_param")).to(x.device)
        log_decay = log_decay.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.where(begins[..., None], 1.0, _root(-torch.expm1(2 * log_decay)))
        ones = x.new_ones(*x.shape[:2], 1, 1)
        y, state = self.read(
            Call(self, layer, mask, not begun),
            ScanInputs((x * i)[..., None], ones, ones),
            Gates(log_decay, scale),
            self.state_of(layer) if begun else None,
            reset=begins if begun else F.pad(begins[:, 1:], (1, 0)),
        )
        if layer is not None:
            _put(layer, conv, state[..., 0, 0])
        return m.linear_out(y[..., 0] * m.act_fn(m.linear_y(u)))

    def _gate(self, x: Tensor, name: str) -> Tensor:
        """Return a gate (B, T, channels) of x, whose channels it mixes block by block."""
        weight, bias = (held(self.module.rg_lru, f"{name}_{what}").to(x.device) for what in ("weight", "bias"))
        mixed = torch.einsum("bthi,hij->bthj", x.unflatten(-1, weight.shape[:2]), weight) + bias
        return mixed.sigmoid().flatten(2)


class AdoptedRecurrentGemma(Adopted):
    """A RecurrentGemma as a stream. Its output does not say the cache, which it moves on all the same."""

    def __init__(self, model: nn.Module, mixers: list[AdoptedMixer]):
        from transformers import DynamicCache

        super().__init__(model, mixers)
        library = DynamicCache(config=self.config)
        if not all(hasattr(mixer.layer_of(library), "recurrent_states") for mixer in mixers):
            raise InputError(f"{self.name} needs a transformers whose cache has layers for its states: 5.24 has them")

    def state_size(self) -> StateSize:
        size = super().state_size()
        return StateSize(size.fixed, windows={self.config.sliding_window - 1: size.per_token})

    def _call(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None, before: Tensor, padding: Tensor) -> Tensor:
        if cache.library is None and self.attends:
            from transformers import DynamicCache

            cache.library = DynamicCache(config=self.config)
        return super()._call(ids, cache, mask, before, padding)

    def moved_on(self, out: Any, library: Any) -> Any:
        return library if self.mixers[0].layer_of(library).has_previous_state[0] else None


def _root(x: Tensor) -> Tensor:
    """Return the square root, with the library's bound on its gradient."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import SqrtBoundDerivative

    return SqrtBoundDerivative.apply(x)


def _put(layer: Any, conv: Tensor, state: Tensor) -> None:
    """Put the convolution's inputs (B, channels, taps - 1) and the state (B, channels) into a layer."""
    layer.conv_states[0], layer.recurrent_states[0] = conv, state
    layer.is_conv_states_initialized[0] = layer.is_recurrent_states_initialized[0] = True
    layer.has_previous_state[0], layer.dtype, layer.device = True, conv.dtype, conv.device


def is_recurrent_gemma(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("rg_lru", "conv_1d", "linear_x", "linear_y", "lru_width"))


FAMILIES.register(Family("recurrent_gemma", is_recurrent_gemma, RecurrentGemmaMixer, AdoptedRecurrentGemma))
