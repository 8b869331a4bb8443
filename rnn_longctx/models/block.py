"""What mixers are stacked into: residual layers with a norm each, embeddings before, a norm behind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.models.deferred import DeferredNorm
from rnn_longctx.models.interface import Mixer, Shape
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.norm import LayerNorm, RMSNorm

# What a layer gives, to be added to the residual together with the norm that comes next.
Output = Tensor | DeferredNorm | None


Norm = RMSNorm | LayerNorm


def norm_of(config: Shape) -> Norm:
    """Return a norm of the residual, of the kind that the model has."""
    return {"rms": RMSNorm, "layer": LayerNorm}[config.norm](config.d_model, config.norm_eps)


class MLP(nn.Module):
    """A gated MLP (SwiGLU): down(silu(gate(u)) * up(u))."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        gate_up = self.gate_up(u)
        if choose.fuses_layers(gate_up):
            from rnn_longctx.models.kernels.swiglu import swiglu

            return self.down(swiglu(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """A layer: h <- h + mixer(norm(h)), and with an MLP h <- h + mlp(norm2(h)).

    Every sum is made together with the norm after it."""

    norm: Norm
    mixer: Mixer
    norm2: Norm | None
    mlp: MLP | None

    def __init__(self, config: Shape, mixer: Mixer):
        super().__init__()
        self.norm = norm_of(config)
        self.mixer = mixer
        # (registered even where there is none, so that such a block is what it was before there were any)
        self.register_module("norm2", norm_of(config) if config.mlp else None)
        self.register_module("mlp", MLP(config.d_model, round(config.mlp * config.d_model)) if config.mlp else None)

    def feed_forward(self, h: Tensor, out: Output, in_fp32: bool) -> tuple[Tensor, Output]:
        """Return the residual and what is still to be added to it, after the MLP, if there is one."""
        if self.norm2 is None or self.mlp is None:
            return h, out
        normed, h = self.norm2.add(h, out, in_fp32)
        return h, self.mlp(normed)


class Backbone(nn.Module):
    def __init__(self, config: Shape):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in config.make_mixers())
        self.norm_f = norm_of(config)
