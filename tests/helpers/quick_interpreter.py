"""Triton's interpreter in less time; what it computes is as it was."""

from __future__ import annotations

from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Have Triton's language patched where it is not, and not anew for every function that a kernel calls, as Triton
    3.9 does it. Of a Triton that is built otherwise, nothing changes."""
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter.InterpretedFunction, "rewrite"):
        return
    called: Any = interpreter.InterpretedFunction
    called.__call__ = _call


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if any(tl.core.is_builtin(language.arange) for language in _languages(function.fn)):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


@cache
def _languages(fn: FunctionType) -> list[ModuleType]:
    """Return the modules of the language that a function calls."""
    return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
