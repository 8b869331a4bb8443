"""The sliding window on a GPU: the stream cut into its blocks of r tokens, which the kernels read as rows of a batch.

The carry is the one of `recurrence.ssd.window`, so calls of either backend may follow each other. What lies in whole
blocks costs a plain scan and, where the block before is still heard, part of a second one; what begins or ends inside
a block is read alone. Nothing of the size of the stream is made but y.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Reading
from rnn_longctx.recurrence.carry import ScanCarry, WindowCarry, tree_map
from rnn_longctx.recurrence.gates import SteppedGates
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.recurrence.ssd import pytorch, window
from rnn_longctx.recurrence.ssd.operands import Operands

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
    o = Operands(
        x,
        gates.dt,
        dense.A,
        B,
        C,
        inputs.D,
        dense.dt_bias,
        initial=carry.state,
        table=table,
        pad=None,
        drop=None,
        caps=None,
        low=float(gates.dt_limit[0]),
        high=float(gates.dt_limit[1]),
        softplus=gates.softplus,
        every=0,
        due=[],
        position=0,
    )
    read = _Reader(o, dense, policy)
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
    """One call's operands, and y, which what is read is written into."""

    def __init__(self, operands: Operands, gates: SteppedGates, policy: ScanPolicy) -> None:
        from rnn_longctx.recurrence.ssd.kernels import launch

        x = operands.x
        self.operands, self.gates, self.policy, self.size = operands, gates, policy, policy.window or 0
        self.blocks = launch.blocks(x.shape[3], operands.B.shape[3], x.dtype, 0)
        self.y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def inside_block(self, t: int, count: int, w: WindowCarry | None, carry: ScanCarry) -> tuple[WindowCarry, Tensor]:
        """`count` tokens from t on that lie in one block and do not make one; the carry, and their log-decay (B,H)."""
        from rnn_longctx.recurrence.ssd.kernels import window as kernels

        o, y = self.operands.tokens(t, t + count), self.y[:, t : t + count]
        gates = self.gates.tokens(t, t + count).worked_out(torch.float32, self.policy)
        log_decay, scale = gates.log_decay, gates.input_scale
        B_wide, offset = o.B.float(), 0 if w is None else w.x.shape[1]
        held = w or window.empty(o.x.float(), log_decay, B_wide, self.size, carry)
        block, ready = self._scan(o, y, held.block.float().contiguous())
        if w is not None:
            before = kernels.Carried(w.head, w.x_before, w.B_before, w.after, window.CHUNK, offset)
            kernels.carried(o, y, before, kernels.Spans(o, ready), 1, self.blocks)
        held = window.extend(held, block, o.x * scale[..., None], B_wide, log_decay)
        return held, ready.spent.sum(2, dtype=torch.float64)

    def whole_blocks(self, t: int, blocks: int, w: WindowCarry | None) -> tuple[WindowCarry, Tensor]:
        """That many blocks from t on, the first of which begins there; the carry, and their log-decay (B,H)."""
        length = blocks * self.size
        o, y = self.operands.tokens(t, t + length), self.y[:, t : t + length]
        batch = len(y)
        if batch == 1 or all(v.stride(0) == length * v.stride(1) for v in (o.x, o.dt, o.B, o.C, y)):
            return self._rows(o, y, blocks, w)
        rows = [  # one row of the batch after the other: their blocks do not stand at equal distances
            self._rows(o.of_tokens(partial(_row, b=b)), y[b : b + 1], blocks, w and tree_map(partial(_row, b=b), w))
            for b in range(batch)
        ]
        return _join([held for held, _ in rows]), torch.cat([total for _, total in rows])

    def _rows(self, o: Operands, y: Tensor, blocks: int, w: WindowCarry | None) -> tuple[WindowCarry, Tensor]:
        from rnn_longctx.recurrence.ssd.kernels import window as kernels

        batch, size, heads, B_last = len(y), self.size, y.shape[2], o.B[:, -self.size :]
        o, y = o.of_tokens(lambda v: v.view(batch * blocks, size, *v.shape[2:])), y.view(-1, size, *y.shape[2:])
        _, ready = self._scan(o, y, None)
        spans = kernels.Spans(o, ready)
        kernels.pairs(o, y, spans, blocks, self.blocks)
        head = y.new_zeros(batch, heads, dtype=torch.float32)
        if w is not None:
            before = kernels.Carried(head, w.x_before, w.B_before, w.after, window.CHUNK, 0)
            kernels.carried(o, y, before, spans, blocks, self.blocks)
        x_before, after = kernels.turned(o, spans, window.CHUNK, blocks, self.blocks)
        B_before = B_last.to(torch.float32, copy=True)  # the caller keeps its own
        log_decay, block = head.new_zeros(batch, 0, heads), torch.zeros_like(after[:, 0])
        held = WindowCarry(size, block, head, x_before[:, :0], B_before[:, :0], log_decay, x_before, B_before, after)
        return held, ready.spent.unflatten(0, (batch, blocks)).sum((1, 3), dtype=torch.float64)

    def _scan(self, o: Operands, y: Tensor, initial: Tensor | None) -> tuple:
        """y of every row's own tokens, from the initial state or zero; the final state, if there is an initial one."""
        from rnn_longctx.recurrence.ssd.kernels import launch

        ready = launch.prepare_chunks(o, self.blocks)
        return launch.scan_forward(o, initial, ready, self.blocks, y)[1], ready


def _row(t: Tensor, b: int) -> Tensor:
    return t[b : b + 1]


def _join(parts: list[WindowCarry]) -> WindowCarry:
    names = [f.name for f in fields(WindowCarry) if f.name != "size"]
    return WindowCarry(parts[0].size, **{name: torch.cat([getattr(w, name) for w in parts]) for name in names})
