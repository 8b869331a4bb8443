"""The best few of many blocks for every query, without looking closely at each of them.

On a CPU `Tensor.topk` takes as long a number as the product that makes it. The largest of every GROUP numbers is found
eight times as fast, and the k best of all are members of the k groups whose largest are best: so these groups are found
first, and the best among their members.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # numbers of a group, each far from the next in memory, so that vector instructions compare many groups
FEWEST = 64  # groups a number that is wanted: of fewer PyTorch's topk is another algorithm, three times as slow


def largest(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the values and the places (..., top) of the largest of scores (..., m), the best first; top <= m."""
    groups = scores.shape[-1] // GROUP
    if groups < FEWEST * max(top, 1):
        values, index = scores.topk(top)
        return values, index
    best = scores[..., : groups * GROUP].unflatten(-1, (GROUP, groups)).amax(-2).topk(top, sorted=False).indices
    places = torch.arange(scores.shape[-1], device=scores.device)
    members = (best[..., None] + places[: groups * GROUP : groups]).flatten(-2)
    rest = places[groups * GROUP :]
    if len(rest):
        members = torch.cat([members, rest.expand(*members.shape[:-1], -1)], -1)
    values, index = scores.gather(-1, members).topk(top)
    return values, members.gather(-1, index)
