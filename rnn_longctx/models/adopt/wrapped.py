"""Models inside other models: which wrappers are read as what is inside them, and what is refused.

A wrapper is looked through where its forward equals that of the model inside: `torch.compile`, DataParallel and
DistributedDataParallel, `AveragedModel`, `nn.Sequential` of one, and peft's adapters that live in the layers (LoRA,
DoRA, IA3, ...). What puts something before the text, or does more than the model inside, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rnn_longctx.errors import InputError
from rnn_longctx.models.hashing import Identified
from rnn_longctx.models.patches import patched

SCALES = ("lm_head_multiplier", "logits_scaling")  # of FalconH1's, and one over GraniteMoeHybrid's logits
_PASS_ON: tuple[Any, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def layers_of(model: Any) -> Iterator[Any]:
    """Yield a model, what it passes everything on to, what that does, and so on: the last is no wrapper."""
    while True:
        yield model
        if (inside := _inside(model)) is None:
            return
        model = inside


def innermost(model: Any) -> Any:
    """Return the model inside a wrapper that passes everything on to it, or the model itself."""
    *_, inner = layers_of(model)
    return inner


def unwrapped(model: Any) -> Any:
    """Return the model inside a wrapper, or the model itself. Raises InputError where the wrapper does more than pass
    everything on, or where what it holds cannot be read."""
    *wrappers, inner = layers_of(model)
    for wrapper in (*wrappers, inner):
        if reason := _refusal(wrapper):
            raise InputError(f"{type(wrapper).__name__} {reason}")
    names = _models_in(inner) if not is_model(inner) else []
    if names:
        raise InputError(
            f"{type(inner).__name__} is a wrapper whose forward this library does not know: give the model inside it, "
            + " or ".join(f"MODEL.{name}" for name in names[:3])
        )
    return inner


def unreadable(model: nn.Module) -> str | None:
    """Why a model takes remedies in its own forward alone, or None where our reading equals that forward."""
    kind = type(model)
    if not is_model(model):
        return f"{kind.__name__} is no MambaLMHeadModel, nor a model of transformers"
    home = next(c for c in kind.__mro__ if "forward" in vars(c)).__module__
    if not home.startswith(("transformers.", "mamba_ssm.")):
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(model) and not hasattr(model, "_hf_hook"):  # (a hook of accelerate's moves tensors alone)
        mixed = " (mixed precision of accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False) undoes it)"
        return f"the forward of {kind.__name__} was replaced{mixed if hasattr(model, '_original_forward') else ''}"
    if patched(model):
        return f"{kind.__name__} has a hook on the whole model, of which this library calls the parts"
    if home.startswith("mamba_ssm."):
        return None
    inner: Any = model
    text = inner.config.get_text_config()
    if text is not inner.config and any(getattr(text, name, None) is not None for name in SCALES):
        return f"{kind.__name__} holds a text model that scales its logits, which it need not do"
    if inner.base_model is model and inner.get_output_embeddings() is not None:
        return f"{kind.__name__} does not say what stands before its head"
    return None


def is_model(model: Any) -> bool:
    """Whether it is a model of transformers, with or without a head, of mamba_ssm, or of this library."""
    return isinstance(model, Identified) or any(
        (c.__module__, c.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        or c.__module__.startswith("mamba_ssm.models.")
        for c in type(model).__mro__
    )


def holds(module: nn.Module, name: str, ndim: int) -> bool:
    """Whether a module has a tensor of its own, of so many axes, and not by way of another that it passes names on to
    (as a compiled module does)."""
    parametrized = isinstance(vars(type(module)).get(name), property)
    if not (name in module._parameters or name in module._buffers or parametrized):
        return False
    tensor = getattr(module, name)
    return isinstance(tensor, Tensor) and tensor.ndim == ndim


def _inside(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        return None
    if "_orig_mod" in model._modules:  # torch.compile
        return model._orig_mod
    for kind in _PASS_ON:
        if isinstance(model, kind) and type(model).forward is kind.forward:
            return model.module
    if type(model) is nn.Sequential and len(model) == 1 and is_model(innermost(model[0])):
        return model[0]
    if _of_peft(model):
        tuner = _tuner(model)
        return tuner.model if _of_peft(tuner) else tuner
    return None


def _of_peft(model: Any) -> bool:
    """Whether it is a PeftModel, or the tuner inside one."""
    return hasattr(model, "peft_config") and any(c.__module__.startswith("peft.") for c in type(model).__mro__)


def _tuner(model: Any) -> Any:
    return model._modules.get("base_model", model)  # (a tuner passes names on to what is inside it)


def _refusal(model: Any) -> str | None:
    names = {c.__name__ for c in type(model).__mro__}
    if names & {"FSDPModule", "FullyShardedDataParallel"} or _sharded(model):
        return "has its weights spread over ranks (FSDP, tensor parallel): give a model that holds them whole"
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        return "makes a copy of the model for every device: give the model inside it, MODEL.module"
    if getattr(model, "mixed_precision", None) is not None and isinstance(model, nn.parallel.DistributedDataParallel):
        return "computes at another precision than the model inside it: give that, MODEL.module"
    if not _of_peft(model):
        return None
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            return f"puts virtual tokens before the text ({kind}): give the model inside it, MODEL.get_base_model()"
        if getattr(config, "alora_invocation_tokens", None):
            phrase = "switches its adapter on at a phrase of the prompt (aLoRA), which a stream does not"
            return f"{phrase}: give the model inside it, MODEL.get_base_model()"
    tuner: Any = _tuner(model)
    passes_on = "peft.tuners.tuners_utils", "peft.tuners.adalora.model"  # (AdaLoRA's adds to a loss alone)
    if type(tuner).forward.__module__ not in passes_on:
        return f"has a forward of its own ({kind}): give the model inside it, MODEL.get_base_model()"
    return None


def _sharded(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(type(p).__name__ == "DTensor" for p in model.parameters())


def _models_in(model: nn.Module) -> list[str]:
    """The outermost models of a library inside it, by their names."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and not inside and is_model(module):
            names.append(name)
    return names
