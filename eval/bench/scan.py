"""Speed of the scan on a GPU, side by side with the kernels people use, in one run: the time, the memory, the error and
the two floors (every input and output moved once; every product at the matrix units' rate), both measured here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.config import parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench.base import Row, bench, sizes
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy
from rnn_longctx.recurrence.ssd.scan import scan
from rnn_longctx.recurrence.statistics import Observer, Statistics

CHUNK = 64  # tokens: what the floor's products are counted with
MEASURED = ("ms", "graphed_ms", "extra_mib", "first_seconds", "error")
PLAIN_NAME = "rnn-longctx"
MAMBA1 = "Mamba-1, "
EVERY = 256  # tokens between caps, and between looks
System = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of a scan's inputs: B batch, T tokens, H heads, P headdim, N d_state, one group; bfloat16."""

    batch: int
    length: int
    heads: int = 32
    headdim: int = 64
    d_state: int = 128

    def inputs(self, train: bool = False) -> dict[str, Tensor]:
        """Return random tensors with Mamba-2's initial gates: A of -16 to -1, steps of 0.001 to 0.1, log-uniform."""
        b, t, h, p, n = self.batch, self.length, self.heads, self.headdim, self.d_state
        step = torch.exp(torch.empty(h, device="cuda").uniform_(math.log(1e-3), math.log(1e-1)))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        tensors = {
            "x": normal(b, t, h, p),
            "dt": normal(b, t, h) * 0.5,
            "A": -torch.empty(h, device="cuda").uniform_(1, 16),
            "B": normal(b, t, 1, n),
            "C": normal(b, t, 1, n),
            "D": torch.ones(h, device="cuda"),
            "dt_bias": step + torch.log(-torch.expm1(-step)),
        }
        return {k: v.requires_grad_(train) for k, v in tensors.items()}

    @property
    def moved(self) -> int:
        """Return the bytes that are moved: x, dt, B and C read once, y written once."""
        return self.batch * self.length * 2 * (2 * self.heads * self.headdim + self.heads + 2 * self.d_state)

    @property
    def operations(self) -> int:
        """Return the operations of the chunked scan with C B^T shared by the heads (arXiv 2405.21060, section 6)."""
        head = 2 * self.headdim * (2 * self.d_state + CHUNK)
        return self.batch * self.length * (self.heads * head + 2 * CHUNK * self.d_state)


@dataclass(frozen=True)
class ChannelShape(Shape):
    """The shape of Mamba-1's scan: heads of headdim 1, a decay a number."""

    heads: int = 1024
    headdim: int = 1
    d_state: int = 16

    def inputs(self, train: bool = False) -> dict[str, Tensor]:
        """Return random tensors with Mamba-1's initial gates: A of -1, -2, ... -N."""
        tensors = super().inputs()
        rates = torch.arange(1.0, self.d_state + 1, device="cuda")
        tensors["A"] = -rates.expand(self.heads, -1).clone()
        return {k: v.requires_grad_(train) for k, v in tensors.items()}

    @property
    def operations(self) -> int:
        """Return 0: there is no product of matrices."""
        return 0


def ours(policy: ScanPolicy = PLAIN, observer: Observer | None = None, backend: str = "triton") -> System:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
        inputs, gates = ScanInputs(x, B, C, D), SteppedGates(dt, A, dt_bias)
        return scan(inputs, gates, policy=policy, backend=backend, observer=observer)[0]

    return run


class Look:
    """An observer that keeps nothing."""

    every, whole = EVERY, False

    def __call__(self, statistics: Statistics) -> None:
        pass


def remedies(inputs: dict[str, Any]) -> dict[str, ScanPolicy]:
    """Return policies by what they cost. Caps are a quarter of the norm that a plain stream ends with: each clips."""
    with torch.no_grad():
        i = inputs
        scanned = ScanInputs(i["x"], i["B"], i["C"], i["D"])
        _, carry = scan(scanned, SteppedGates(i["dt"], i["A"], i["dt_bias"]), backend="triton")
    norms = (carry.state.flatten(-2).norm(dim=-1).amin(0) / 4).tolist()
    few = tuple(n if h % 10 == 0 and h < 30 else math.inf for h, n in enumerate(norms))  # 3 of 32 heads
    every = tuple(norms)
    if inputs["x"].shape[1] <= 2**17:
        return {"cap every token": ScanPolicy(caps=(Cap(every),))}
    return {
        "rri": ScanPolicy(add=math.log(0.999), gain=0.75),
        "delta and A scaled, filtered": ScanPolicy(mul=0.7, gain=0.9, min_dt=1e-3),
        f"cap every {EVERY}": ScanPolicy(caps=(Cap(every, EVERY),)),
        "cap every 64": ScanPolicy(caps=(Cap(every, 64),)),  # as README's state-norm:every=64
        f"cap every {EVERY}, on 3 heads": ScanPolicy(caps=(Cap(few, EVERY),)),
        "window 4096": ScanPolicy(window=4096),
        "window 5000": ScanPolicy(window=5000),
    }


def systems(inputs: dict[str, Any], train: bool, what: str) -> dict[str, tuple[System, ScanPolicy]]:
    """Return this project's scan, with remedies where `what` says so, and those of others that are installed; of
    Mamba-1 PyTorch's and the kernels."""
    if what.startswith(MAMBA1):
        name = "triton_channels"
        return {PLAIN_NAME: (ours(backend="torch"), PLAIN), f"{PLAIN_NAME}, {name}": (ours(backend=name), PLAIN)}
    scans = {PLAIN_NAME: (ours(), PLAIN)}
    if what == "remedies":
        scans |= {f"{PLAIN_NAME}, {name}": (ours(policy), policy) for name, policy in remedies(inputs).items()}
        if inputs["x"].shape[1] > 2**17:
            scans[f"{PLAIN_NAME}, statistics every {EVERY}"] = (ours(observer=Look()), PLAIN)
        return scans
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        pass
    else:

        def mamba(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
            return mamba_chunk_scan_combined(x, dt, A, B, C, 128, D=D, dt_bias=dt_bias, dt_softplus=True)

        scans["mamba-ssm, chunk 128"] = mamba, PLAIN
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        pass
    else:

        def gla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
            step = F.softplus(dt.float() + dt_bias)
            heads = x.shape[2]
            y = chunk_simple_gla(
                C.expand(-1, -1, heads, -1),
                B.expand(-1, -1, heads, -1),
                (x * step[..., None]).to(x.dtype),
                g=step * A,
                scale=1.0,
            )[0]
            return y + (x * D[:, None]).to(y.dtype)

        scans["fla simple_gla"] = gla, PLAIN
    return scans


@bench("scan")
def bench_scan(
    *,
    lengths: Annotated[str, "Tokens of the forward rows, batch 1."] = "16k,64k,1m",
    train: Annotated[str, "Batch x tokens of the forward and backward rows."] = "8x8k",
    remedies: Annotated[str, "Batch x tokens of the rows with remedies."] = "1x1m,1x128k,9x32k",
    mamba1: Annotated[str, "Batch x tokens of Mamba-1's rows, forward, and forward and backward."] = "64x512,1x64k",
) -> Iterator[Row]:
    """The scan on a GPU against mamba-ssm's and flash-linear-attention's kernels, where those are installed.

    Examples:
        rnn-longctx bench scan --lengths 16k,64k --out runs/scan.csv
    """
    forward = parse_lengths(lengths) if lengths else []
    return scan_rows(forward, sizes("train", train), sizes("remedies", remedies), sizes("mamba1", mamba1))


def scan_rows(
    forward: list[int], backward: list[tuple[int, int]], remedied: list[tuple[int, int]], mamba1: list[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Yield a row a system and size, as it is measured: forward at batch 1 of each length, forward and backward of each
    (batch, length), what remedies add to the plain scan, forward, of each (batch, length), and Mamba-1's scan, both
    ways, of each (batch, length).

    Raises:
        InputError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("bench scan needs a CUDA device")
    bandwidth, rate = ceilings()
    common = {"dtype": "bfloat16", "bandwidth_tb_s": bandwidth / 1e12, "matrix_tflop_s": rate / 1e12}
    cases = [("forward", Shape(1, n)) for n in forward] + [("remedies", Shape(*size)) for size in remedied]
    cases += [("forward + backward", Shape(*size)) for size in backward]
    ways = ("forward", "forward + backward")
    for what, shape in cases + [(MAMBA1 + way, ChannelShape(*size)) for size in mamba1 for way in ways]:
        floor = max(shape.moved / bandwidth, shape.operations / rate) * 1e3
        plain = math.nan
        for name, measured in _measure(shape, what):
            plain = measured["ms"] if name == PLAIN_NAME else plain
            yield {
                "what": what,
                "batch": shape.batch,
                "length": shape.length,
                "system": name,
                **measured,
                "of_plain": measured["ms"] / plain,
                "floor_ms": math.nan if "backward" in what else floor,
                **common,
            }


def _measure(shape: Shape, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from triton.testing import do_bench

    train = "backward" in what
    inputs = shape.inputs(train)
    leaves, weight = list(inputs.values()), torch.randn_like(inputs["x"])
    for name, (run, policy) in systems(inputs, train, what).items():

        def call(run: System = run) -> Any:
            y = run(**inputs)
            return torch.autograd.grad(y, leaves, weight) if train else y

        with torch.set_grad_enabled(train):
            try:
                began = time.perf_counter()
                call()
                torch.cuda.synchronize()
                first = time.perf_counter() - began
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                call()
                extra = torch.cuda.max_memory_allocated() - before - weight.nbytes  # y, or x's gradient, is wanted
                eager = do_bench(call, warmup=50, rep=200, return_mode="median")
                graphed = _graphed(call) if what == "forward" else math.nan
                error = _error(run, shape, policy, train)
            except Exception as problem:  # whatever another library does with this size, the others are measured
                yield (
                    name,
                    {**dict.fromkeys(MEASURED, math.nan), "note": f"{type(problem).__name__}: {str(problem)[:80]}"},
                )
                continue
        yield name, {**dict(zip(MEASURED, (eager, graphed, extra / 2**20, first, error))), "note": ""}


def _graphed(call: Callable[[], Any]) -> float:
    """Return milliseconds of the same launches replayed from a CUDA graph: without the time of Python."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    took = do_bench(graph.replay, warmup=50, rep=200, return_mode="median")
    del output
    return took


def _error(run: System, shape: Shape, policy: ScanPolicy, train: bool, length: int = 3001) -> float:
    """Return the relative error of a short stream's outputs, or of the worst of its gradients, against float64."""
    small = replace(shape, batch=1, length=length).inputs(train)
    wide: dict[str, Any] = {k: v.detach().double().requires_grad_(train) for k, v in small.items()}
    y, expected = run(**small), ours(policy, backend="torch")(**wide)
    pairs = [(y, expected)]
    if train:
        weight = torch.randn_like(y)
        grads = torch.autograd.grad(y, list(small.values()), weight)
        pairs = list(zip(grads, torch.autograd.grad(expected, list(wide.values()), weight.double())))
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def ceilings() -> tuple[float, float]:
    """Return bytes a second of a large copy (read and written) and operations a second of a large bfloat16 product."""
    from triton.testing import do_bench

    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / (do_bench(lambda: b.copy_(a), return_mode="median") / 1e3)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / (do_bench(lambda: m @ m, return_mode="median") / 1e3)
