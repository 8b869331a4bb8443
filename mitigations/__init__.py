"""Remedies at inference time, one file each; `mitigate` puts one on a model and takes it off again.

Names are imported on first use, so that a remedy costs the import of its own file and not of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnn_longctx.lazy import on_first_use

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
    "REMEDIES": "rnn_longctx.mitigations.base",
    "Handle": "rnn_longctx.mitigations.attach",
    "NotApplicable": "rnn_longctx.mitigations.base",
    "Plan": "rnn_longctx.mitigations.base",
    "Remedy": "rnn_longctx.mitigations.base",
    "active": "rnn_longctx.mitigations.attach",
    "diagnostics": "rnn_longctx.mitigations.usual",
    "fold": "rnn_longctx.mitigations.folding",
    "handles_on": "rnn_longctx.mitigations.attach",
    "mitigate": "rnn_longctx.mitigations.attach",
    "parse_remedy": "rnn_longctx.mitigations.compose",
    "standard": "rnn_longctx.mitigations.usual",
}

if TYPE_CHECKING:
    from rnn_longctx.mitigations.attach import Handle, active, handles_on, mitigate
    from rnn_longctx.mitigations.base import REMEDIES, NotApplicable, Plan, Remedy
    from rnn_longctx.mitigations.compose import parse_remedy
    from rnn_longctx.mitigations.folding import fold
    from rnn_longctx.mitigations.usual import diagnostics, standard

__getattr__, __dir__ = on_first_use(__name__, _WHERE)
