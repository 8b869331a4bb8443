"""Gated DeltaNet mixers of transformers (Qwen3Next, Qwen3.5, OlmoHybrid and their relatives) under our policies.

One decay a head and token, log_decay = -exp(A_log) softplus(a + dt_bias), and beta, which is a map of its own: what is
written and erased hangs on no step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rnn_longctx.models.adopt.delta import DeltaAdopted, delta_rule
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.wrapped import holds
from rnn_longctx.models.hashing import held

PARTS = ("dt_bias", "conv1d", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


class GatedDeltaMixer(DeltaAdopted):
    """A mixer with one decay a head, whose keys and queries may be shared by groups of heads; see `AdoptedMixer`."""

    @staticmethod
    def functions() -> dict[str, Callable]:
        return dict.fromkeys(("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"), delta_rule)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.num_v_heads, self.module.head_v_dim, self.module.head_k_dim

    @property
    def A(self) -> Tensor:
        """The rates, -exp(A_log): (H) float32."""
        return -held(self.module, "A_log").detach().float().exp()


def is_gated_delta_net(module: nn.Module) -> bool:
    return holds(module, "A_log", 1) and all(hasattr(module, name) for name in PARTS)


FAMILIES.register(Family("gated_delta_net", is_gated_delta_net, GatedDeltaMixer))
