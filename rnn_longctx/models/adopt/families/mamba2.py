"""Mamba-2 mixers of transformers (Mamba2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH, Zamba2) under our policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.dispatch import DispatchedMixer, no_shortcut
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import Call
from rnn_longctx.models.adopt.stepped import UNLIMITED, SteppedAdopted
from rnn_longctx.models.adopt.wrapped import holds
from rnn_longctx.recurrence.gates import ScanInputs


class Mamba2Mixer(SteppedAdopted, DispatchedMixer):
    """A mixer with one step a head; see `AdoptedMixer`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.num_heads, self.module.head_dim, self.module.ssm_state_size

    @staticmethod
    def functions() -> dict[str, Callable]:
        return {
            "mamba2_chunk_scan": _scan,
            "mamba2_selective_state_update": _step,
            "mamba2_split_conv1d_scan_combined": no_shortcut,
        }


def _scan(
    call: Call,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    dt_limit: tuple[float, float] = UNLIMITED,
    return_final_states: bool = False,
    z: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> Any:
    if cu_seqlens is not None and seq_idx is None:
        raise InputError("packed sequences need seq_idx beside cu_seqlens")
    mixer: Any = call.mixer
    inputs = ScanInputs(hidden_states, B, C, mixer.D)
    y, state = mixer.read(call, inputs, mixer.gates(dt, dt_limit), initial_states, seq_idx)
    if z is not None:
        y = y * F.silu(z)
    return (y, state) if return_final_states else y


def _step(
    call: Call,
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **_: Any,
) -> Tensor:
    # One head's dt, D and dt_bias come repeated headdim times. The library's step ignores the limit of dt.
    mixer: Any = call.mixer
    limit = mixer.dt_limit if mixer.limit_in_decode else UNLIMITED
    inputs = ScanInputs(hidden_states[:, None], B[:, None], C[:, None], mixer.D)
    y, new = mixer.read(call, inputs, mixer.gates(dt[:, None, :, 0], limit), state)
    state.copy_(new)
    return y[:, 0] if z is None else y[:, 0] * F.silu(z)


def has_mamba2_parts(module: nn.Module) -> bool:
    """Whether a module looks like a Mamba-2 mixer of any library: isinstance across families fails."""
    return holds(module, "A_log", 1) and all(hasattr(module, name) for name in ("dt_bias", "in_proj", "conv1d"))


def is_mamba_ssm(module: nn.Module) -> bool:
    """Whether it is a Mamba-2 mixer of mamba_ssm, by the names that it alone gives its shape."""
    names = ("nheads", "headdim", "d_state", "dt_limit")
    return has_mamba2_parts(module) and all(hasattr(module, name) for name in names)


FAMILIES.register(Family("mamba2", lambda module: has_mamba2_parts(module) and not is_mamba_ssm(module), Mamba2Mixer))
