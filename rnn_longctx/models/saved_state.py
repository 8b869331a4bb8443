"""Read once, ask often: the cache after a document, in a file that only the same weights and policies go on from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from rnn_longctx.config import home_path
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.adopt.cache import AdoptedCache
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.adopt.saved import from_cache, to_cache
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.models.checkpoint.legacy import is_of
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.precision import computes_as


def save_state(
    path: str | Path,
    cache: Cache | AdoptedCache,
    model: LanguageModel | nn.Module,
    remedy: str = "none",
    target: int | None = None,
) -> None:
    """Write what `model` has read, as safetensors; of an adopted hybrid with attention's keys and values, which grow
    with the tokens read.

    Args:
        remedy: named in the message of a load that does not fit.
        target: the length the remedy was worked out for, for `target_of`.
    Raises:
        InputError: a remedy is on that reads prompts its own way, attention's cache is no plain one of keys and values,
            or the file cannot be written.
    """
    model = as_language_model(model)
    if model.reader is not None:
        raise InputError(f"what {remedy} leaves of a prompt cannot be gone on from: its state is not kept")
    note = {
        "weights": model.weights_hash,
        "model": model.name,
        "policies": policies_hash(model),
        "remedy": remedy,
        "target": target,
        "states": str(model.state_dtype),
        "dtype": computes_as(model),
    }
    try:
        home_path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    plain, extra = to_cache(cache) if isinstance(cache, AdoptedCache) else (cache, {})
    plain.save(path, extra, note)


def target_of(path: str | Path) -> int | None:
    """Return the length that the remedy of a saved state was worked out for, so that it can be worked out again."""
    note = Cache.load_with(path)[2]
    return note.get("target") if isinstance(note, dict) else None


def load_state(path: str | Path, model: LanguageModel | nn.Module) -> StreamCache:
    """Return the cache (of the model's kind) that `save_state` wrote, on the model's device.

    Raises:
        InputError: no such file, another model or one that has changed since, or other policies, or another type of
            states or of numbers than the model has now.
    """
    model = as_language_model(model)
    cache, extra, note = Cache.load_with(path, model.device)
    if not isinstance(note, dict) or "weights" not in note:
        raise InputError(f"{path} was not written by save_state: it does not say which weights it belongs to")
    if not is_of(note["weights"], model, now := model.weights_hash):
        other, ours = f"{note['model']} {note['weights']}", f"{model.name} {now}"
        raise InputError(f"{path} was read by {other}, not by {ours}: load that model, or read the prompt again")
    if note["policies"] != policies_hash(model):
        raise InputError(f"{path} was read {_same_remedy(note['remedy'])}, or read the prompt again")
    if note.get("states", "None") != str(model.state_dtype):
        precision = dtype_name(note["states"]).replace("None", "full precision")
        raise InputError(f"{path} was read with states in {precision}: give the same --state-dtype")
    if (was := note.get("dtype")) not in (None, now := computes_as(model)):
        raise InputError(f"{path} was read in {was}, and {model.name} computes in {now} now: go on in {was}")
    return from_cache(model, cache, extra) if isinstance(model, Adopted) else cache


def _same_remedy(remedy: str) -> str:
    """Return how a saved state was read, and what to put on the model so that it can be gone on from."""
    if remedy == "none":
        return "without a remedy, and one is on now: go on without it"
    return (
        f"with the remedy {remedy}, and what is on now is not the same: go on with --mitigation {remedy}, "
        "with the calibration text and files that it had then"
    )


def policies_hash(model: LanguageModel) -> str:
    """Return a hash of the policy of every layer, of how positions are scaled, and of the reader's control."""
    hashes = [mixer.policy.hash for mixer in model.mixers]
    hashes += [repr(mixer.yarn) for mixer in model.rotary if mixer.yarn is not None]
    return hashlib.sha256(repr((hashes, model.restart)).encode()).hexdigest()[:16]
