"""Token filtering (LongMamba, arXiv 2504.16053): heads that see far skip the tokens that matter least to them.

    global heads    exp(sum of dt A over the training length) > theta
    there           tokens with dt < g(target length) are skipped: log-decay 0, input scale 0

Reads dt of every head on a calibration text, within the training length, and takes for g the smallest step size with
which the decay summed over the target length is what training showed over its own: sum over T of dt >= (L / T) * sum
over T of dt [dt >= g]. The largest `clamp` of the steps (the paper's 5%) count as
the step at that quantile there, and g never exceeds it: far more is then kept than the sum allows, and recall with it.
Steps that equal g but for rounding are kept.
On the demo at 16K, clamp 0.05 finds every passkey at a loss of 1.95, clamp 0 one in five at 1.70. Changes global heads,
and nothing at or below the training length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import steps_of
from rnn_longctx.mitigations.base import REMEDIES, Need, Plan, Remedy, same_everywhere, train_length
from rnn_longctx.models.interface import LanguageModel, stepped_mixers
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.spec import Range, tuned

if TYPE_CHECKING:
    from rnn_longctx.data import Text

# Of g, which is a step of the text: the first layer's hang on the token alone, and all tokens of that kind would be
# kept or skipped as rounding has it, otherwise in every cut of a stream.
MARGIN = 1e-4


@REMEDIES.register
@dataclass(frozen=True)
class TokenFilter(Remedy):
    """Let heads that see far skip tokens of small steps.

    Attributes:
        theta: what must be left of the first token for a head to see far, in (0, 1).
        clamp: share of the largest steps that count as the step at that quantile, in [0, 1).
    """

    name = "token-filter"
    needs = frozenset({Need.RECURRENCE, Need.STEPS, Need.TRAIN_LENGTH, Need.TARGET_LENGTH})
    per_length = True
    search = "quantile"
    examples = ("token-filter:theta=0.01,clamp=0.0",)
    theta: float = tuned(0.05, over=Range(1e-3, 0.5, "log"))
    clamp: float = tuned(0.05, over=Range(0.0, 0.3), quiet=True)

    def __post_init__(self) -> None:
        if not 0 < self.theta < 1:
            raise InputError(f"token-filter: theta must lie in (0, 1), got {self.theta:g}")
        if not 0 <= self.clamp < 1:
            raise InputError(f"token-filter: clamp must lie in [0, 1), got {self.clamp:g}")

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        return {"theta": [0.01, 0.05, 0.2], "clamp": [0.0, 0.05]}

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        length = train_length(model, "token-filter")
        assert target_length is not None  # (`needs`)
        steps, calibration = steps_of(model, length, text)
        if target_length <= length:
            return Plan(same_everywhere(model), calibrations=(calibration,), weights=model.weights_hash)
        policies = []
        for mixer, dt in zip(stepped_mixers(model), steps):
            far = (dt.sum(1).mean(0) * mixer.A.detach().cpu().float()).exp() > self.theta
            g = thresholds(dt.flatten(0, 1), length / target_length, self.clamp)
            policies.append(ScanPolicy(min_dt=tuple(torch.where(far, g * (1 - MARGIN), 0.0).tolist())))
        return Plan(tuple(policies), calibrations=(calibration,), weights=model.weights_hash)


def thresholds(dt: Tensor, share: float, clamp: float) -> Tensor:
    """g (H) for steps dt (n, H), the largest clamped: the smallest such that those from it on sum to at most `share` of
    all; infinity where not even the largest does."""
    dt = dt.sort(0, descending=True).values
    dt = dt.minimum(dt[int(clamp * len(dt))])
    sums = dt.cumsum(0)
    largest = (sums <= share * sums[-1]).sum(0)  # how many stay
    smallest = dt.gather(0, (largest - 1).clamp(min=0)[None])[0]
    return torch.where(largest > 0, smallest, float("inf"))
