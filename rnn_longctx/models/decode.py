"""One token at a time on a GPU: a step without Python in it, replayed from a CUDA graph, with policies active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.block import Norm
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import Carry
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2
from rnn_longctx.models.norm import RMSNorm
from rnn_longctx.models.patches import patched
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.ssd import fused


class Decoder:
    """Goes on from a cache: call it with the next tokens (B), get their logits (B, vocab).

    The state lives in buffers of this object from then on; `cache()` copies it out. A layer's policy and the weights
    may be changed between two tokens.

    Raises:
        InputError: `Decoder.refuses` says why.
    """

    def __init__(self, model: LM, cache: Cache):
        if reason := self.refuses(model, cache):
            raise InputError(f"a decoder {reason}")
        self.model, device = model, model.device
        self._token = torch.zeros(len(cache.position), dtype=torch.int64, device=device)
        self._position = cache.position.to(device)
        self._rows = cache.position.clone()
        self._tokens = 0
        convs = [c.conv.to(model.dtype).contiguous() for c in cache.layers]
        self._conv = [(conv.clone(), torch.empty_like(conv)) for conv in convs]  # read from one, written to the other
        self._states = [c.scan.state.clone() for c in cache.layers]
        self._log_decay = [c.scan.log_decay.to(torch.float64).clone() for c in cache.layers]
        self._prepare()

    @staticmethod
    def refuses(model: LM, cache: Cache) -> str | None:
        """Return why a model cannot be stepped here from a cache, or None."""
        if not isinstance(model, LM):
            return "steps this library's own models"
        if not all(type(layer.mixer) is Mamba2 and layer.mlp is None for layer in model.layers):
            return "steps layers of Mamba-2 alone"
        if model.config.norm != "rms":
            return "norms by RMSNorm alone"
        if triton.missing() is not None or not (model.device.type == "cuda" or triton.interpreted()):
            return "needs a CUDA device and Triton"
        if model.dtype not in triton.DTYPES:
            return f"steps bfloat16, float16 and float32, not {model.dtype}"
        if not cache.layers:
            return "goes on from a prompt, and nothing has been read"
        if model.restart is not None:
            return f"does not restart: {model.restart}"
        if model.state_dtype is not None:
            return "keeps states in float32 alone"
        if any(type(layer) is not nn.Linear for layer in _linears(model)):
            return "multiplies by plain weights, and some layers have an adapter"
        if any(patched(module) for module in model.modules()):
            return "calls no module, and some modules have hooks or another forward"
        for mixer, carry in zip(model.mixers, cache.layers):
            policy = mixer.policy
            if mixer.observer is not None:
                return "does not support observers"
            if policy.window is not None or carry.scan.window is not None:
                return "does not support a sliding window"
            if policy.start is not None and policy.reset is not None:
                return "does not support a stored start together with resets"
            if len(policy.caps) > 1:
                return "supports at most one norm cap a layer"
            if policy.caps and mixer.headdim * mixer.d_state > 2**14:
                return "supports norm caps for states of up to 16384 numbers a head"
        return None

    def __call__(self, token: Tensor) -> Tensor:
        with torch.cuda.device_of(self._token):  # graphs and Triton take the current device
            return self._next(token)

    def _next(self, token: Tensor) -> Tensor:
        if self._policies != [m.policy for m in self.model.mixers] or not self._in_place():
            self._prepare()
        self._token.copy_(token)
        turn = self._tokens % 2
        if self.model.device.type != "cuda":
            logits = self._step(turn)
        else:
            if self._graphs[turn] is None:
                self._capture(turn)
            graph, logits = self._graphs[turn]  # type: ignore[misc]
            graph.replay()
        self._tokens += 1
        return logits.to(torch.float32, copy=True)

    def cache(self) -> Cache:
        """Return what was read so far, as a new cache."""
        rows = self._rows + self._tokens
        layers = [
            Carry(conv[self._tokens % 2].clone(), ScanCarry(state.clone(), rows.clone(), log_decay.clone()))
            for conv, state, log_decay in zip(self._conv, self._states, self._log_decay)
        ]
        return Cache(layers, rows)

    def _prepare(self) -> None:
        mixers = self.model.mixers
        self._policies = [m.policy for m in mixers]
        device = self.model.device
        self._tables = [fused.gate_table(m.policy, m.heads, device) for m in mixers]
        self._caps = [fused.cap_table(m.policy, m.heads, device) if m.policy.caps else None for m in mixers]
        held = [(m._parameters, name, p) for m in self.model.modules() for name, p in m._parameters.items()]
        self._weights = [(holder, name, p, p.data_ptr()) for holder, name, p in held if p is not None]
        self._graphs: list[tuple[torch.cuda.CUDAGraph, Tensor] | None] = [None, None]

    def _in_place(self) -> bool:
        """Return whether the weights lie where a graph has recorded them."""
        return all(holder[name] is p and p.data_ptr() == at for holder, name, p, at in self._weights)

    @torch.no_grad()
    def _capture(self, turn: int) -> None:
        """Record one step. What the steps before it on a side stream do to the state is undone."""
        saved = [t.clone() for t in self._buffers()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(turn)  # compiles and allocates
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # its own default is a stream of the card of the first graph
            logits = self._step(turn)
        for buffer, before in zip(self._buffers(), saved):
            buffer.copy_(before)
        self._graphs[turn] = (graph, logits)

    def _buffers(self) -> list[Tensor]:
        return [self._position, *self._states, *self._log_decay, *(c for pair in self._conv for c in pair)]

    @torch.no_grad()
    def _step(self, turn: int) -> Tensor:
        from rnn_longctx.recurrence.ssd.kernels import decode

        model, in_fp32 = self.model, self.model.config.residual_in_fp32
        mixers: list[Any] = model.mixers
        h, out = model.backbone.embedding(self._token), None
        A = -torch.stack([m.A_log.float() for m in mixers]).exp()  # (each time: the weights may have changed)
        before, after = ([conv[which] for conv in self._conv] for which in (turn, 1 - turn))
        for i, layer in enumerate(model.layers):
            m: Any = layer.mixer
            c, policy = m.config, m.policy
            projected, h = _project(layer.norm, m.in_proj, h, out, in_fp32)
            y = projected.new_empty(len(projected), c.d_inner, dtype=torch.float32)
            every = policy.caps[0].every if policy.caps else 1
            decode.decode(
                projected,
                decode.Weights(m.conv1d.weight[:, 0], m.conv1d.bias, A[i], m.dt_bias, m.D, c.ngroups, c.dt_limit),
                decode.Rules(self._tables[i], self._caps[i], every, policy.reset),
                decode.Memory(before[i], after[i], self._position, self._states[i], self._log_decay[i]),
                y,
            )
            out = _project(m.norm, m.out_proj, y)[0]
        logits = _project(model.backbone.norm_f, model.lm_head, h, out, in_fp32)[0]
        self._position += 1
        return logits


def _linears(model: LM) -> Iterator[nn.Module]:
    yield model.lm_head
    mixers: list[Any] = model.mixers
    for mixer in mixers:
        yield from (mixer.in_proj, mixer.out_proj)


def _project(
    norm: Norm, linear: nn.Linear, x: Tensor, add: Tensor | None = None, in_fp32: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear` (B, out) of the norm of x (B, dim) + add, and x + add, float32 if asked for."""
    from rnn_longctx.models.kernels import matvec

    assert isinstance(norm, RMSNorm)  # (`Decoder.refuses`)
    if len(x) <= matvec.MOST:
        total = torch.float32 if in_fp32 else x.dtype
        return matvec.norm_linear(x, norm.weight, linear.weight, linear.bias, norm.eps, norm.groups, add, total)
    normed, x = norm.add(x, add, in_fp32)
    return linear(normed), x
