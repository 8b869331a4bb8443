"""Read once, ask often: the cache after a document, in a file that only the same weights and policies go on from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.mamba2 import Mamba2LM


def save_state(path: str | Path, cache: Cache, model: Mamba2LM, remedy: str = "none") -> None:
    """Write what `model` has read, as safetensors; `remedy` is named in the message of a load that does not fit."""
    note = {"weights": model.weights_hash, "model": model.name, "policies": policies_hash(model), "remedy": remedy}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cache.save(path, note=note)


def load_state(path: str | Path, model: Mamba2LM) -> Cache:
    """The cache of `save_state`, on the model's device.

    Raises:
        InputError: no such file, other weights, or other policies than those on the model now.
    """
    cache, _, note = Cache.load_with(path, model.device)
    if not isinstance(note, dict) or "weights" not in note:
        raise InputError(f"{path} was not written by save_state: it does not say which weights it belongs to")
    if note["weights"] != model.weights_hash:
        other, ours = f"{note['model']} {note['weights']}", f"{model.name} {model.weights_hash}"
        raise InputError(f"{path} was read by {other}, not by {ours}")
    if note["policies"] != policies_hash(model):
        raise InputError(f"{path} was read with the remedy {note['remedy']}: put the same on, found as it was then")
    return cache


def policies_hash(model: Mamba2LM) -> str:
    """Of the policy of every layer and the reader's control."""
    told: list[Any] = [mixer.policy.hash for mixer in model.mixers]
    return hashlib.sha256(repr((told, model.restart)).encode()).hexdigest()[:16]
