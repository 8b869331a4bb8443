"""One context over several ranks, to train on sequences whose activations no single GPU holds, or to read one sooner.

    dist.init_process_group("nccl")  # gloo on CPUs; every rank has the same model
    ids_here, targets = shard(ids)   # ids (B, T + 1), the same on every rank: this rank's tokens, and what follows them
    with sequence_parallel(model):
        hidden = model(ids_here)
        loss = model.losses(hidden, targets).sum() / ids[:, 1:].numel()
        loss.backward()              # on every rank
    reduce_gradients(model)          # now those of one rank that read all of it

Without gradients, a stream longer than fits at once is several calls with one cache, each spread over the ranks:

    cache = model.new_cache()
    with torch.inference_mode(), sequence_parallel(model):
        for piece in ids.tensor_split(calls, 1):
            hidden = model(piece[:, stretch(piece.shape[1])], cache)

Afterwards every rank has the cache of the whole stream, and can go on from it alone. Gradients flow through a cache,
too, unless it is detached. How the ranks work together: `recurrence.ssd.parallel`, and of layers of LongNet
`models.mixers.dilated_ranks`; other attention is not spread. The method is that of sequence-parallel scans (arXiv
2405.21060, section 8.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.shard import Shard
from rnn_longctx.recurrence.ssd.parallel import refusal


def stretch(length: int, group: dist.ProcessGroup | None = None) -> slice:
    """Which of `length` tokens are this rank's: nearly equal parts, the longer ones first. group: None is all ranks."""
    each, more = divmod(length, dist.get_world_size(group))
    rank = dist.get_rank(group)
    first = rank * each + min(rank, more)
    return slice(first, first + each + (rank < more))


def shard(ids: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """This rank's tokens of ids (B, T + 1), all but the last of which are read, and its targets, the token after each:
    both (B, T / R or one more). The last target of a rank is the first token of the next."""
    tokens = stretch(ids.shape[1] - 1, group)
    return ids[:, tokens], ids[:, tokens.start + 1 : tokens.stop + 1]


def least_tokens(model: LM) -> int:
    """Return the tokens that a rank must read at least: what the convolution of the next rank goes on from."""
    return max([1, *(mixer.channels[1] for mixer in model.mixers if mixer.channels is not None)])


def refuse_unspread(model: LM) -> None:
    """Raise InputError for a model some of whose layers several ranks cannot share."""
    mixers = (block.mixer for block in model.layers)
    names = sorted({m.name for m in mixers if not getattr(m, "spreads", not m.attends)})
    if names:
        raise InputError(f"a model with attention layers ({', '.join(names)}) is not read over several ranks")


@contextmanager
def sequence_parallel(model: LM, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside, a call of the model is one call on all ranks of the group: each passes the stretch of the tokens (B, T)
    that is its own (any lengths of at least `least_tokens`; `stretch` cuts equal ones), its part of `reset` where
    rows hold several documents, and the same cache or none; and gets the hidden states of its own tokens. The cache
    becomes that of the whole stream, on every rank.

    Gate rewrites, resets and a stored start are followed exactly; observers see this rank's stretch. Every rank must
    call the model equally often, and backward from its own hidden states, too. Gradients of the cache are summed over
    the ranks that use it.

    Raises:
        InputError: here, another kind of model, other attention than LongNet's, or one that is spread already; in a
            call, on every rank: a stretch that is too short, a policy with a norm cap or a window, a stored start with
            resets, a reader's control, padding; of LongNet, documents and more ranks than shortest segments.
    """
    if not isinstance(model, LM):
        raise InputError(f"only a model of this library is read over several ranks, not {type(model).__name__}")
    refuse_unspread(model)
    if model.spread is not None:
        raise InputError("the model is read over several ranks already")

    def spread(ids: Tensor, mask: Tensor | None, reset: Tensor | None) -> Shard:
        over = f"cannot be followed where a context is read over {dist.get_world_size(group)} ranks"
        if model.restart is not None:
            raise InputError(f"the control {model.restart} {over}")
        if mask is not None and not bool(mask.all()):
            raise InputError(f"padding {over}")
        for policy in {mixer.policy for mixer in model.mixers}:
            if (reason := refusal(policy, reset is not None)) is not None:
                raise InputError(f"the policy {policy.to_dict()} {over}: {reason}")
        return Shard.of(ids, reset, group, least=least_tokens(model))

    model.spread = spread
    try:
        yield
    finally:
        model.spread = None


@torch.no_grad()
def reduce_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Sum the parameters' gradients over the ranks, in place, one all-reduce a type. A rank's loss must be its part of
    a sum: its losses over the count of all ranks' tokens, not over its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        grads = []
        for p in parameters:
            if p.dtype == dtype:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                grads.append(p.grad)
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, group=group)
        for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(summed.view_as(g))
