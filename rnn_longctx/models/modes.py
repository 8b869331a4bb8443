"""Evaluation mode: what measures, generates, probes, calibrates or watches reads without dropout, and leaves every
module in the mode that it was in."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from rnn_longctx.models.hashing import Identified
from rnn_longctx.models.interface import LanguageModel

Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def evaluating(model: LanguageModel | nn.Module | None) -> Iterator[None]:
    """Put a model (ours, an adopted one, or any module) in evaluation mode inside the block. Each module's own flag is
    put back, since some may have been frozen in evaluation mode; also after an exception."""
    root = module_of(model)
    before = [(m, m.training) for m in root.modules()] if root is not None else []
    if root is None or not any(training for _, training in before):
        yield
        return
    root.eval()
    try:
        yield
    finally:
        root.train()  # (a module may do more there than set its flag)
        for m, training in before:
            m.training = training


def in_evaluation(function: Function) -> Function:
    """Decorate a function whose first argument is a model (`evaluating`). Not for generators, which would leave the
    model in evaluation mode between two of their values."""

    @functools.wraps(function)
    def evaluated(*args: Any, **kwargs: Any) -> Any:
        with evaluating(args[0] if args else kwargs.get("model")):
            return function(*args, **kwargs)

    return evaluated  # type: ignore[return-value]


def warn_of_training(model: LanguageModel, stacklevel: int = 4) -> None:
    """Warn where a model of another library is watched in training mode, which watching itself leaves as it is."""
    module = module_of(model)
    if module is not model and module is not None and any(m.training for m in module.modules()):
        warnings.warn(
            f"{model.name} is in training mode, where dropout may be on: what its own calls show is not what it does "
            "in evaluation mode, of which envelopes and monitors are; model.eval() changes it",
            RuntimeWarning,
            stacklevel=stacklevel,
        )


def module_of(model: object) -> nn.Module | None:
    """Return the module whose mode a model has, or None for what is no model."""
    if isinstance(model, nn.Module):
        return model
    return model.module if isinstance(model, Identified) else None
