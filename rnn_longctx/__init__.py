"""Find where a recurrent language model stops working as its context grows, why, and what fixes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnn_longctx.lazy import on_first_use
from rnn_longctx.version import __version__ as __version__

__all__ = [
    "Cache",
    "CollapseError",
    "CollapseMonitor",
    "InputError",
    "adopt",
    "evaluate",
    "fold",
    "generate",
    "generate_stream",
    "load",
    "load_text",
    "mitigate",
    "record",
    "register",
]

# Imported on first use: `import rnn_longctx` alone stays light.
_WHERE = {
    "Cache": "rnn_longctx.models",
    "CollapseError": "rnn_longctx.errors",
    "CollapseMonitor": "rnn_longctx.probes.monitor.monitor",
    "InputError": "rnn_longctx.errors",
    "adopt": "rnn_longctx.models.adopt.adopting",
    "evaluate": "rnn_longctx.eval",
    "fold": "rnn_longctx.mitigations",
    "generate": "rnn_longctx.models.generate",
    "generate_stream": "rnn_longctx.models.generate",
    "load": "rnn_longctx.models.load",
    "load_text": "rnn_longctx.data",
    "mitigate": "rnn_longctx.mitigations",
    "record": "rnn_longctx.probes.trace",
    "register": "rnn_longctx.plugins",
}

if TYPE_CHECKING:
    from rnn_longctx.data import load_text
    from rnn_longctx.errors import CollapseError, InputError
    from rnn_longctx.eval import evaluate
    from rnn_longctx.mitigations import fold, mitigate
    from rnn_longctx.models.adopt.adopting import adopt
    from rnn_longctx.models.cache import Cache
    from rnn_longctx.models.generate import generate, generate_stream
    from rnn_longctx.models.load import load
    from rnn_longctx.plugins import register
    from rnn_longctx.probes.monitor.monitor import CollapseMonitor
    from rnn_longctx.probes.trace import record

__getattr__, __dir__ = on_first_use(__name__, _WHERE, ("__version__",))
