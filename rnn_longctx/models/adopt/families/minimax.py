"""Lightning attention of transformers' MiniMax under our policies.

Linear attention without a normaliser, whose heads each decay at a rate of their own that never changes:

    S_t = exp(-slope) S_{t-1} + v_t k_t^T,   y_t = S_t q_t

It is all in one forward, so that ours stands in the place of the whole of it. The states lie in a cache of the
library's own, beside its layers, where beam search and `reset` leave them as they are and the positions of a model
whose first layer is recurrent stay 0 (transformers 5.24): as soon as an adopted layer reads, that cache holds its
states in layers as every other family's does, without a policy too. A remedy is not to look better for it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.beside import following
from rnn_longctx.models.adopt.cache import AdoptedCache, cache_in
from rnn_longctx.models.adopt.dispatch import pads_explained
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import AdoptedMixer, Call
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.hashing import held
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.interface import Recurrence
from rnn_longctx.recurrence.ssd.scan import SSD

PARTS = ("slope_rate", "qkv_proj", "output_gate", "out_proj", "num_attention_heads", "head_dim")


class MiniMaxMixer(AdoptedMixer):
    """A layer of lightning attention, with a fixed decay a head; see `AdoptedMixer`. Its state is the transpose of the
    library's (B, H, K, V)."""

    recurrence: Recurrence = SSD
    stays = True
    no_rates = "has decays that are fixed"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.num_attention_heads, self.module.head_dim, self.module.head_dim

    def state_of(self, layer: Any) -> Tensor:
        return layer.recurrent_states[0].transpose(-1, -2)

    def put_state(self, layer: Any, state: Tensor) -> None:
        layer.recurrent_states[0] = state.transpose(-1, -2).contiguous()

    def conv_of(self, library: Any) -> None:
        """Return None: there is no convolution."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer's own forward, or ours where `active`; the cache becomes one that holds states in layers.

        Raises:
            InputError: `active`, and the cache was begun before the model was adopted.
        """
        arguments = self.arguments(args, kwargs)
        cache, u = cache_in(arguments), arguments["hidden_states"]
        if cache is not None and _begun(cache):
            if self.active:
                raise InputError(
                    f"{self.name}: the cache holds tokens read before the model was adopted, and MiniMax's own counts "
                    "none where its first layer is recurrent: start a new cache"
                )
            return self.original("forward")(*args, **kwargs)
        layer = None if cache is None else _layer(cache, self.module.layer_idx)
        if self.active:
            return self._read(u, arguments.get("attention_mask"), layer)
        if (
            layer is not None and layer.has_previous_state[0]
        ):  # (ours are wider than the numbers of a model in bfloat16)
            layer.recurrent_states[0] = layer.recurrent_states[0].to(u.dtype)
        return self.original("forward")(*args, **kwargs)

    @torch.compiler.disable
    def _read(self, u: Tensor, mask: Tensor | None, layer: Any) -> tuple[Tensor, Tensor]:
        """Read u (B, T, d_model), mask (B, T), as the library's forward does, and return what it does: the output, and
        the state (B, H, K, V)."""
        m, (heads, width, _) = self.module, self.shape
        qkv = m.act_fn(m.qkv_proj(u))
        if mask is not None:
            qkv = qkv * mask[..., None].to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (heads, 3 * width)).split(width, -1)
        slope = held(m, "slope_rate").flatten().to(u.device)
        log_decay = -slope.to(torch.promote_types(slope.dtype, torch.float32)).expand(*u.shape[:2], heads)
        fresh = layer is None or not layer.has_previous_state[0]
        call = Call(self, layer, None if mask is None else mask.bool(), fresh)
        with pads_explained(mask):
            y, state = self.read(
                call,
                ScanInputs(v, k, q),
                Gates(log_decay, torch.ones_like(log_decay)),
                None if fresh else self.state_of(layer),
            )
        state = state.transpose(-1, -2).contiguous()
        if layer is not None:
            _put(layer, state)
        return m.out_proj(F.sigmoid(m.output_gate(u)) * m.norm(y.flatten(2))), state


class AdoptedMiniMax(Adopted):
    """A MiniMax as a stream. Several tokens that follow others are read by our scan under any policy: the library's own
    forward reads them one after the other."""

    def _call(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None, before: Tensor, padding: Tensor) -> Tensor:
        if cache.library is None:
            cache.library = layered()()
        several = self.mixers if cache.seen and ids.shape[1] > 1 else ()
        try:
            for mixer in several:
                mixer.continue_stream(True)
            return super()._call(ids, cache, mask, before, padding)
        finally:
            for mixer in several:
                mixer.continue_stream(False)


@functools.cache
def layered() -> Any:
    """Return the class of a MiniMaxCache that holds its states in layers, which move with the rows."""
    from transformers import DynamicCache
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    class Layered(MiniMaxCache):
        batch_repeat_interleave = DynamicCache.batch_repeat_interleave
        batch_select_indices = DynamicCache.batch_select_indices

        def get_linear_cache(self, layer_idx: int) -> Tensor | None:
            layer = _layer(self, layer_idx)
            return layer.recurrent_states[0] if layer.has_previous_state[0] else None

        def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
            _put(_layer(self, layer_idx), linear_cache)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return super().get_seq_length(layer_idx) if self._attends else 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return super().get_mask_sizes(query_length, layer_idx) if self._attends else (query_length, 0)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuild, (), self.__dict__

        @property
        def _attends(self) -> bool:
            return not all(self.is_linear)

    return Layered


def _rebuild() -> Any:
    return object.__new__(layered())


@torch.compiler.disable
def _begun(cache: Any) -> bool:
    """Whether a MiniMaxCache holds states that were put there before the model was adopted."""
    return not isinstance(cache, layered()) and any(isinstance(state, Tensor) for state in cache.linear_cache)


@torch.compiler.disable
def _layer(cache: Any, layer_idx: int) -> Any:
    """Return the layer of a MiniMaxCache that holds the states of a recurrent layer; the cache becomes one that has
    such layers."""
    from transformers.cache_utils import LinearAttentionLayer

    if not isinstance(cache, layered()):
        cache.__class__ = layered()
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if not hasattr(cache.layers[layer_idx], "recurrent_states"):
        cache.layers[layer_idx] = following(LinearAttentionLayer)()
    return cache.layers[layer_idx]


def _put(layer: Any, state: Tensor) -> None:
    """Put a state as the library shapes it, (B, H, K, V), into a layer."""
    if not layer.is_recurrent_states_initialized[0]:
        layer.lazy_initialization(recurrent_states=state)
        layer.dtype, layer.device = state.dtype, state.device
    layer.recurrent_states[0], layer.has_previous_state[0] = state, True


def is_lightning_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in PARTS)


FAMILIES.register(Family("minimax", is_lightning_attention, MiniMaxMixer, AdoptedMiniMax))
