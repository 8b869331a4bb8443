"""Families of mixers that are adopted: one file each in `rnn_longctx.models.adopt.families`, which registers itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.mixer import AdoptedMixer
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.checkpoint.layouts import ADOPTED_NAMES, NOT_ADOPTED
from rnn_longctx.registry import Registry


@dataclass(frozen=True)
class Family:
    """Mixers of other libraries that are adopted in the same way.

    Attributes:
        name: its own, and its file's.
        fits: whether a module is such a mixer; no module fits two families.
        mixer: makes the adopted mixer of a module and its path in the model.
        model: what a model with such mixers becomes. One of a class of its own holds no mixers of other families.
    """

    name: str
    fits: Callable[[nn.Module], bool]
    mixer: Callable[[nn.Module, str], AdoptedMixer]
    model: type[Adopted] = Adopted


FAMILIES: Registry[Family] = Registry("family of adopted mixers", "rnn_longctx.models.adopt.families")


def adopted_by_family(model: nn.Module) -> Adopted:
    """Return a model of another library as what its families make of it. InputError: it has no mixer of any."""
    kind, mixers = mixers_in(model)
    if not mixers:
        raise InputError(_nothing_found(model))
    return kind(model, mixers)


def mixers_in(model: nn.Module) -> tuple[type[Adopted], list[AdoptedMixer]]:
    """Return what a model of another library becomes, and its mixers of any family, none of which stands yet before
    its module's methods."""
    families = list(FAMILIES.values())
    fitting = [(family, m, name) for name, m in model.named_modules() for family in families if family.fits(m)]
    kind = next((family.model for family, _, _ in fitting if family.model is not Adopted), Adopted)
    return kind, [family.mixer(m, name) for family, m, name in fitting if family.model is kind]


def _nothing_found(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if reason := NOT_ADOPTED.get(str(model_type)):
        return f"{type(model).__name__} ({model_type}) is not adopted: {reason}"
    kinds = sorted({type(m).__name__ for m in model.modules() if m is not model and list(m.children())})
    return (
        f"{type(model).__name__} has no recurrence that this library knows; adopted are models of transformers "
        f"(mamba2, {ADOPTED_NAMES}) and of mamba_ssm (Mamba-2); no module has the parts of Mamba-2 (A_log with one "
        "value a head, dt_bias, in_proj, conv1d), Mamba-1 (A_log, dt_proj, x_proj), Gated DeltaNet (A_log, dt_bias, "
        "conv1d, head_k_dim), KDA (forget_gate, b_proj, conv1d), lightning attention (slope_rate, qkv_proj) or an "
        f"RG-LRU (rg_lru, conv_1d); found {', '.join(kinds[:6]) or 'no submodules'}"
    )
