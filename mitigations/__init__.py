"""Remedies at inference time, one file each; `mitigate` puts one on a model and takes it off again.

Names are imported on first use, so that a remedy costs the import of its own file and not of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "REMEDIES",
    "Handle",
    "NotApplicable",
    "Plan",
    "Remedy",
    "active",
    "diagnostics",
    "fold",
    "handles_on",
    "mitigate",
    "parse_remedy",
    "standard",
]

# No module is named like one of these: an import of it would put the module in the place of the name.
_WHERE = {
    "REMEDIES": "base",
    "Handle": "attach",
    "NotApplicable": "base",
    "Plan": "base",
    "Remedy": "base",
    "active": "attach",
    "diagnostics": "usual",
    "fold": "folding",
    "handles_on": "attach",
    "mitigate": "attach",
    "parse_remedy": "compose",
    "standard": "usual",
}

if TYPE_CHECKING:
    from rnn_longctx.mitigations.attach import Handle, active, handles_on, mitigate
    from rnn_longctx.mitigations.base import REMEDIES, NotApplicable, Plan, Remedy
    from rnn_longctx.mitigations.compose import parse_remedy
    from rnn_longctx.mitigations.folding import fold
    from rnn_longctx.mitigations.usual import diagnostics, standard


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
