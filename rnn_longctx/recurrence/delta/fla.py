"""The delta rule by flash-linear-attention's kernels (fla): bfloat16 and float16 on a GPU, states float32.

Its kernels for Gated DeltaNet read one decay a head, those of KDA one a channel, and DPLR's the general form. fla
refuses the gradients of the first on Hopper with Triton 3.4 to 3.7.0, where they would be wrong: a gradient is taken
through KDA's instead, with the same decay in all channels.

Without gradients the parts of fla's forward are called one by one, since the states between chunks are wanted:
statistics are taken of them, and caps stand between them. The walk over the chunks is then ours where there are caps
(`kernels.states`), or where it is long and narrow (`kernels.blocks`, with or without caps).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.recurrence.backends import Call, Reading
from rnn_longctx.recurrence.carry import ScanCarry
from rnn_longctx.recurrence.delta import pytorch
from rnn_longctx.recurrence.delta.walk import by_head
from rnn_longctx.recurrence.fla import Rows, next_power_of_2, unreadable
from rnn_longctx.recurrence.gates import DeltaGates
from rnn_longctx.recurrence.policy import ScanPolicy, per_head
from rnn_longctx.recurrence.ssd.pytorch import log_decay_total
from rnn_longctx.recurrence.statistics import Statistics

CHUNK = 64
LARGEST_CAPPED = 128 * 256  # numbers of a state that one program of the capping kernel holds
BLOCK = 32  # chunks: of 8, 16, 32 and 64 the fastest for 64K tokens on an H200 (docs/gpu.md)
LOG2_E = 1.4426950408889634  # fla's decays within kernels are powers of 2


def refuses(policy: ScanPolicy, call: Call | None) -> str | None:
    """Return what these kernels do not follow, or None."""
    if len(policy.caps) > 1 or any(cap.every % CHUNK for cap in policy.caps):
        return f"caps states every {CHUNK} tokens, or a multiple of that, and by one cap"
    if policy.least_erase != 0.0 or 0.0 in torch.as_tensor(policy.erase):
        return "erases a part of what is written, above nothing"
    if call is None:
        return None
    if reason := unreadable(call):
        return reason
    if call.d_state > 256:
        return f"reads keys of up to 256 channels, not {call.d_state}"
    if policy.caps and not call.simple:
        return "caps no states of the general delta rule"
    if policy.caps and next_power_of_2(call.headdim) * next_power_of_2(call.d_state) > LARGEST_CAPPED:
        return f"caps states of up to 128 x 256 numbers, not {call.headdim} x {call.d_state}"
    return None


def observes(policy: ScanPolicy, call: Call, every: int) -> bool:
    """Return whether the states every so many tokens are seen on the way."""
    return call.simple and every % CHUNK == 0


def run(reading: Reading) -> tuple[Tensor, ScanCarry]:
    """See `Backend.run`."""
    carry, length = reading.carry, reading.inputs.x.shape[1]
    if length == 1 or (reading.policy.caps and reading.graded):
        return pytorch.run(reading)
    placed = reading.looks is not None or bool(reading.policy.caps)  # chunks must begin at certain positions
    if placed and (reading.counts is not None or bool((carry.position != carry.position[0]).any())):
        return pytorch.run(reading)  # rows that stand at several positions
    lead = min(-int(carry.position[0]) % CHUNK, length) if placed else 0
    if not lead:
        return _read(reading)
    y, between = pytorch.run(_part(reading, 0, lead, carry))
    if lead == length:
        return y, between
    between.position = carry.position + lead
    z, after = _read(_part(reading, lead, length, between))
    return torch.cat([y, z], 1), after


def _part(reading: Reading, start: int, stop: int, carry: ScanCarry) -> Reading:
    inputs, gates = reading.inputs.tokens(start, stop), reading.gates.tokens(start, stop)
    return replace(reading, inputs=inputs, gates=gates, carry=carry)


def _read(reading: Reading) -> tuple[Tensor, ScanCarry]:
    inputs, carry, policy, raw = reading.inputs, reading.carry, reading.policy, reading.gates
    gates = raw.worked_out(torch.float32, policy, reading.mask)
    assert isinstance(gates, DeltaGates) and isinstance(raw, DeltaGates)
    x, key, query = (t.contiguous() for t in (inputs.x, inputs.B, inputs.C))
    if raw.simple and (policy.gain != 1.0 or policy.erase != 1.0):
        # fla has one beta, which erases; what is written beside that goes to the values
        gain, erase = (per_head(value, x.shape[2], x) for value in (policy.gain, policy.erase))
        x = x * torch.as_tensor(gain / erase, device=x.device, dtype=x.dtype)[..., None]
    kernels: Any = _general
    if raw.simple:
        kernels = _with_gradients if reading.graded else _forward
    y, state, total = kernels(reading, x, key, query, gates, Rows.of(reading))
    if (D := inputs.D) is not None:
        y = torch.addcmul(y, inputs.x, (D if D.ndim == 2 else D[:, None]).to(y.dtype))
    if total is None:
        total = log_decay_total(carry.log_decay, gates.log_decay, reading.reset)
    return y, ScanCarry(state, carry.position, total)


# y (B, T, H, P), the state (B, H, P, N) after the last token, and the total log-decay (B, H[, N]) where it was at hand
Read = tuple[Tensor, Tensor, Tensor | None]


def _forward(reading: Reading, x: Tensor, key: Tensor, query: Tensor, gates: DeltaGates, rows: Rows) -> Read:
    """Read without gradients, part by part."""
    from fla.ops.common.chunk_o import chunk_fwd_o
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.gla.chunk import chunk_gla_fwd_o_gk
    from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra
    from fla.ops.utils import chunk_local_cumsum

    shape = x.shape
    x, key, query, log_decay, beta = rows.flat(x, key, query, gates.log_decay, gates.erase)
    marks: dict[str, Any] = {"cu_seqlens": rows.edges, "chunk_size": CHUNK}
    g = chunk_local_cumsum(log_decay, scale=LOG2_E, **marks)
    if gates.per_channel:
        w, u, _, k, attention, _ = chunk_kda_fwd_intra(q=query, k=key, v=x, gk=g, beta=beta, scale=1.0, **marks)
    else:
        w, u, _ = chunk_gated_delta_rule_fwd_intra(k=key, v=x, g=g, beta=beta, **marks)
        k = key
    h, v, end, factors = _states(reading, k, w, u, g, rows)
    if gates.per_channel:
        y = chunk_gla_fwd_o_gk(q=query, v=v, g=g, A=attention, h=h, scale=1.0, state_v_first=True, **marks)
    else:
        y = chunk_fwd_o(q=query, k=key, v=v, h=h, g=g, scale=1.0, state_v_first=True, **marks)
    y = y.view(shape)
    if factors is not None:  # the last token of a capped chunk reads the capped state
        whole = shape[1] // CHUNK
        y[:, CHUNK - 1 : whole * CHUNK : CHUNK] *= factors[:, :whole, :, None].to(y.dtype)
    if reading.looks is not None:
        _look(reading, h, end, g)
    whole_rows = rows.edges is None and reading.reset is None
    return y, end[rows.last], _total(reading.carry.log_decay, g) if whole_rows else None


def _total(before: Tensor, g: Tensor) -> Tensor:
    """Return the log-decay (B, H[, N]) float64 since each row began: `before`, and what the last token of every chunk
    has of g (B, T, H[, N]), which is summed within chunks, in units of log 2."""
    ends = g[:, CHUNK - 1 :: CHUNK].sum(1, dtype=torch.float64)
    if g.shape[1] % CHUNK:
        ends = ends + g[:, -1]
    return before + ends / LOG2_E


def _states(
    reading: Reading, k: Tensor, w: Tensor, u: Tensor, g: Tensor, rows: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the states before each chunk, v', the state at the end, and the factors of caps after each chunk, if any:
    see `kernels.states.capped_states`."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h

    from rnn_longctx.recurrence.delta.kernels import blocks
    from rnn_longctx.recurrence.delta.kernels.states import capped_states

    batch, length, heads, headdim = u.shape
    fits = w.shape[3] <= blocks.WIDEST and blocks.chain_rows(batch * heads, headdim, u.device) is not None
    if reading.policy.caps:
        (cap,) = reading.policy.caps
        norms = torch.as_tensor(cap.norm, dtype=torch.float32, device=u.device).expand(heads).contiguous()
        first = (cap.every - int(reading.carry.position[0]) % cap.every) // CHUNK
        if fits and cap.every > CHUNK and length > first * CHUNK:
            return blocks.states_by_blocks(k, w, u, g, rows.states, first, cap.every // CHUNK, norms)
        return capped_states(k, w, u, g, rows.states, norms, first - 1, cap.every // CHUNK)
    if fits and rows.edges is None and blocks.pays(u, BLOCK):
        return blocks.states_by_blocks(k, w, u, g, rows.states, BLOCK, BLOCK)
    decays = {"gk": g} if g.ndim == 4 else {"g": g}
    starts = {"initial_state": rows.states, "output_final_state": True, "state_v_first": True}
    marks = {"cu_seqlens": rows.edges, "chunk_size": CHUNK}
    return *chunk_gated_delta_rule_fwd_h(k=k, w=w, u=u, **decays, **starts, **marks), None


def _look(reading: Reading, h: Tensor, end: Tensor, g: Tensor) -> None:
    """Leave the statistics every k tokens, k a multiple of CHUNK, of tokens that begin at such a position. h
    (B, chunks, H, P, N): the states before each chunk; end: the one after the last token; g (B, T, H[, N]): log-decays
    summed within chunks, in units of log 2."""
    looks, length, position = reading.looks, reading.inputs.x.shape[1], int(reading.carry.position[0])
    assert looks is not None
    k, n, step = looks.every, length // looks.every, looks.every // CHUNK
    states = [h[:, step : n * step + 1 : step]]  # (B, n, H, P, N), without the one after the last token
    if n * k == length:
        states.append(end[:, None])
    parts = [x.flatten(-2) for x in states]
    wide: dict[str, Any] = {"dim": -1, "dtype": torch.float32}
    norm = torch.linalg.vector_norm  # (reads the states where they are, without a copy in float32)
    measured = (
        [x.sum(**wide) for x in parts],
        [norm(x, **wide).square() for x in parts],
        [norm(x, torch.inf, **wide) for x in parts],
    )
    total, square, peak = (torch.cat(values, 1).movedim(1, -1) for values in measured)  # (B, H, n)
    ends = g[:, CHUNK - 1 :: CHUNK][:, : n * step].unflatten(1, (n, step))
    decays = ends.sum(2, dtype=torch.float64).cumsum(1).movedim(1, -1) / LOG2_E  # (B, H[, N], n)
    positions = torch.arange(k, n * k + 1, k) + position
    log_decay = reading.carry.log_decay[..., None] + decays
    looks.seen.append(Statistics(positions, parts[0].shape[-1], total, square, peak, log_decay))


def _with_gradients(reading: Reading, x: Tensor, key: Tensor, query: Tensor, gates: DeltaGates, rows: Rows) -> Read:
    from fla.ops.kda import chunk_kda

    shape, log_decay = x.shape, _by_channel(gates.log_decay, key)
    x, key, query, log_decay, beta = rows.flat(x, key, query, log_decay, gates.erase)
    y, end = chunk_kda(
        query,
        key,
        x,
        log_decay,
        beta,
        scale=1.0,
        initial_state=rows.states,
        output_final_state=True,
        state_v_first=True,
        cu_seqlens=rows.edges,
    )
    return y.view(shape), end[rows.last], None


def _general(reading: Reading, x: Tensor, key: Tensor, query: Tensor, gates: DeltaGates, rows: Rows) -> Read:
    """Read S (diag(a) + p q^T) + v k^T: p = -erase read, decayed where the decay comes first, and q = along."""
    from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule

    shape, heads = x.shape, x.shape[2]
    assert gates.erase is not None
    log_decay = _by_channel(gates.log_decay, key)
    p = -gates.erase[..., None] * by_head(key if gates.read is None else gates.read, heads)
    if gates.decay_first:
        p = p * log_decay.exp()
    along = by_head(key if gates.along is None else gates.along, heads).to(x.dtype)
    x = x * gates.input_scale[..., None].to(x.dtype)
    q, k, v, a, b, gk = rows.flat(by_head(query, heads), by_head(key, heads), x, p.to(x.dtype), along, log_decay)
    start = rows.states.mT.contiguous()
    y, end = chunk_dplr_delta_rule(
        q, k, v, a, b, gk, scale=1.0, initial_state=start, output_final_state=True, cu_seqlens=rows.edges
    )
    return y.view(shape), end[rows.last].mT.contiguous(), None


def _by_channel(log_decay: Tensor, key: Tensor) -> Tensor:
    return log_decay if log_decay.ndim == 4 else log_decay[..., None].expand(*log_decay.shape, key.shape[3])
