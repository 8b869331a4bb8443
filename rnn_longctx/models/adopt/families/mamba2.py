"""Mamba-2 mixers of transformers (Mamba2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH, Zamba2) under our policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.dispatch import DispatchedMixer, no_shortcut
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import UNLIMITED, Call
from rnn_longctx.models.adopt.wrapped import holds


class Mamba2Mixer(DispatchedMixer):
    """See `AdoptedMixer`."""

    @staticmethod
    def functions() -> dict[str, Callable]:
        return {
            "mamba2_chunk_scan": _scan,
            "mamba2_selective_state_update": _step,
            "mamba2_split_conv1d_scan_combined": no_shortcut,
        }


def _scan(call: Call, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
          initial_states: Tensor | None = None, dt_limit: tuple[float, float] = UNLIMITED,
          return_final_states: bool = False, z: Tensor | None = None, seq_idx: Tensor | None = None,
          cu_seqlens: Tensor | None = None, **_: Any) -> Any:  # fmt: skip
    if cu_seqlens is not None and seq_idx is None:
        raise InputError("packed sequences need seq_idx beside cu_seqlens")
    y, state = call.mixer.read(call, hidden_states, dt, B, C, initial_states, dt_limit, seq_idx)
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_final_states else y


def _step(call: Call, state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
          D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
          z: Tensor | None = None, **_: Any) -> Tensor:  # fmt: skip
    # One head's dt, D and dt_bias come repeated headdim times. The library's step ignores the limit of dt.
    limit = call.mixer.dt_limit if call.mixer.limit_in_decode else UNLIMITED
    y, new = call.mixer.read(
        call, hidden_states[:, None], dt[:, None, :, 0], B[:, None], C[:, None], state, limit, None
    )
    state.copy_(new)
    return y[:, 0] if z is None else y[:, 0] * F.silu(z)


def has_mamba2_parts(module: nn.Module) -> bool:
    """Whether a module looks like a Mamba-2 mixer of any library: isinstance across families fails."""
    return holds(module, "A_log", 1) and all(hasattr(module, part) for part in ("dt_bias", "in_proj", "conv1d"))


def is_mamba_ssm(module: nn.Module) -> bool:
    """Whether it is a Mamba-2 mixer of mamba_ssm, by the names that it alone gives its shape."""
    names = ("nheads", "headdim", "d_state", "dt_limit")
    return has_mamba2_parts(module) and all(hasattr(module, name) for name in names)


FAMILIES.register(Family("mamba2", lambda module: has_mamba2_parts(module) and not is_mamba_ssm(module), Mamba2Mixer))
