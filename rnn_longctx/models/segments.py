"""How many tokens are read at once, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

SEGMENT = 4096
# Tokens read at once, of all rows together, where a text is only measured. On a CPU a call's activations should stay
# near its caches.
SEGMENTS = {"cpu": 4096, "cuda": 65536}
ELEMENTS = 2**31  # of one view: the kernels of mamba-ssm count them in 32 bits, and read elsewhere beyond


def last_hidden(pieces: Iterable[Tensor]) -> Tensor:
    """Return (B, d_model), the last token's, of a stream's hidden states (B, T, d_model), and keep no piece but the
    last: all of a long stream would take more memory than its model."""
    for piece in pieces:
        last = piece[:, -1]
    return last


def widest(model: Any) -> int:
    """Return the elements a token of the widest view that a layer's kernels of mamba-ssm read: what `in_proj` gives; 0
    where no layer has such kernels."""
    return max((_width(mixer) for mixer in model.mixers if hasattr(mixer, "in_proj")), default=0)


def longest(model: Any, rows: int = 1) -> int | None:
    """Return the most tokens a row that a call may have for another library's kernels to read it rightly, or None where
    there is no such limit: rows * tokens * `widest` < 2^31 on a GPU, where those may be mamba-ssm's (state-spaces/mamba
    #1015). This library's own kernels count in 64 bits."""
    theirs = model.own_forward or "mamba_ssm" in model.backend
    if model.device.type != "cuda" or not theirs or not (width := widest(model)):
        return None
    return max(1, (ELEMENTS - 1) // (max(1, rows) * width))


def too_long(model: Any, rows: int, length: int) -> str | None:
    """Return the warning of a call of that many rows and tokens, None where it is not longer than `longest`."""
    limit = longest(model, rows)
    if limit is None or length <= limit:
        return None
    return (
        f"{model.name}: a call of {rows} x {length:,} tokens through layers {widest(model):,} wide is past the 32-bit "
        f"limit of mamba-ssm's kernels, which then fault or give wrong numbers: read at most {limit:,} tokens at once, "
        "or with rnn_longctx.generate and evaluate, which do"
    )


def kernels_there() -> bool:
    """Whether the kernels of mamba-ssm may run, from its package or the hub's."""
    return any(find_spec(package) is not None for package in ("mamba_ssm", "kernels"))


def reads(model: Any) -> str | None:
    """Return a line that says in what segment a measurement reads an adopted model, all rows together, and the 32-bit
    limit that it is chosen by (`longest`); None where there is no such limit, or no adopted model."""
    limit = longest(model) if model.own_forward else None
    if limit is None:
        return None
    segment, width = SEGMENTS[model.device.type], f"{widest(model):,}"
    if limit >= segment:
        return (
            f"{segment:,} tokens at once: mamba-ssm's kernels have a 32-bit limit of {limit:,}, of layers {width} wide"
        )
    return (
        f"{limit:,} tokens at once instead of {segment:,}: layers {width} wide take mamba-ssm's kernels past their "
        "32-bit limit beyond that"
    )


def _width(mixer: Any) -> int:
    if width := getattr(mixer.in_proj, "out_features", None):
        return int(width)
    module = getattr(mixer, "module", mixer)  # (packed weights may not say it: x, z, B, C and dt)
    groups = getattr(module, "n_groups", getattr(module, "ngroups", 1))
    return 2 * mixer.heads * mixer.headdim + 2 * groups * mixer.d_state + mixer.heads
