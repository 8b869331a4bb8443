"""What a person put around a module's forward: hooks that edit activations (steering, ablation), forwards replaced.

A hook's text is its code and what it reads: plain values and tensors, of its closure, its defaults, its object and the
globals that it names. Lists and dictionaries are left out, since hooks that only watch collect into those. Hooks of
this library's and of those that bring a model's own function about are no part of it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_THEIRS = ("rnn_longctx", "torch", "transformers", "accelerate", "peft", "kernels")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def patches(module: nn.Module) -> Iterator[str]:
    """Yield a text for each hook on a module's own forward, and one where that was replaced in the object."""
    for kind in _HOOKS:
        for hook in vars(module)[kind].values():
            if not _theirs(hook):
                yield f"{kind}={_text(hook)}"
    forward = vars(module).get("forward")
    if forward is not None and "_hf_hook" not in vars(module) and not _theirs(forward):
        inner = inspect.unwrap(forward)
        if getattr(inner, "__func__", inner) is not type(module).forward:
            yield f"forward={_text(forward)}"


def patched(module: nn.Module) -> bool:
    """Whether a person put anything around a module's forward."""
    return next(patches(module), None) is not None


def _theirs(call: Any) -> bool:
    while isinstance(call, functools.partial):
        call = call.func
    home = getattr(call, "__module__", None) or type(call).__module__
    return home.partition(".")[0] in _THEIRS


def _text(call: Any, depth: int = 3) -> str:
    """A function's code and what it reads; of what it calls itself too, as deep as is said."""
    if not depth:
        return getattr(call, "__qualname__", type(call).__qualname__)
    if isinstance(call, functools.partial):
        more = {str(i): v for i, v in enumerate(call.args)} | call.keywords
        return f"{_text(call.func, depth)} {_values(more, depth)}"
    if isinstance(call, MethodType):
        owner = call.__self__
        reads = {} if isinstance(owner, nn.Module | type) else getattr(owner, "__dict__", {})
        return f"{_text(call.__func__, depth)} {_values(reads, depth)}"
    if not isinstance(call, FunctionType):
        method = inspect.getattr_static(type(call), "__call__", None)
        code = _text(method, depth) if isinstance(method, FunctionType) else ""
        return f"{type(call).__qualname__} {code} {_values(getattr(call, '__dict__', {}), depth)}"
    reads = {name: call.__globals__[name] for name in call.__code__.co_names if name in call.__globals__}
    reads |= {str(i): v for i, v in enumerate(call.__defaults__ or ())} | (call.__kwdefaults__ or {})
    for name, cell in zip(call.__code__.co_freevars, call.__closure__ or ()):
        try:
            reads[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    return f"{call.__qualname__} {_code(call.__code__)} {_values(reads, depth)}"


def _code(code: CodeType) -> str:
    inside = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return hashlib.sha256("\n".join([code.co_code.hex(), *code.co_names, *inside]).encode()).hexdigest()[:16]


def _values(values: Mapping[str, Any], depth: int) -> str:
    texts = []
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor | np.ndarray):
            t = torch.as_tensor(value).detach().cpu().contiguous()
            data = t.reshape(-1).view(torch.uint8).numpy().tobytes()
            texts.append(f"{name}={t.dtype} {list(t.shape)} {hashlib.sha256(data).hexdigest()[:16]}")
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
            texts.append(f"{name}={value!r}")
        elif isinstance(value, FunctionType | MethodType | functools.partial) and not _theirs(value):
            texts.append(f"{name}={_text(value, depth - 1)}")
    return "{" + ", ".join(texts) + "}"
