"""One stream spread over the ranks of a process group: the part of a call's tokens that each of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rnn_longctx.errors import InputError


@dataclass(frozen=True, eq=False)
class Shard:
    """The part that a rank holds of what one call reads: R ranks, B rows.

    Attributes:
        lengths: tokens of each rank.
        since: (R, B) int64 on the CPU, tokens from the last document that begins in a shard on; -1 where none does.
        leads: a bool on the device, whether this rank is the first.
    """

    group: dist.ProcessGroup | None
    rank: int
    lengths: list[int]
    since: Tensor
    leads: Tensor

    @classmethod
    def of(cls, ids: Tensor, reset: Tensor | None, group: dist.ProcessGroup | None, least: int) -> Shard:
        """Return the shard of ids and reset (B, T), which are this rank's. Collective.

        Raises:
            InputError: on all ranks, if one has less than `least` tokens.
        """
        batch, length = ids.shape
        ahead = torch.arange(length, 0, -1, device=ids.device)  # tokens up to the end
        if reset is None or not length:
            since = torch.full((batch,), -1, device=ids.device)
        else:
            since = torch.where(reset, ahead, length + 1).amin(1)
            since = torch.where(since > length, -1, since)
        everyone = gather(group, torch.cat([since.new_tensor([length]), since]))[0].cpu()
        lengths, rank = everyone[:, 0].tolist(), dist.get_rank(group)
        if min(lengths) < least:
            raise InputError(f"each rank must hold {least} tokens or more, and those of this call hold {lengths}")
        return cls(group, rank, lengths, everyone[:, 1:], torch.tensor(rank == 0, device=ids.device))

    @property
    def total(self) -> int:
        """The tokens that all ranks read."""
        return sum(self.lengths)

    def positions(self, first: Tensor) -> list[Tensor]:
        """Return R + 1 of (B,): where rows that stood at `first` stand before each shard and after the last."""
        positions = [first]
        for length, since in zip(self.lengths, self.since):
            positions.append(torch.where(since >= 0, since, positions[-1] + length))
        return positions

    def edges(self, inputs: Tensor, taps: int, before: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what a causal convolution of `taps` more inputs than outputs has before this shard, and after the last
        one, both (B, channels, taps). inputs (B, T, channels); before: what it had before the first. Collective."""
        edge = inputs[:, inputs.shape[1] - taps :]
        if reset is not None:
            document = reset.long().cumsum(1)
            edge = edge * (document[:, document.shape[1] - taps :] == document[:, -1:])[..., None]
        edge = edge.transpose(1, 2)
        before = torch.zeros_like(edge) if before is None else before.to(edge.dtype)
        all_edges = _Everyone.apply(edge, self.group)
        # alike on every rank, so that the gradients' collectives are, too
        return torch.where(self.leads, before, all_edges[self.rank - 1]).contiguous(), all_edges[-1]


class _Everyone(torch.autograd.Function):
    """(R, *shape) from a tensor of each rank; the gradient of each is the sum of what the ranks send back to it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather(group, tensor)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def gather(group: dist.ProcessGroup | None, *tensors: Tensor) -> list[Tensor]:
    """Return (R, *shape) of each tensor, that of every rank, in one all-gather of their bytes."""
    sent = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group)
    pieces = torch.stack(received).split([t.nbytes for t in tensors], 1)
    return [piece.contiguous().view(t.dtype).view(-1, *t.shape) for piece, t in zip(pieces, tensors)]
