"""Calibration must never see what is evaluated: a text is told by its hash, by its path, and by its documents.

Two texts share some where a document of at least LEAST bytes is in both, byte for byte (a file and the folder it lies
in, a folder and one inside it, copies of either elsewhere), or where all of one stands somewhere in the other. A
calibration file keeps digests of its text's documents, the DIGESTS smallest: in a larger folder a single file may go
unnoticed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn_longctx.data import Text, load_text
from rnn_longctx.errors import InputError

if TYPE_CHECKING:
    from rnn_longctx.measure.calibration import Calibration
    from rnn_longctx.mitigations import Handle

LEAST = 200  # bytes: shorter files (empty packages, notices) are alike everywhere
DIGESTS = 4096


def digests(text: Text) -> frozenset[str]:
    """Return 12 hex digits for each document of at least LEAST bytes."""
    documents = (d for d in text.documents() if len(d) >= LEAST)
    return frozenset(hashlib.blake2b(d, digest_size=6).hexdigest() for d in documents)


def smallest_digests(text: Text) -> list[str]:
    """Return the DIGESTS smallest digests, which a calibration file keeps of its text."""
    return sorted(digests(text))[:DIGESTS]


def shared(a: Text, b: Text) -> bool:
    """Return whether two texts have a document in common, or one of them is part of the other."""
    small, large = sorted((a.data, b.data), key=len)
    return not digests(a).isdisjoint(digests(b)) or small in large


def nested(a: Any, b: Any) -> bool:
    """Return whether two names of texts are paths, one of them in the other."""
    if not (isinstance(a, str | Path) and isinstance(b, str | Path)):
        return False
    paths = [Path(str(p).removeprefix("file:").removeprefix("dir:")).expanduser().resolve() for p in (a, b)]
    return all(p.exists() for p in paths) and (paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]))


def check_unseen(handles: list[Handle], text: Text, named: Any = None, calibration_named: Any = None) -> None:
    """Refuse remedies that were calibrated on what is to be evaluated.

    Args:
        handles: of the remedies on a model.
        text: to be evaluated.
        named, calibration_named: how the two texts were named, where by a path.
    Raises:
        InputError: which remedy, and what it was calibrated on.
    """
    for handle in handles:
        for calibration in handle.plan.calibrations:
            if source := _seen(calibration, handle.text, text, named, calibration_named):
                raise InputError(
                    f"{handle.remedy} was calibrated on {source}, which is to be evaluated: that would flatter it"
                )


def _seen(
    calibration: Calibration, calibrated_on: Text | None, text: Text, named: Any, calibration_named: Any
) -> str | None:
    """Return in words what of a text a calibration has seen, or None. calibrated_on: the text given for it, if any."""
    if calibration.text_hash == text.hash:
        return text.name
    source = calibrated_on or (load_text("builtin") if calibration.text == "builtin" else None)
    if source and source.hash != calibration.text_hash:  # given to a remedy that reads none
        source = None
    if source and (shared(source, text) or nested(named, calibration_named)):
        return f"{source.name}, which shares text with {text.name}"
    if not digests(text).isdisjoint(calibration.documents):
        return f"{calibration.source}, which shares text with {text.name}"
    return None
