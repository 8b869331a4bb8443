"""The sliding window on a GPU: the stream cut into its blocks of r tokens, which the kernels read as rows of a batch.

The carry is the one of `recurrence.ssd.window`, so calls of either backend may follow each other. What lies in whole
blocks costs a plain scan and, where the block before is still heard, part of a second one; what begins or ends inside
a block is read alone. Nothing of the size of the stream is made but y.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Reading
from rnn_longctx.recurrence.carry import ScanCarry, WindowCarry, tree_map
from rnn_longctx.recurrence.gates import ScanInputs, SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import pytorch, window

SHORT = 16  # tokens in a call below which PyTorch's few products are as fast
ROWS = 2**15  # blocks of a window times those of a state: a grid's last axis ends at 65535 programs


def run(reading: Reading, table: Tensor) -> tuple[Tensor, ScanCarry]:
    """As `recurrence.ssd.fused.run`; table (4, H) are the policy's gates. Gradients, documents, padding, and windows
    shorter than a chunk of the carry are PyTorch's."""
    inputs, gates, policy, carry = reading.inputs, reading.gates, reading.policy, reading.carry
    assert isinstance(gates, SteppedGates)
    x, size, length = inputs.x, policy.window or 0, inputs.x.shape[1]
    delay = None if carry.window is None else carry.window.x
    graded = reading.graded or (torch.is_grad_enabled() and delay is not None and delay.requires_grad)
    graded = graded or torch.compiler.is_compiling()  # which sees no kernels here
    whole = reading.mask is None and reading.reset is None and reading.drop is None
    if graded or length < SHORT or size < window.CHUNK or not whole:
        return pytorch.run(reading)
    x, B, C = (v if v.stride(-1) == 1 else v.contiguous() for v in (x, inputs.B.to(x.dtype), inputs.C.to(x.dtype)))
    dense = replace(
        gates, A=gates.A.contiguous(), dt_bias=None if gates.dt_bias is None else gates.dt_bias.contiguous()
    )
    read = _Reader(ScanInputs(x, B, C, inputs.D), dense, policy, table)
    held, log_decay, t = carry.window, carry.log_decay, 0
    with torch.cuda.device_of(x):  # Triton launches on the current device
        while t < length:
            offset = 0 if held is None else held.x.shape[1]
            if offset or length - t < size:
                count = min(size - offset, length - t)
                held, more = read.inside_block(t, count, held, carry)
            else:
                blocks = min((length - t) // size, max(1, ROWS // (len(x) * -(-x.shape[3] // read.blocks.BP))))
                count = blocks * size
                held, more = read.whole_blocks(t, blocks, held)
            log_decay, t = log_decay + more, t + count
    assert held is not None
    return read.y, ScanCarry(held.block, carry.position, log_decay, held)


class _Reader:
    """One call's inputs, and y, which what is read is written into."""

    def __init__(self, inputs: ScanInputs, gates: SteppedGates, policy: ScanPolicy, table: Tensor) -> None:
        from rnn_longctx.recurrence.ssd.kernels import launch

        x, B = inputs.x, inputs.B
        self.x, self.B, self.C, self.D = x, B, inputs.C, inputs.D
        self.gates, self.dt, self.A, self.dt_bias = gates, gates.dt, gates.A, gates.dt_bias
        self.low, self.high = float(gates.dt_limit[0]), float(gates.dt_limit[1])
        self.policy, self.size, self.table = policy, policy.window or 0, table
        self.blocks = launch.blocks(x.shape[3], B.shape[3], x.dtype, 0)
        self.y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def inside_block(self, t: int, count: int, w: WindowCarry | None, carry: ScanCarry) -> tuple[WindowCarry, Tensor]:
        """`count` tokens from t on that lie in one block and do not make one; the carry, and their log-decay (B,H)."""
        from rnn_longctx.recurrence.ssd.kernels import window as kernels

        x, dt, B, C, y = (v[:, t : t + count] for v in (self.x, self.dt, self.B, self.C, self.y))
        gates = self.gates.tokens(t, t + count).worked_out(torch.float32, self.policy)
        log_decay, scale = gates.log_decay, gates.input_scale
        B_wide, offset = B.float(), 0 if w is None else w.x.shape[1]
        held = w or window.empty(x.float(), log_decay, B_wide, self.size, carry)
        block, ready = self._scan(x, dt, B, C, y, held.block.float().contiguous())
        if w is not None:
            spans = kernels.Spans(self.A, self.table, self.low, ready)
            kernels.carried(
                C,
                y,
                self.A,
                self.table,
                self.low,
                w.head,
                w.x_before,
                w.B_before,
                w.after,
                ready,
                spans,
                offset,
                window.CHUNK,
                1,
                self.blocks,
            )
        held = window.extend(held, block, x * scale[..., None], B_wide, log_decay)
        return held, ready.spent.sum(2, dtype=torch.float64)

    def whole_blocks(self, t: int, blocks: int, w: WindowCarry | None) -> tuple[WindowCarry, Tensor]:
        """That many blocks from t on, the first of which begins there; the carry, and their log-decay (B,H)."""
        batch, size = len(self.x), self.size
        arrays = [v[:, t : t + blocks * size] for v in (self.x, self.dt, self.B, self.C, self.y)]
        if batch == 1 or all(v.stride(0) == blocks * size * v.stride(1) for v in arrays):
            return self._rows(arrays, blocks, w)
        rows = [  # one row of the batch after the other: their blocks do not stand at equal distances
            self._rows([v[b : b + 1] for v in arrays], blocks, w and _row(w, b)) for b in range(batch)
        ]
        return _join([held for held, _ in rows]), torch.cat([total for _, total in rows])

    def _rows(self, arrays: list[Tensor], blocks: int, w: WindowCarry | None) -> tuple[WindowCarry, Tensor]:
        from rnn_longctx.recurrence.ssd.kernels import window as kernels

        batch, size = len(arrays[0]), self.size
        x, dt, B, C, y = (v.view(batch * blocks, size, *v.shape[2:]) for v in arrays)
        _, ready = self._scan(x, dt, B, C, y, None)
        spans = kernels.Spans(self.A, self.table, self.low, ready)
        kernels.pairs(x, B, C, y, ready, spans, blocks, self.blocks)
        head = x.new_zeros(batch, x.shape[2], dtype=torch.float32)
        if w is not None:
            kernels.carried(
                C,
                y,
                self.A,
                self.table,
                self.low,
                head,
                w.x_before,
                w.B_before,
                w.after,
                ready,
                spans,
                0,
                window.CHUNK,
                blocks,
                self.blocks,
            )
        x_before, after = kernels.turned(x, B, ready, spans, window.CHUNK, blocks, self.blocks)
        B_before = arrays[2][:, -size:].to(torch.float32, copy=True)  # the caller keeps its own
        log_decay = head.new_zeros(batch, 0, x.shape[2])
        held = WindowCarry(
            size,
            torch.zeros_like(after[:, 0]),
            head,
            x_before[:, :0],
            B_before[:, :0],
            log_decay,
            x_before,
            B_before,
            after,
        )
        return held, ready.spent.unflatten(0, (batch, blocks)).sum((1, 3), dtype=torch.float64)

    def _scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, y: Tensor, initial: Tensor | None) -> tuple:
        """y of every row's own tokens, from the initial state or zero; the final state, if there is an initial one."""
        from rnn_longctx.recurrence.ssd.kernels import launch

        ready = launch.prepare_chunks(
            dt,
            self.A,
            B,
            C,
            self.dt_bias,
            self.table,
            None,
            None,
            self.low,
            self.high,
            self.gates.softplus,
            x.shape[3],
            self.blocks,
        )
        _, final = launch.scan_forward(
            x, B, C, self.D, self.A, self.table, None, initial, self.low, ready, self.blocks, y
        )
        return final, ready


def _row(w: WindowCarry, b: int) -> WindowCarry:
    return tree_map(lambda v: v[b : b + 1], w)


def _join(parts: list[WindowCarry]) -> WindowCarry:
    names = [f.name for f in fields(WindowCarry) if f.name != "size"]
    return WindowCarry(parts[0].size, **{name: torch.cat([getattr(w, name) for w in parts]) for name in names})
