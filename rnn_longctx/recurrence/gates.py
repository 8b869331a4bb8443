"""What a recurrence reads: its inputs, and the gates that say how much of the state is kept and how much is written.

    S_t = exp(log_decay_t) * S_{t-1} + input_scale_t * x_t B_t^T

Gates are given (`Gates`: gated linear attention and its relatives), or worked out of a step dt as in Mamba
(`SteppedGates`): then the fast kernels work them out themselves, and they are never stored. Those of a delta rule
(`DeltaGates`) say beside that what is erased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy, per_head

UNLIMITED = (0.0, math.inf)
STEP_FIELDS = frozenset({"min_dt"})  # the fields of a policy that mean nothing where gates are given


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """The inputs of a scan; in the words of attention x are the values, B the keys, C the queries.

    Attributes:
        x: (B, T, H, P).
        B, C: (B, T, G, N), G dividing H.
        D: (H) or (H, P): D * x is added to the output; None adds nothing.
    """

    x: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def tokens(self, start: int, stop: int) -> ScanInputs:
        """Return the inputs of the tokens from `start` up to and without `stop`."""
        return ScanInputs(self.x[:, start:stop], self.B[:, start:stop], self.C[:, start:stop], self.D)


@dataclass(frozen=True, eq=False)
class Gates:
    """Gates that a layer gives, token by token.

    Attributes:
        log_decay: (B, T, H), or (B, T, H, N) for decays per channel; natural logarithms.
        input_scale: (B, T, H).
    """

    log_decay: Tensor
    input_scale: Tensor

    @property
    def per_channel(self) -> bool:
        return self.log_decay.ndim == 4

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors a gradient may be asked of."""
        return self.log_decay, self.input_scale

    @property
    def from_tensors(self) -> Callable[..., Gates]:
        """What makes such gates of their tensors, without holding any."""
        return Gates

    def tokens(self, start: int, stop: int) -> Gates:
        """Return the gates of the tokens from `start` up to and without `stop`."""
        return Gates(self.log_decay[:, start:stop], self.input_scale[:, start:stop])

    def worked_out(self, dtype: torch.dtype, policy: ScanPolicy = PLAIN, mask: Tensor | None = None) -> Gates:
        """Return the gates in `dtype`, changed by a policy's mul, add and gain. Where `mask` (B, T) is False both are
        0: the token changes nothing.

        Raises:
            InputError: a policy with min_dt, which is about a step that given gates do not have.
        """
        if policy.min_dt != 0.0:
            raise InputError(
                "min_dt leaves out tokens by the size of their step dt, and this layer's gates have no step"
            )
        return _changed(self.log_decay.to(dtype), self.input_scale.to(dtype), policy, mask)


@dataclass(frozen=True, eq=False)
class SteppedGates:
    """Gates that follow from a step, as in Mamba-2 (arXiv 2405.21060): dt = clamp(softplus(dt + dt_bias), dt_limit),

        log_decay = dt * A,   input_scale = dt

    Attributes:
        dt: (B, T, H), before bias and softplus.
        A: (H), or (H, N) for decays per channel; negative in Mamba.
        dt_bias: (H), or None.
        dt_limit: the smallest and the largest step.
        softplus: whether the softplus is taken.
    """

    dt: Tensor
    A: Tensor
    dt_bias: Tensor | None = None
    dt_limit: tuple[float, float] = UNLIMITED
    softplus: bool = True

    @property
    def per_channel(self) -> bool:
        return self.A.ndim == 2

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors a gradient may be asked of."""
        return self.dt, self.A, self.dt_bias

    @property
    def from_tensors(self) -> Callable[..., SteppedGates]:
        """What makes such gates of their tensors, without holding any."""
        return partial(SteppedGates, dt_limit=self.dt_limit, softplus=self.softplus)

    def tokens(self, start: int, stop: int) -> SteppedGates:
        """Return the gates of the tokens from `start` up to and without `stop`."""
        return SteppedGates(self.dt[:, start:stop], self.A, self.dt_bias, self.dt_limit, self.softplus)

    def worked_out(self, dtype: torch.dtype, policy: ScanPolicy = PLAIN, mask: Tensor | None = None) -> Gates:
        """Return the gates as numbers of `dtype`, changed by a policy's mul, add, gain and min_dt. Where `mask` (B, T)
        is False both are 0: the token changes nothing."""
        dt, A = self.dt.to(dtype), self.A.to(dtype)
        if self.dt_bias is not None:
            dt = dt + self.dt_bias.to(dtype)
        if self.softplus:
            dt = F.softplus(dt)
        if self.dt_limit != UNLIMITED or not self.softplus:  # softplus is above 0 by itself
            dt = dt.clamp(*self.dt_limit)
        return _changed(dt[..., None] * A if self.per_channel else dt * A, dt, policy, mask)

    def stepping(self, steps: Tensor) -> SteppedGates:
        """Return gates of the same rates whose steps are `steps` (B, T, H) as they are. Under a policy with a `min_dt`
        above 0 tokens of step 0 are skipped."""
        return SteppedGates(steps, self.A, softplus=False)


@dataclass(frozen=True, eq=False)
class DeltaGates:
    """Gates of a delta rule, which erases before it writes: with a = exp(log_decay),

        S_t = S_{t-1} diag(a_t) - erase_t (S' read_t) along_t^T + input_scale_t * x_t B_t^T

    where S' is S_{t-1} diag(a_t), or S_{t-1} where `decay_first` is False. Gated DeltaNet and KDA read and erase along
    the key B_t, and erase as much as they write, input_scale = beta; GDN-2 reads along a gated key; RWKV-7 reads along
    a normalised key before the decay, and erases along a gated one. The general S (diag(a) + p q^T) is read = p,
    along = q, erase = -1.

    Attributes:
        log_decay: (B, T, H), or (B, T, H, N) for decays per channel; natural logarithms.
        input_scale: (B, T, H).
        erase: (B, T, H), how much of what was read is taken away; None is as much as is written, input_scale.
        read, along: (B, T, G, N), as B and C of `ScanInputs`; None is B, the key.
        decay_first: whether what is read has decayed.
    """

    log_decay: Tensor
    input_scale: Tensor
    erase: Tensor | None = None
    read: Tensor | None = None
    along: Tensor | None = None
    decay_first: bool = True

    @property
    def per_channel(self) -> bool:
        return self.log_decay.ndim == 4

    @property
    def simple(self) -> bool:
        """Whether the key is read and erased, by as much as is written: Gated DeltaNet, KDA and DeltaNet."""
        return self.erase is None and self.read is None and self.along is None and self.decay_first

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors a gradient may be asked of."""
        return self.log_decay, self.input_scale, self.erase, self.read, self.along

    @property
    def from_tensors(self) -> Callable[..., DeltaGates]:
        """What makes such gates of their tensors, without holding any."""
        return partial(DeltaGates, decay_first=self.decay_first)

    def tokens(self, start: int, stop: int) -> DeltaGates:
        """Return the gates of the tokens from `start` up to and without `stop`."""
        return self.from_tensors(*(None if t is None else t[:, start:stop] for t in self.tensors))

    def worked_out(self, dtype: torch.dtype, policy: ScanPolicy = PLAIN, mask: Tensor | None = None) -> DeltaGates:
        """Return the gates in `dtype`, `erase` a tensor, changed by a policy's mul, add, gain, erase and least_erase.
        Where `mask` (B, T) is False the token decays, erases and writes nothing.

        Raises:
            InputError: a policy with min_dt, as `Gates.worked_out` does.
        """
        plain = Gates(self.log_decay, self.input_scale).worked_out(dtype, policy, mask)
        erase = (self.input_scale if self.erase is None else self.erase).to(dtype)
        heads = erase.shape[-1]
        if policy.erase != 1.0:
            erase = per_head(policy.erase, heads, erase) * erase
        if policy.least_erase != 0.0:
            erase = erase.clamp(min=per_head(policy.least_erase, heads, erase))
        if mask is not None:
            erase = erase * mask[..., None]
        read, along = (None if t is None else t.to(dtype) for t in (self.read, self.along))
        return DeltaGates(plain.log_decay, plain.input_scale, erase, read, along, self.decay_first)


AnyGates = Gates | SteppedGates | DeltaGates


def _changed(log_decay: Tensor, scale: Tensor, policy: ScanPolicy, mask: Tensor | None) -> Gates:
    """Return the gates under a policy. With min_dt the scale that comes in is the step."""
    per_channel, step, heads = log_decay.ndim == 4, scale, scale.shape[-1]
    if policy.changes_gates:
        mul, add, gain = (per_head(v, heads, scale) for v in (policy.mul, policy.add, policy.gain))
        if per_channel:
            mul, add = (v if isinstance(v, float) else v[:, None] for v in (mul, add))
        log_decay = mul * log_decay + add
        scale = gain * scale
    if policy.min_dt != 0.0:
        keep = step >= per_head(policy.min_dt, heads, step)
        log_decay, scale = log_decay * (keep[..., None] if per_channel else keep), scale * keep
    if mask is not None:
        real = mask[..., None]
        log_decay, scale = log_decay * (real[..., None] if per_channel else real), scale * real
    return Gates(log_decay, scale)
