"""Mixers of transformers that are read by the delta rule: what Gated DeltaNet's and KDA's have in common.

Their functions take queries, keys and values (B, T, heads, channels), log-decays and beta, and a state (B, H, K, V):
ours is its transpose. Queries and keys are brought to length 1 here, and queries scaled, as these functions do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.dispatch import DispatchedMixer
from rnn_longctx.models.adopt.mixer import Call
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.interface import Recurrence

EPS = 1e-6  # of a key's squared length


class DeltaAdopted(DispatchedMixer):
    """A mixer that is read by the delta rule; see `AdoptedMixer`. Its beta is given beside the decay, by no step."""

    recurrence: Recurrence = DELTA

    def state_of(self, layer: Any) -> Tensor:
        return layer.recurrent_states[0].transpose(-1, -2)

    def put_state(self, layer: Any, state: Tensor) -> None:
        layer.recurrent_states[0] = state.transpose(-1, -2).contiguous()


def delta_rule(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    seq_idx: Tensor | None = None,
    **packed: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand for a modeling file's functions that read many tokens and one: query and key (B, T, G, K), value
    (B, T, H, V), log-decays g (B, T, H) or (B, T, H, K), beta (B, T, H), initial_state (B, H, K, V).

    Returns:
        y (B, T, H, V) in value's type, and the state after it.
    """
    if seq_idx is None and any(packed.get(name) is not None for name in ("cu_seqlens", "cu_seq_lens_q")):
        raise InputError("packed sequences need seq_idx beside cu_seq_lens_q: the convolution keeps them apart by it")
    wide = torch.promote_types(value.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    if use_qk_l2norm_in_kernel:
        query, key = _normalised(query), _normalised(key)
    query = query * key.shape[-1] ** -0.5
    inputs = ScanInputs(value, key.to(value.dtype), query.to(value.dtype))
    state = None if initial_state is None else initial_state.transpose(-1, -2)
    y, new = call.mixer.read(call, inputs, DeltaGates(g, beta), state, seq_idx)
    return y, new.transpose(-1, -2).contiguous() if output_final_state else None


def _normalised(t: Tensor) -> Tensor:
    return t * torch.rsqrt((t * t).sum(-1, keepdim=True) + EPS)
