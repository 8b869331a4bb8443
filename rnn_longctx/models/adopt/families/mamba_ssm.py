"""Models with mamba_ssm's Mamba-2 mixers (Mamba2, Mamba2Simple) under our policies.

    model = MambaLMHeadModel.from_pretrained(...)
    with rnn_longctx.mitigate(model, "rri:alpha=0.999,beta=0.75"):
        model.generate(ids, max_length=...)  # not with cg=True: that replays what was recorded without a remedy

A mixer's parts are its own; between them, while a policy is active, stand our convolution and scan. The state lies in
the library's tensor, which stays where it is: `beside` is an attribute of it. Where that tensor is made here and not
by `allocate_inference_cache` it is of the type that states are kept in (float32); the library's is of the weights'.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.beside import Beside, joined
from rnn_longctx.models.adopt.cache import AdoptedCache, in_order
from rnn_longctx.models.adopt.families.mamba2 import is_mamba_ssm
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import AdoptedMixer, Call
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.adopt.stepped import UNLIMITED, SteppedAdopted
from rnn_longctx.models.conv import causal_conv
from rnn_longctx.recurrence.carry import tree_map
from rnn_longctx.recurrence.gates import ScanInputs


class MambaSSMMixer(SteppedAdopted):
    """A mixer whose layer of the library's cache is its state's tensor (B, H, P, N); see `AdoptedMixer`."""

    def __init__(self, module: nn.Module, name: str):
        m: Any = module
        self.entries = tuple(n for n in ("forward", "step") if hasattr(m, n))
        self.width = getattr(m, "d_ssm", m.d_inner)  # channels that the scan reads; what is left of d_inner is an MLP
        super().__init__(m, name)
        home = next(c for c in type(m).__mro__ if "forward" in vars(c))
        if not home.__module__.startswith("mamba_ssm."):  # ours would stand before what it does otherwise
            raise InputError(f"{name} ({type(m).__name__}) has a forward of its own, and is not adopted")
        if getattr(m, "process_group", None) is not None:
            raise InputError(f"{name} is split over several devices, and is not adopted")
        if getattr(m, "learnable_init_states", False):
            raise InputError(f"{name} starts from a learned state, and is not adopted")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.module.nheads, self.module.headdim, self.module.d_state

    @property
    def dt_limit(self) -> tuple[float, float]:
        return tuple(self.module.dt_limit)

    @property
    def D(self) -> Tensor:
        D = self.module.D
        return D.view(self.heads, self.headdim) if len(D) != self.heads else D

    def layer_of(self, library: Any) -> Tensor:
        return library.key_value_memory_dict[self.module.layer_idx][1]

    def state_of(self, layer: Tensor) -> Tensor:
        return layer

    def conv_of(self, library: Any) -> Tensor:
        return library.key_value_memory_dict[self.module.layer_idx][0][..., 1:]  # (the library never reads the first)

    def lay(self, layer: Any, beside: Beside) -> None:
        layer.beside = beside

    @property
    def weight(self) -> Tensor:
        """The convolution's weight, which is used without a call of its own. InputError where accelerate has taken it
        away."""
        if (weight := self.module.conv1d.weight).is_meta:
            raise InputError(
                f"the weights of {self.name} are offloaded, and mamba_ssm's mixers are read whole: load it anew"
            )
        return weight

    def new_states(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return what a row begins with: inputs of the convolution (B, channels, d_conv) and state (B, H, P, N), of
        zeros."""
        weight = self.weight
        dtype = self.state_dtype or torch.promote_types(weight.dtype, torch.float32)
        conv = weight.new_zeros(batch, self.module.d_conv, len(weight)).transpose(1, 2)  # (laid out as the library's)
        return conv, torch.zeros(batch, *self.shape, dtype=dtype, device=weight.device)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mixer's projections, and ours between them. `mask` (B, T) bool is False at left padding; several
        tokens may follow what the cache has read.

        Raises:
            InputError: inference_params of `generate(cg=True)`; packed rows without seq_idx, or with a cache.
        """
        if not self.active:
            return self.original("forward")(*args, **kwargs)
        arguments = self.arguments(args, kwargs)
        u, seqlen, seq_idx, params = (arguments.get(n) for n in ("u", "seqlen", "seq_idx", "inference_params"))
        if arguments.get("cu_seqlens") is not None and (params is not None or seq_idx is None):
            raise InputError("packed sequences need seq_idx beside cu_seqlens, and no cache")
        if getattr(params, "lengths_per_sample", None) is not None:
            raise InputError("a recorded CUDA graph knows no remedy: generate without cg=True")
        assert isinstance(u, Tensor)
        rows = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if params is None:
            out = self._layer(rows, None, True, arguments.get("mask"), seq_idx)
        else:
            states, index = params.key_value_memory_dict, self.module.layer_idx
            if index not in states:
                states[index] = self.new_states(len(rows))
            out = self._layer(rows, states[index], params.seqlen_offset == 0, arguments.get("mask"), seq_idx)
        return out if seqlen is None else out.flatten(0, 1)

    @torch.compiler.disable
    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step as the mixer does: hidden_states (B, T, d_model), T of any length; both states are moved on in place.
        States of zeros that have seen no policy begin a row."""
        if not self.active:
            return self.original("step")(hidden_states, conv_state, ssm_state)
        known = getattr(ssm_state, "beside", None) is not None
        fresh = not known and not bool(ssm_state.any()) and not bool(conv_state.any())
        return self._layer(hidden_states, (conv_state, ssm_state), fresh, None, None), conv_state, ssm_state

    def _layer(
        self, u: Tensor, states: tuple[Tensor, Tensor] | None, fresh: bool, mask: Tensor | None, seq_idx: Tensor | None
    ) -> Tensor:
        """Read u (B, T, d_model) and return as much. `fresh`: rows begin, whatever the states hold."""
        m, (heads, headdim, d_state), _ = self.module, self.shape, self.weight
        projected = m.in_proj(u)
        both = m.ngroups * d_state
        mlp = (projected.shape[-1] - 2 * self.width - 2 * both - heads) // 2
        gate, more, z, xBC, dt = projected.split([mlp, mlp, self.width, self.width + 2 * both, heads], -1)
        if mask is not None:
            xBC = xBC * mask[..., None]
        conv, state = states if states is not None else (None, None)
        reset = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        before = None if fresh or conv is None else conv[..., 1:].contiguous()
        xBC, after = causal_conv(xBC, m.conv1d, before, reset)
        x, B, C = xBC.split([self.width, both, both], -1)
        groups = (m.ngroups, d_state)
        # The library's step ignores the limits of dt.
        limited = fresh or u.shape[1] > 1 or self.limit_in_decode
        inputs = ScanInputs(x.unflatten(-1, (heads, headdim)), B.unflatten(-1, groups), C.unflatten(-1, groups), self.D)
        gates = self.gates(dt, self.dt_limit if limited else UNLIMITED)
        y, new = self.read(Call(self, state, mask, fresh), inputs, gates, None if fresh else state, seq_idx)
        if conv is not None and state is not None:
            conv.copy_(F.pad(after, (1, 0)))
            state.copy_(new)
        y = y.flatten(2)
        y = m.norm(y, z) if getattr(m, "rmsnorm", True) else y * F.silu(z)
        return m.out_proj(torch.cat([F.silu(gate) * more, y], -1) if mlp else y)


class AdoptedMambaSSM(Adopted):
    """A MambaLMHeadModel, or its backbone, as a stream; any other model that holds mamba_ssm's Mamba-2 mixers takes
    remedies in its own forward, and cannot be read here.

    Tokens with padding, and several that follow others, are read by our convolution and scan under any policy: the
    library's own read neither.
    """

    library = "mamba_ssm"

    def __init__(self, model: nn.Module, mixers: list[AdoptedMixer]):
        super().__init__(model, mixers)
        self.base = getattr(model, "backbone", model)

    @property
    def embedding(self) -> Any:
        if not (hasattr(self.base, "embedding") and hasattr(self.base, "layers")):
            kind = type(self.model).__name__
            raise InputError(f"{kind} is no MambaLMHeadModel: mitigate it, and read with its own forward")
        return self.base.embedding

    @property
    def attends(self) -> bool:
        return len(getattr(self.base, "layers", ())) > len(self.mixers)

    @property
    def head(self) -> Any:
        return getattr(self.model, "lm_head", None)

    @property
    def d_model(self) -> int:
        return self.embedding.embedding_dim

    def _attention_size(self) -> int:
        return sum(2 * m.num_heads_kv * m.head_dim for m in self.model.modules() if hasattr(m, "num_heads_kv"))

    def layer_by_layer(self) -> None:
        return None

    def new_cache(self) -> AdoptedCache:
        return MambaSSMCache(self.mixers)

    def _call(self, ids: Tensor, cache: AdoptedCache, mask: Tensor | None, before: Tensor, padding: Tensor) -> Tensor:
        from mamba_ssm.utils.generation import InferenceParams

        blocks = self.base.layers if self.embedding is not None else ()
        if len(blocks) != len(self.mixers):
            raise InputError(
                f"{self.name} has layers of attention, which must know the length of a stream beforehand: mitigate the "
                "model, and read with its own generate"
            )
        if cache.library is None:
            states = {m.module.layer_idx: m.new_states(len(ids)) for m in self.mixers}  # type: ignore[attr-defined]
            cache.library = InferenceParams(2**31 - 1, len(ids), key_value_memory_dict=states)
        params = cache.library
        params.seqlen_offset = cache.seen
        ours = mask is not None or (cache.seen > 0 and ids.shape[1] > 1)
        try:
            for mixer in self.mixers if ours else ():
                mixer.continue_stream(True)
            for mixer in self.mixers:
                if cache.seen and mixer.active:
                    mixer.place(mixer.layer_of(params), before)
            masked = {} if mask is None else {"mask": mask}
            return self.base(ids, inference_params=params, **masked)
        finally:
            for mixer in self.mixers if ours else ():
                mixer.continue_stream(False)


class MambaSSMCache(AdoptedCache):
    """An `AdoptedCache` whose `library` is mamba_ssm's InferenceParams."""

    @staticmethod
    def concat(parts: list[AdoptedCache], order: list[int]) -> AdoptedCache:
        """Return the rows of several caches as one cache; see `Cache.concat`."""
        cat, new = in_order(order), parts[0].clone()
        states = new.library.key_value_memory_dict
        for key in states:
            pairs = [p.library.key_value_memory_dict[key] for p in parts]
            besides: list[Any] = [getattr(state, "beside", None) for _, state in pairs]
            states[key] = tuple(cat(list(tensors)) for tensors in zip(*pairs))
            if besides[0] is not None:
                states[key][1].beside = joined(besides, cat)
        new.library.max_batch_size = len(order)
        new.stand_where(parts, cat)
        return new

    def _reorder(self, index: Tensor) -> None:
        states = self.library.key_value_memory_dict
        for key, (conv, state) in states.items():
            beside = getattr(state, "beside", None)
            states[key] = tuple(t[index.to(t.device)] for t in (conv, state))
            if beside is not None:
                states[key][1].beside = tree_map(lambda t: t[index.to(t.device)], beside)
        self.library.max_batch_size = len(index)


FAMILIES.register(Family("mamba_ssm", is_mamba_ssm, MambaSSMMixer, AdoptedMambaSSM))
