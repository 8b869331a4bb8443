"""Mamba-2 language model (arXiv 2405.21060) that reads a context as a stream.

Parameter names are those of the official checkpoints. A layer's `policy` is what remedies change; the model's
`restart` is a reader's control (see `rnn_longctx.models.restart`). Nothing about a stream is kept on the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache, Carry
from rnn_longctx.models.layers import RMSNorm, Unscaled, causal_conv
from rnn_longctx.models.losses import head_losses, token_losses
from rnn_longctx.models.precision import state_dtype
from rnn_longctx.models.restart import Restart, read_restarting
from rnn_longctx.models.weights import Identified
from rnn_longctx.ssd import PLAIN, Call, Observer, ScanPolicy, asked_of, choose, scan

if TYPE_CHECKING:
    from rnn_longctx.ssd.parallel import Stretch

# (model, ids (B, T), segment) to the logits (B, vocab) after the last token, and the cache
Reader = Callable[[Any, Tensor, int], tuple[Tensor, Cache]]
LARGEST = torch.finfo(torch.float32).max
LARGEST_SIZE = 2**24  # of a model's shape: beyond, a config is damaged, and making the model would take for ever


def dt_limits(limits: Any, name: str) -> tuple[float, float]:
    """Return the limits of dt as a scan takes them: an upper one beyond float32 is infinite, no limit.

    Raises:
        InputError: not two numbers, one that is none, negative ones, the lower above the upper, no room above 0.
    """
    try:
        low, high = map(float, limits)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not 0 <= low <= high or high == 0 or low > LARGEST:
        raise InputError(f"{name}: expected two limits of a step, from 0 on, the lower first, got {limits!r:.60}")
    return low, high if high <= LARGEST else math.inf


@dataclass
class Mamba2Config:
    """Shape of a model and how to initialise one. Names follow mamba-ssm.

    A_init and A_log_uniform: range that -A is drawn from; dt_init: range of the initial step, log-uniform.
    """

    d_model: int = 256
    n_layer: int = 6
    vocab_size: int = 256
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    bias: bool = False
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    A_init: tuple[float, float] = (1.0, 16.0)
    A_log_uniform: bool = False
    dt_init: tuple[float, float] = (1e-3, 1e-1)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "headdim", "ngroups"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise InputError(f"{name} must be at least 1 and at most {LARGEST_SIZE}, got {getattr(self, name)}")
        self.dt_limit = dt_limits(self.dt_limit, "dt_limit")
        if not 0 <= self.norm_eps <= LARGEST:
            raise InputError(f"norm_eps: expected a small number, at least 0, got {self.norm_eps}")
        if self.d_inner % self.headdim:
            raise InputError(f"expand * d_model = {self.d_inner} must be a multiple of headdim = {self.headdim}")
        if self.nheads % self.ngroups:
            raise InputError(f"{self.nheads} heads do not divide into ngroups = {self.ngroups}")
        for name in ("A_init", "dt_init"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= LARGEST:
                raise InputError(f"{name}: expected a range above 0, its lower end first, got {[low, high]}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def scan_state_elements(self) -> int:
        return self.n_layer * self.nheads * self.headdim * self.d_state

    @property
    def conv_state_elements(self) -> int:
        return self.n_layer * self.conv_dim * (self.d_conv - 1)


class Mamba2(nn.Module):
    """One mixer. `policy` is data: set it, and the next token follows it. `observer`, `state_dtype`: see `scan`."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        c = self.config = config
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner + 2 * c.ngroups * c.d_state + c.nheads, bias=c.bias)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.d_conv, groups=c.conv_dim, bias=c.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(c.nheads))
        self.A_log = nn.Parameter(torch.empty(c.nheads))
        self.D = nn.Parameter(torch.ones(c.nheads))
        self.norm = RMSNorm(c.d_inner, c.norm_eps, c.ngroups)
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.bias)
        self.policy: ScanPolicy = PLAIN
        self.backend: str | None = None
        self.observer: Observer | None = None
        self.state_dtype: torch.dtype | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c = self.config
        low, high = (math.log(v) for v in c.dt_init)
        dt = torch.empty(c.nheads).uniform_(low, high).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        if c.A_log_uniform:
            self.A_log.uniform_(math.log(c.A_init[0]), math.log(c.A_init[1]))
        else:
            self.A_log.copy_(torch.empty(c.nheads).uniform_(*c.A_init).log())
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight /= math.sqrt(c.n_layer)

    @property
    def A(self) -> Tensor:
        """(H), at least float32: the rate at which each head decays, below 0."""
        refuse_offloaded(self.A_log, "a mixer")
        return -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()

    @property
    def heads(self) -> int:
        return self.config.nheads

    @property
    def headdim(self) -> int:
        return self.config.headdim

    @property
    def d_state(self) -> int:
        return self.config.d_state

    def steps(self, projected: Tensor) -> Tensor:
        """dt (B, T, H), after softplus and clamp, from what `in_proj` gives (B, T, ...)."""
        return F.softplus(projected[..., -self.heads :] + self.dt_bias).clamp(*self.config.dt_limit)

    def forward(self, u: Tensor, carry: Carry | None, mask: Tensor | None, reset: Tensor | None,
                unscaled: bool = False, stretch: Stretch | None = None) -> tuple[Tensor | Unscaled, Carry]:  # fmt: skip
        """(B, T, d_model) in and out, with the carry after it. unscaled: where the scan can apply the norm, its factor
        a token may be left to the sum that comes next, which saves a pass over memory. stretch: of the stream, where it
        is spread over several ranks; the carries are then those before and after all of it."""
        c = self.config
        z, xBC, dt = self.in_proj(u).split([c.d_inner, c.conv_dim, c.nheads], -1)
        if mask is not None:
            xBC = xBC * mask[..., None]
        edge = carry.conv if carry else None
        if stretch is not None:
            edge, last = stretch.edges(xBC, c.d_conv - 1, edge, reset)
        xBC, conv = causal_conv(xBC, self.conv1d, edge, reset)
        x, B, C = xBC.split([c.d_inner, c.ngroups * c.d_state, c.ngroups * c.d_state], -1)
        groups = (c.ngroups, c.d_state)
        # a factor a token may be applied after the last product, unless a hook sees or edits what is before or behind
        last_product = self.out_proj
        linear = last_product.bias is None and not (last_product._forward_hooks or last_product._forward_pre_hooks)
        gate = self.norm.gate(z.unflatten(-1, (c.nheads, c.headdim))) if unscaled and linear else None
        conv = conv if stretch is None else last
        y, scanned = (scan if stretch is None else stretch.scan)(
            x.unflatten(-1, (c.nheads, c.headdim)), dt, self.A,
            B.unflatten(-1, groups), C.unflatten(-1, groups), dt_bias=self.dt_bias, dt_limit=c.dt_limit, D=self.D,
            policy=self.policy, carry=carry.scan if carry else None, reset=reset, mask=mask, backend=self.backend,
            observer=self.observer, gate=gate, state_dtype=self.state_dtype,
        )  # fmt: skip
        if gate is not None and gate.squares is not None:
            out = Unscaled(self.out_proj(y.flatten(-2)), gate.squares, c.d_inner, self.norm.eps)
            return out, Carry(conv, scanned)
        return self.out_proj(self.norm(y.flatten(-2), z)), Carry(conv, scanned)


class Block(nn.Module):
    """Pre-norm residual block: h <- h + mixer(norm(h)). The sum is made together with the norm after it."""

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2(config)


class Backbone(nn.Module):
    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]


class Mamba2LM(Identified, nn.Module):
    """A language model whose context is a stream.

    Attributes:
        name, train_length, tokenizer, provenance, calibration: filled in by `rnn_longctx.load`.
        weights_hash: of what the model computes now, in whatever layout it was stored (see `digest`).
        eos_token_id: the id or ids that its config ends an answer with, beside the tokenizer's, or None.
        restart: a control that drops the state and reads the last tokens again, or None.
        reader: how a prompt is read where that is not token after token, or None.
        spread: finds the stretch of a call, of ids, mask and reset, where a stream is spread over several ranks (see
            `rnn_longctx.train.parallel`), or None.
    """

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.name = "unnamed"
        self.train_length: int | None = None
        self.tokenizer: Any = None
        self.eos_token_id: int | list[int] | None = None
        self.provenance: dict = {}
        self.restart: Restart | None = None
        self.reader: Reader | None = None
        self.spread: Callable[[Tensor, Tensor | None, Tensor | None], Stretch] | None = None

    @property
    def module(self) -> Mamba2LM:
        return self

    @property
    def tied(self) -> bool:
        return self.lm_head.weight is self.backbone.embedding.weight

    # --- the layer interface that remedies and probes use

    @property
    def mixers(self) -> list[Mamba2]:
        """The recurrent layers, in order."""
        return [block.mixer for block in self.backbone.blocks]

    @property
    def backend(self) -> str:
        """The scan that the present policies choose here."""
        asked = asked_of(self.dtype, self.state_dtype)
        call = Call(self.device, asked, False, self.config.headdim, self.config.d_state)
        return "+".join(sorted({choose(m.policy, m.backend, call).name for m in self.mixers}))

    def use_backend(self, name: str | None) -> None:
        """Force one scan backend for every layer (None: choose). Raises InputError if it is missing here."""
        choose(PLAIN, name)
        for mixer in self.mixers:
            mixer.backend = name

    @property
    def state_dtype(self) -> torch.dtype | None:
        """What the state is rounded to between calls, or None: see `use_state_dtype`."""
        return self.mixers[0].state_dtype

    def use_state_dtype(self, dtype: torch.dtype | str | None) -> None:
        """Keep every layer's recurrent state at another precision than the scan's own, which is float32 (float64 in a
        float64 model; None goes back to it): float32, bfloat16, float16 or float64.

        The state is rounded whenever a call hands it on, that is after each segment of a prompt and after each token in
        generation, and nowhere else: within a call the scan is float32 (float64 for a float64 state, too). A sliding
        window's delay line is rounded with it; a convolution's last inputs are as they were.

        Raises:
            InputError: another type.
        """
        found = state_dtype(dtype, self.dtype)
        for mixer in self.mixers:
            mixer.state_dtype = found

    @property
    def device(self) -> torch.device:
        return refuse_offloaded(self.backbone.embedding.weight, self.name).device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.embedding.weight.dtype

    # --- reading

    def forward(self, ids: Tensor, cache: Cache | None = None, mask: Tensor | None = None,
                reset: Tensor | None = None) -> Tensor:  # fmt: skip
        """Read ids (B, T) and return the hidden states (B, T, d_model) after the last norm.

        Args:
            cache: what the stream has read so far; it is moved on in place. None starts and forgets a stream.
            mask: (B, T) bool, False at left padding (only before a row's first token).
            reset: (B, T) bool, True where a new document begins.
        """
        cache = cache if cache is not None else Cache()
        if self.restart is not None:
            if reset is not None:
                raise InputError(f"the control {self.restart} cannot be combined with document boundaries")
            return read_restarting(self.read, self.restart, ids, cache, mask)
        return self.read(ids, cache, mask, reset)

    def read(self, ids: Tensor, cache: Cache, mask: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        """`forward` without the reader's control."""
        if cache.layers and len(cache.position) != len(ids):
            raise InputError(f"the cache holds {len(cache.position)} rows, the ids {len(ids)}")
        stretch = None if self.spread is None else self.spread(ids, mask, reset)
        if ids.shape[1] == 0:
            return self.backbone.embedding.weight.new_zeros(*ids.shape, self.config.d_model)
        if mask is not None and bool(mask.all()):
            mask = None
        h, out, carries = self.backbone.embedding(ids), None, []
        for i, block in enumerate(self.backbone.blocks):
            normed, h = block.norm.add(h, out, self.config.residual_in_fp32)
            before = cache.layers[i] if cache.layers else None
            out, carry = block.mixer(normed, before, mask, reset, unscaled=True, stretch=stretch)
            carries.append(carry)
        length = ids.shape[1] if stretch is None else stretch.total
        read = torch.full((len(ids),), length, device="cpu") if mask is None else mask.sum(1).cpu()
        cache.position = read + (cache.position if cache.layers else 0)
        cache.layers = carries
        return self.backbone.norm_f.add(h, out, self.config.residual_in_fp32)[0]

    def stream(self, ids: Tensor, cache: Cache | None = None, segment: int = 4096) -> Iterator[Tensor]:
        """Hidden states of ids (B, T), or (T), one row, a segment at a time, in the memory of one segment."""
        ids, cache = rows_of(ids), self.new_cache() if cache is None else cache
        for t in range(0, ids.shape[1], segment):
            yield self(ids[:, t : t + segment].to(self.device), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) float32 from hidden states (..., d_model)."""
        logits = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) in nats, (B, T), from hidden states (B, T, d_model); never all logits at once. A target
        of -100 is ignored: 0, without a gradient."""
        if torch.is_grad_enabled() and isinstance(self.lm_head, nn.Linear):  # (no adapter around it)
            return head_losses(hidden, self.lm_head.weight, targets)
        return token_losses(self.logits, self.config.vocab_size, hidden, targets)

    def new_cache(self) -> Cache:
        return Cache()


def refuse_offloaded(weight: Tensor, name: str) -> Tensor:
    """The weight. InputError where there are no numbers in it: what is read in here is read whole, on one device."""
    if weight.is_meta:
        raise InputError(
            f"the weights of {name} are offloaded, and this library's own models are read whole: load it anew"
        )
    return weight


def rows_of(ids: Any, wanted: str = "a stream is read from token ids (B, T) or (T) of whole numbers") -> Tensor:
    """Token ids as a tensor (B, T), int64, (T) as one row. Raises InputError for anything else."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":  # in any order of items and of bytes
        ids = np.ascontiguousarray(ids, dtype=np.int64)
    try:
        rows = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{wanted}; got {type(ids).__name__} {ids!r:.60}") from None
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise InputError(f"{wanted}; got shape {tuple(rows.shape)}")
    if rows.numel() and (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool):
        raise InputError(f"{wanted}; got {str(rows.dtype)[6:]} of shape {tuple(rows.shape)}")
    return rows.long()
