"""Compiles every kernel for a compute capability, on any machine: prints name, case and bytes of shared memory.

python compile_kernels.py 90
"""

import inspect
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnn_longctx.ssd.kernels import backward, forward, launch, prepare

POINTERS = {"dt": "x", "x": "x", "B": "x", "C": "x", "y": "x", "gram": "x", "dy": "x", "dx": "x", "scratch": "x",
            "drop": "i8", "pad": "i32", "wild": "i32"}  # fmt: skip
FLOATS = ("A", "D", "dt_bias", "table", "cum", "scale", "totals", "initial", "states", "final", "grads", "ends", "dB",
          "dC", "dgram", "dlog_decay", "dscale", "dD")  # fmt: skip
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_one(kernel, capability, dtype, warps, **constants):
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {k: v for k, v in constants.items() if k in names}
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*" + POINTERS[name].replace("x", NAMES[dtype])
        elif name in FLOATS:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("low", "high", "limit") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for dtype, headdim, d_state in ((torch.bfloat16, 64, 128), (torch.float32, 64, 128)):
        c = launch.blocks(headdim, d_state, dtype)
        flags = {"HAS_BIAS": True, "HAS_D": True, "HAS_INITIAL": True, "HAS_FINAL": True, "SOFTPLUS": True,
                 "HAS_PAD": False, "HAS_DROP": False, "WILD": False, "TMA": False, "FULL": dtype == torch.float32,
                 "Q": c.Q, "BP": c.BP, "BN": c.BN, "BH": 32, "BLOCK": 1024, "STAGES": c.stages}  # fmt: skip
        cases = [
            (prepare.prepare_chunk, 4, {}),
            (forward.segment_states, c.warps, {}),
            (forward.chunk_scan, c.warps, {}),
            (forward.chunk_scan, c.warps, {"WILD": True, "HAS_DROP": True}),
            (backward.segment_grads, c.warps, {}),
            (backward.chunk_grads, launch.grad_warps(c), {}),
        ]
        if dtype == torch.bfloat16:
            cases += [(backward.fold_states, 4, {}), (backward.fold_grads, 4, {})]
        for kernel, warps, changed in cases:
            made = compile_one(kernel, capability, dtype, warps, **{**flags, **changed})
            print(kernel.fn.__name__, NAMES[dtype], changed, made.metadata.shared)
