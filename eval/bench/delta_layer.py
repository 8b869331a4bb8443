"""Where one layer of a model of the delta rule spends its time on a GPU: its scan, its products, and the passes over
memory beside them; and fla's layer of the same weights, with its scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench.base import Row, bench
from rnn_longctx.eval.bench.delta import fla_model, model_of, named
from rnn_longctx.eval.bench.scan import ceilings
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.span import WHOLE

HALF, FULL = 2, 4  # bytes of a bfloat16 and of a float32


@bench("delta-layer")
def bench_delta_layer(
    *,
    length: Annotated[str, "Tokens that the layer reads at once."] = "64k",
    mixers: Annotated[str, "Which of gated-deltanet and kda."] = "gated-deltanet,kda",
) -> Iterator[Row]:
    """One layer of the 370M models of the delta rule on a GPU: scan, products and passes over memory; and fla's.

    Examples:
        rnn-longctx bench delta-layer --length 64k
    """
    tokens, names = parse_length(length), named(mixers)
    if not torch.cuda.is_available():
        raise InputError("this benchmark needs a CUDA device")
    return layer_rows(tokens, names)


@torch.inference_mode()
def layer_rows(length: int, names: list[str], device: str = "cuda") -> Iterator[Row]:
    """Yield a row a mixer, system and part: milliseconds of one row of `length` tokens, and of the floor of what is
    multiplied or moved. Passes are what is left of the layer without its scan and its products."""
    bandwidth, rate = ceilings()
    for name in names:
        model = model_of(name, device, n_layer=1)
        h = torch.randn(1, length, model.d_model, device=device, dtype=model.dtype)
        systems = {}
        for system, fused in (("rnn-longctx", False), ("rnn-longctx, passes fused", True)):
            with fused_layers(fused):
                parts = systems[system] = _ours(model, h)
            parts["passes"] = parts["layer"] - parts["scan"] - parts["products"]
        floors = {
            "products": 2 * length * sum(linear.weight.numel() for linear in _linears(model)) / rate * 1e3,
            "passes": length * sum(moved(model).values()) / bandwidth * 1e3,
        }
        shared = {"mixer": name, "length": length}
        for system, parts in systems.items():
            for part, took in parts.items():
                yield {**shared, "system": system, "what": part, "ms": took, "floor_ms": floors.get(part, math.nan)}
        for part, took in _fla(model, h).items():
            yield {**shared, "system": "fla", "what": part, "ms": took, "floor_ms": math.nan}


@contextmanager
def fused_layers(fused: bool) -> Iterator[None]:
    before, choose.FUSED_LAYERS = choose.FUSED_LAYERS, fused
    try:
        yield
    finally:
        choose.FUSED_LAYERS = before


def _ours(model: LM, h: Tensor) -> dict[str, float]:
    """Return milliseconds of the layer, of its scan and of its products; h (B, T, d_model): what it reads."""
    (block,), in_fp32 = model.layers, model.config.residual_in_fp32
    mixer: Any = block.mixer
    residual, out = h.float() if in_fp32 else h, torch.randn_like(h)
    _, carry = mixer(h, None, WHOLE)

    def layer() -> None:
        normed, after = block.norm.add(residual, out, in_fp32)
        block.feed_forward(after, mixer(normed, carry, WHOLE)[0], in_fp32)

    inputs, gates, _ = mixer.inputs(block.norm.add(residual, out, in_fp32)[0], carry, WHOLE)
    given = [(linear, h.new_empty(*h.shape[:2], linear.in_features).normal_()) for linear in _linears(model)]
    return {
        "layer": milliseconds(layer),
        "scan": milliseconds(lambda: mixer.recurrence.scan(inputs, gates, WHOLE, carry=carry.scan)),
        "products": milliseconds(lambda: [linear(x) for linear, x in given]),
    }


def _fla(model: LM, h: Tensor) -> dict[str, float]:
    """Return milliseconds of fla's layer and of its scan; none where it is not installed."""
    theirs = fla_model(model)
    if theirs is None:
        return {}
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    (block,) = theirs.model.layers
    mixer: Any = model.layers[0].mixer
    inputs, gates, _ = mixer.inputs(h, None, WHOLE)
    scan: Any = chunk_kda if mixer.per_channel else chunk_gated_delta_rule
    given = [t.contiguous() for t in (inputs.C, inputs.B, inputs.x, gates.log_decay, gates.input_scale)]
    return {
        "layer": milliseconds(lambda: block(h)),
        "scan": milliseconds(lambda: scan(*given, scale=1.0, output_final_state=True)),
    }


def _linears(model: LM) -> list[nn.Linear]:
    return [module for module in model.layers[0].modules() if isinstance(module, nn.Linear)]


def moved(model: LM) -> dict[str, int]:
    """Return the bytes that a token moves in each pass of a layer beside its products and its scan, if every input is
    read once and every output written once."""
    (block,) = model.layers
    mixer: Any = block.mixer
    assert block.mlp is not None
    width, heads, values = model.d_model, mixer.heads, mixer.heads * mixer.headdim
    residual = FULL if model.config.residual_in_fp32 else HALF
    decays = heads * mixer.d_state * (HALF + FULL) if mixer.per_channel else heads * FULL
    return {
        "norms": 2 * width * (2 * residual + 2 * HALF),  # the residual and what is added; the sum and its norm
        "convolution, heads": 2 * HALF * mixer.channels[0],
        "gates": width * HALF + heads * FULL + decays,
        "norm of outputs": 3 * HALF * values,
        "SwiGLU": 3 * HALF * block.mlp.down.in_features,
    }


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median of a call's milliseconds, with nothing of it in the GPU's cache, its kernels compiled."""
    from triton.testing import do_bench

    call()
    return do_bench(call, warmup=50, rep=200, return_mode="median")
