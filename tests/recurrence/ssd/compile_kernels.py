"""Compiles every kernel for a compute capability, on any machine: prints name, case and bytes of shared memory.

python compile_kernels.py 90 [usual [0/4]]   usual: of a bfloat16 model with d_state 128 alone; of these every fourth
"""

import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnn_longctx.models.kernels import conv_norm, conv_norm_grads, delta_inputs, head_norm, matvec, rotary, swiglu
from rnn_longctx.recurrence.delta.kernels import blocks, states
from rnn_longctx.recurrence.ssd.kernels import (  # fmt: skip
    backward,
    caps,
    channels,
    channels_grads,
    decode,
    forward,
    launch,
    launch_caps,
    launch_channels,
    prepare,
    window,
)

POINTERS = {"dt": "x", "x": "x", "B": "x", "C": "x", "y": "x", "gram": "x", "dy": "x", "dx": "x", "ddt": "x",
            "dbefore": "x", "dadd": "x", "dgate": "x", "z": "x", "weight": "x", "norm": "x", "bias": "x", "before": "x",
            "after": "x", "add": "x", "gate": "x", "projected": "x", "drop": "i8", "pad": "i32", "wild": "i32",
            "near": "i32", "kept": "i32", "position": "i64", "log_decay": "fp64",
            "steps": "fp64"}  # fmt: skip
FLOATS = ("A", "D", "dt_bias", "table", "cum", "scale", "totals", "initial", "states", "final", "caps", "S", "factors",
          "spent", "total", "grads", "ends", "dB", "dC", "dlog_decay", "dscale", "dD", "dA", "dcum", "dtotal", "dbias",
          "room", "sums", "squares", "head", "x_before", "B_before", "until", "rest", "own", "decays",
          "tiles")  # fmt: skip
PLAIN_FLOATS = ("start_ptr", "end_ptr", "cap_ptr", "factor_ptr", "g_ptr", "state_ptr", "sum_ptr", "A_log_ptr",
                "dt_bias_ptr", "beta_ptr", "log_decay_ptr")  # fmt: skip
OF_CHUNKS = {(backward.output_grads, "states"), (backward.input_grads, "grads"), (backward.chunk_states, "out"),
             (backward.chunk_state_grads, "out"), (backward.chunk_state_grads, "at_chunks")}  # fmt: skip
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_one(kernel, capability, dtype, warps, like_x=(), **constants):
    kernel, named = kernel.jit, kernel
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {k: v for k, v in constants.items() if k in names}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif constants.get("TMA") and name in ("x", "B", "C", "gram", "y", "z"):
            width = {"gram": constants["Q"], "B": constants["BN"], "C": constants["BN"]}.get(name, constants["BP"])
            signature[name] = f"tensordesc<{NAMES[dtype]}[1, {constants['Q']}, 1, {width}]>"
        elif name in POINTERS or name in like_x or (named, name) in OF_CHUNKS:
            signature[name] = "*" + POINTERS.get(name, "x").replace("x", NAMES[dtype])
        elif name in ("cum", "totals", "until", "rest") and dtype == torch.float32:
            signature[name] = "*fp64"
        elif name in FLOATS:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("low", "high", "limit", "eps", "add_eps") else "i32"
    even = [n for n in names if signature[n][0] == "*" or n in ("sx", "sa", "dim")]  # what sizes of 16 make of a stride
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "launch_pdl": constants.get("PDL", False)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_plain(kernel, capability, warps, **constants):
    """A kernel whose pointers are called *_ptr, or are among POINTERS; what is left are sizes."""
    kernel, signature = getattr(kernel, "jit", kernel), {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            signature[name] = "constexpr"
        elif name in PLAIN_FLOATS:
            signature[name] = "*fp32"
        elif name.endswith("_ptr") or name in ("x", "weight", "gate", "y"):
            signature[name] = "*bf16"
        elif name in ("places", "rates"):
            signature[name] = {"places": "*i64", "rates": "*fp64"}[name]
        else:
            signature[name] = "fp32" if name in ("share", "eps", "scale", "bound", "most", "sign") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


if __name__ == "__main__":
    capability = int(sys.argv[1])
    first, step = map(int, sys.argv[3].split("/")) if len(sys.argv) > 3 else (0, 1)
    numbers = itertools.count()

    def show(compiled: Callable, kernel: Any, *words: Any, about: tuple, **constants: Any) -> None:
        """Compile a case, if its turn has come."""
        if next(numbers) % step == first:
            name = getattr(kernel, "jit", kernel).fn.__name__
            print(name, *about, compiled(kernel, capability, *words, **constants).metadata.shared)

    usual, others = (torch.bfloat16, 64, 128), ((torch.bfloat16, 64, 256), (torch.float32, 64, 128))
    sizes = (usual, *(() if "usual" in sys.argv else others))
    for dtype, headdim, d_state in sizes:
        c = launch.blocks(headdim, d_state, dtype, 0)
        token_warps = launch_caps.token_warps(64, c.BN, dtype)
        flags = {"HAS_BIAS": True, "HAS_D": True, "HAS_INITIAL": True, "HAS_FINAL": True, "SOFTPLUS": True,
                 "HAS_PAD": False, "HAS_DROP": False, "WILD": False, "TMA": False, "FULL": dtype == torch.float32,
                 "Q": c.Q, "BP": c.BP, "BN": c.BN, "BH": 32, "BLOCK": 1024, "STAGES": c.stages,
                 "PDL": capability >= 90, "LANES": 32, "DENSE": True, "ALONE": False, "HAS_LOOK": False,
                 "HAS_GATE": False, "PARTS": 32, "HAS_TOTAL": False, "HAS_ADD": False,
                 "HAS_CAPS": False, "EACH": 64, "SPAN": window.SPAN}  # fmt: skip
        cases = [
            (prepare.prepare_chunk, 4, {}),
            (forward.segment_states, c.warps, {}),
            (forward.segment_states, c.warps, {"like_x": ("states",)}),
            (
                caps.cap_chain,
                8,
                {"BP": 64, "STAGES": launch_caps.chain_stages(64 * c.BN, dtype), "like_x": ("states",)},
            ),
            (caps.cap_tokens, token_warps, {"BP": 64, "W": token_warps}),
            (forward.chunk_scan, c.warps, {}),
            (forward.chunk_scan, c.warps, {"HAS_LOOK": True}),
            (forward.chunk_scan, c.warps, {"WILD": True, "HAS_DROP": True}),
            (forward.chunk_scan, c.warps, {"ALONE": True}),
            (forward.chunk_scan, c.warps, {"HAS_GATE": True}),
            (forward.chunk_scan, c.warps, {"HAS_GATE": True, "WILD": True}),
            (window.block_spans, 4, {}),
            (window.add_block_before, window.WARPS, {}),
            (window.add_carried, window.WARPS, {"BP": min(c.BP, 32)}),
            (window.turn_block, c.warps, {"BP": 16}),
            (backward.segment_grads, c.warps, {}),
            (backward.chunk_states, c.warps, {}),
            (backward.chunk_state_grads, c.warps, {}),
            (backward.output_grads, c.warps, {}),
            (backward.input_grads, c.warps, {}),
        ]
        if dtype == torch.bfloat16 and capability >= 90:
            cases.append((forward.chunk_scan, c.warps, {"TMA": True}))
            cases.append((forward.chunk_scan, c.warps, {"TMA": True, "ALONE": True}))
            cases.append((forward.chunk_scan, c.warps, {"TMA": True, "HAS_GATE": True}))
        if (dtype, d_state) == (torch.bfloat16, 128):
            cases += [
                (prepare.prepare_chunk, 4, {"HAS_PAD": True, "HAS_DROP": True}),
                (caps.cap_tokens, 4, {"W": 4, "DENSE": False}),
                (caps.cut_tokens, 4, {"ROWS": 16}),
                (backward.fold_states, 4, {}),
                (backward.fold_grads, 4, {}),
                (backward.output_grads, c.warps, {"HAS_DROP": True}),
                (backward.input_grads, c.warps, {"HAS_DROP": True}),
                (backward.gate_grads, 4, {"BT": 128, "BH": 8, "HAS_PAD": True}),
                (
                    conv_norm._conv_silu,
                    1,
                    {"TAPS": 4, "BT": conv_norm.CONV[0], "BC": conv_norm.CONV[1], "HAS_BEFORE": True},
                ),
                (conv_norm._norm, 8, {"BLOCK": 2048, "HAS_ADD": True, "HAS_GATE": True}),
                (
                    conv_norm_grads._conv_silu_backward,
                    1,
                    {"TAPS": 4, "BT": conv_norm_grads.CONV[0], "BC": conv_norm_grads.CONV[1], "HAS_BEFORE": True},
                ),
                (
                    conv_norm_grads._norm_backward,
                    8,
                    {"BLOCK": 2048, "ROWS": conv_norm_grads.ROWS, "HAS_TOTAL": True, "HAS_ADD": True},
                ),
                (conv_norm_grads._norm_backward, 4, {"BLOCK": 1024, "ROWS": conv_norm_grads.ROWS, "HAS_GATE": True}),
                (decode._decode, 8, {"TAPS": 4, "HAS_CAP": True, "HAS_DROP": True}),
                (decode._decode, 4, {"TAPS": 4, "BP": 16, "HAS_CAP": False}),
            ]
            of_channels = {"N": 16, "BD": launch_channels.BLOCK, "BN": 16, "TILE": launch_channels.TILE}
            keeps = {**of_channels, "FROM_ZERO": False, "READS": False}
            cases += [
                (channels.walk_chunks, 1, keeps),
                (channels.walk_chunks, 1, {**keeps, "FROM_ZERO": True, "HAS_DROP": True}),
                (channels.walk_chunks, 1, {**keeps, "READS": True, "HAS_PAD": True, "HAS_DROP": True}),
                (channels.chain_chunks, 4, {"BLOCK": 128, "BACK": True}),
                (channels_grads.walk_back, 1, {**of_channels, "HAS_DROP": True}),
                (channels_grads.tile_grads, 1, of_channels),
                (channels_grads.tile_grads, 1, {**of_channels, "HAS_PAD": True, "HAS_DROP": True}),
            ]
            for block, batch, groups in ((1024, 1, 1), (2048, 1, 1), (2048, 4, 1), (8192, 1, 8)):
                rows = matvec.rows_of(block, 2)
                sizes = {"BLOCK": block, "BATCH": batch, "GROUPS": groups, "ROWS": rows, "HAS_ADD": block == 1024}
                cases.append((matvec._norm_linear, matvec.warps_of(rows, block, 2), sizes))
        for kernel, warps, changed in cases:
            show(compile_one, kernel, dtype, warps, about=(NAMES[dtype], d_state, changed), **{**flags, **changed})
    for gate in (0, 1, 2):
        constants = {"ROWS": 16, "BLOCK": 128, "HAS_WEIGHT": gate > 0, "GATE": gate}
        show(compile_plain, head_norm._head_norm, 4, about=("bf16", 128, constants), **constants)
    BT, BC = delta_inputs.CONV
    for kernel, warps, constants in (
        *(
            (
                delta_inputs._conv_heads,
                1,
                {"TAPS": 4, "BT": BT, "BH": BC // width, "BC": width, "HAS_BEFORE": unit, "UNIT": unit},
            )
            for width, unit in ((64, True), (128, True), (256, False))
        ),
        *(
            (delta_inputs._head_gates, 4, {"BT": rows, "BH": heads, "BK": delta_inputs.STEP, "HAS_DECAY": decay})
            for rows, heads, decay in ((64, 16, True), (64, 16, False), (32, 64, True))
        ),
        *(
            (delta_inputs._channel_decays, 4, {**dict(zip(("BR", "BC"), delta_inputs.TILE)), "BOUNDED": bounded})
            for bounded in (False, True)
        ),
        (swiglu._swiglu, 4, dict(zip(("BR", "BC"), swiglu.TILE))),
    ):
        show(compile_plain, kernel, warps, about=("bf16", constants), **constants)
    show(compile_plain, rotary._turned, 4, about=("bf16", 128), BT=16, BLOCK=64)
    for per_channel in (False, True):
        for headdim, warps in ((128, 8), (256, 16)):
            constants = {"G": 4, "H": 4, "P": headdim, "N": 128, "BP": headdim, "BN": 128, "C": states.CHUNK,
                         "PER_CHANNEL": per_channel}  # fmt: skip
            show(compile_plain, states._states, warps, about=("bf16", 128, constants), **constants)
        for moves in (True, False):
            constants = {"G": 4, "H": 4, "P": 256, "N": 128, "BP": blocks.TILE, "BN": 128, "C": states.CHUNK,
                         "PER_CHANNEL": per_channel, "MOVES": moves}  # fmt: skip
            show(compile_plain, blocks._walk, 4, about=("bf16", 128, constants), **constants)
    for rows, capped in ((32, True), (64, True), (32, False)):
        constants = {"H": 4, "P": 256, "N": 128, "BP": rows, "BN": 128, "C": states.CHUNK, "PARTS": 256 // rows,
                     "BPARTS": 256 // rows, "CAPPED": capped}  # fmt: skip
        show(compile_plain, blocks._chain, 8, about=("bf16", 128, constants), **constants)
