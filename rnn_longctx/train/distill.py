"""What a retrofitted decoder learns from the full attention that it had.

    gate      of each sparse part, KL(teacher || gate): how the teacher shares its weight out over the blocks that a
              query may choose from, summed up block by block, against the softmax of the part's scores; each query and
              head counts by the weight that the teacher gives to these blocks (after SeerAttention, arXiv 2410.13276)
    hidden    of each retrofitted layer, |output - teacher's|^2 / |teacher's|^2, after the same input, the teacher's
              (attention transfer of LoLCATs, arXiv 2410.10254)
    logits    KL(teacher || student) of the next token, the student reading by itself
    lm        the text's own loss, which needs no teacher

Gate and hidden losses are of a layer by itself, so that no layer learns from what another does wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rnn_longctx.models.retrofit.attention import RetrofitAttention, project
from rnn_longctx.models.retrofit.heads import COS, KEYS, QUERIES, SIN, VALUES
from rnn_longctx.models.retrofit.model import Retrofitted
from rnn_longctx.models.retrofit.pooled import QUERIES as AT_ONCE
from rnn_longctx.models.retrofit.pooled import Inputs, in_blocks, softmax_weights, watched
from rnn_longctx.models.sparse import SparseAttention
from rnn_longctx.recurrence.span import Span

LOSSES = ("gate", "hidden", "logits", "lm")
OF_TEACHER = LOSSES[:3]
GATE_QUERIES = 1024  # of a context, at most, whose choice is compared: their place is drawn anew for every batch
TOKENS = 1024  # whose logits are held at once


def losses_of(
    student: Retrofitted,
    teacher: Retrofitted | None,
    ids: Tensor,
    wanted: tuple[str, ...],
    rng: np.random.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the wanted losses, in the order of LOSSES, of ids (B, T + 1). There is no gate loss where no sparse part
    has a block to choose, and hidden needs a retrofitted layer.

    Args:
        teacher: needed for all but lm; its gradients are not.
        rng: draws the queries whose choice is compared. None: the last ones, which have most to choose from.
    """
    read, targets = ids[:, :-1], ids[:, 1:]
    layers = [i for i, attention in enumerate(student.attentions) if isinstance(attention, RetrofitAttention)]
    out: dict[str, Tensor] = {}
    hidden_of_teacher = None
    if teacher is not None:
        watches = teacher.attentions if layers and {"gate", "hidden"} & {*wanted} else []
        with torch.no_grad(), watched([watches[i] for i in layers] if watches else []) as seen:
            hidden_of_teacher = hidden_states(teacher, read)
        pairs = [(student.attentions[i], teacher.attentions[i], seen[n]) for n, i in enumerate(layers) if watches]
        if "gate" in wanted and (gates := _gate_losses(pairs, read.shape[1], rng)):
            out["gate"] = torch.stack(gates).mean()
        if "hidden" in wanted and pairs:
            out["hidden"] = torch.stack([hidden_loss(ours, inputs) for ours, _, inputs in pairs]).mean()
    if "logits" in wanted or "lm" in wanted:
        hidden = hidden_states(student, read)
        if "logits" in wanted and teacher is not None and hidden_of_teacher is not None:
            out["logits"] = logits_loss(student, teacher, hidden, hidden_of_teacher)
        if "lm" in wanted:
            out["lm"] = student.losses(hidden, targets).mean()
    return out


def hidden_states(model: Retrofitted, ids: Tensor) -> Tensor:
    """Return the hidden states (B, T, d_model) after the last norm, with gradients and without a cache."""
    return model.base(input_ids=ids, use_cache=False)[0]


def hidden_loss(ours: RetrofitAttention, inputs: Inputs) -> Tensor:
    """Return the error of a retrofitted layer's output against the teacher's, as a share of that one's size."""
    output, _ = ours(inputs.u, inputs.angles)
    return (output - inputs.output).float().square().sum() / inputs.output.float().square().sum().clamp(min=1e-30)


def _gate_losses(pairs: list[tuple[Any, Any, Inputs]], length: int, rng: np.random.Generator | None) -> list[Tensor]:
    number = min(length, GATE_QUERIES)
    start = length - number if rng is None else int(rng.integers(length - number + 1))
    queries = slice(start, start + number)
    return [
        loss
        for ours, teachers, inputs in pairs
        for part in ours.parts
        if isinstance(part, SparseAttention)
        if (loss := gate_loss(part, ours, teachers, inputs, queries)) is not None
    ]


def gate_loss(part: Any, ours: RetrofitAttention, teachers: Any, inputs: Inputs, queries: slice) -> Tensor | None:
    """Return the KL of a part's choice of blocks from the teacher's, in nats, the mean over some queries and the part's
    heads by the weight that the teacher gives to what they choose from; None where they choose from nothing."""
    u = inputs.u
    cos, sin = (x.expand(len(u), -1, -1) for x in inputs.angles)
    shared = {**dict(zip((QUERIES, KEYS, VALUES), project(ours, u))), COS: cos, SIN: sin}
    scores, candidates = part.block_scores(u, None, Span(shared=shared), queries)  # (B, H, t, M), (B, t, M)
    if not bool(candidates.any()):
        return None
    heads = torch.tensor(part.of_heads.queries, device=u.device)
    with torch.no_grad():
        weights = [
            in_blocks(softmax_weights(teachers, inputs, slice(t, min(t + AT_ONCE, queries.stop))), part.config.block)
            for t in range(queries.start, queries.stop, AT_ONCE)
        ]
        target = torch.cat(weights, 2)[:, heads, :, : scores.shape[3]] * candidates[:, None]
        share = target.sum(3)
        target = target / share[..., None].clamp(min=1e-30)
    scores = scores.masked_fill(~candidates[:, None], torch.finfo(scores.dtype).min)
    kl = (torch.xlogy(target, target) - target * scores.log_softmax(3)).sum(3)
    return (share * kl).sum() / share.sum().clamp(min=1e-30)


def logits_loss(student: Retrofitted, teacher: Retrofitted, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean KL(teacher || student), in nats a token, of hidden states (B, T, d_model) of both; never all
    logits at once."""

    def some(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.logits(b).log_softmax(-1)
        return F.kl_div(student.logits(a).log_softmax(-1), target, reduction="sum", log_target=True)

    a, b = ours.flatten(0, 1).split(TOKENS), theirs.flatten(0, 1).split(TOKENS)
    parts: list[Any] = [checkpoint(some, x, y, use_reentrant=False) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum() / (ours.shape[0] * ours.shape[1])
