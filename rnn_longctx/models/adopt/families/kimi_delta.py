"""Kimi delta attention (KDA) mixers of transformers (KimiLinear, BailingHybrid, Glm5Next) under our policies.

Every channel of a key decays by itself, by one of two gates of x = f(u) + dt_bias:

    log_decay = -exp(A_log) softplus(x)               Kimi Linear's: a rate times a step
    log_decay = bound sigmoid(exp(A_log) x)           with a lower bound, as GLM's and Ling's have: no rate scales it
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rnn_longctx.models.adopt.delta import DeltaAdopted, delta_rule
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.hashing import held

PARTS = ("forget_gate", "b_proj", "conv1d", "num_heads", "head_dim")


class KimiDeltaMixer(DeltaAdopted):
    """A mixer with a decay for every channel of its keys; see `AdoptedMixer`."""

    per_channel = True

    @staticmethod
    def functions() -> dict[str, Callable]:
        return dict.fromkeys(("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"), delta_rule)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.num_heads, self.module.head_dim, self.module.head_dim

    @property
    def lower_bound(self) -> float | None:
        """The least log-decay of a token, or None where there is none."""
        gate = self.module.forget_gate
        if hasattr(gate, "safe_gate"):  # (Ling's)
            return gate.lower_bound if gate.safe_gate else None
        return getattr(gate, "safe_gate_lower_bound", None)

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.lower_bound is not None

    @property
    def no_rates(self) -> str:
        return "bounds its log-decays by a sigmoid"

    @property
    def A(self) -> Tensor | None:
        """The rates, -exp(A_log): (H) float32; None under a lower bound, where scaling A scales no log-decay."""
        if self.bounded:
            return None
        return -held(self.module.forget_gate, "A_log").detach().float().exp().reshape(-1)


def is_kimi_delta(module: nn.Module) -> bool:
    gate = getattr(module, "forget_gate", None)
    return all(hasattr(module, name) for name in PARTS) and hasattr(gate, "A_log") and hasattr(gate, "dt_bias")


FAMILIES.register(Family("kimi_delta", is_kimi_delta, KimiDeltaMixer))
