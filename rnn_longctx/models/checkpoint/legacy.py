"""The hashes in files of older versions (saved states, monitors, calibrations): sha256 of a model's stored weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.config import to_dict
from rnn_longctx.devices import DTYPES
from rnn_longctx.models.checkpoint.json_files import plain
from rnn_longctx.models.checkpoint.weights import stored_state
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.lm import LM
from rnn_longctx.spec import left_out

_INIT = ("A_init", "A_log_uniform", "dt_init")  # settings that only an initialisation reads


def is_of(weights: str, model: LanguageModel, now: str | None = None) -> bool:
    """Whether a file's hash is of this model as it is now. A hash of an older version counts, where the weights are now
    what they were when they were stored. now: the model's `weights_hash`, where it is known."""
    return weights == (now or model.weights_hash) or weights in old_hashes(model)


def old_hashes(model: LanguageModel) -> Iterator[str]:
    """Yield what an older version may have called these weights: of this library's, one for each type that holds all of
    their numbers, since it was of the file that they came from; none where they are offloaded."""
    if isinstance(model, LM):
        later = left_out(model.config)  # settings that older versions did not have
        shape = {k: v for k, v in plain(to_dict(model.config)).items() if k not in _INIT and k not in later}
        weights = stored_state(model, model.dtype)
        for dtype in dict.fromkeys((model.dtype, *DTYPES.values())):
            tensors = stored_state(model, dtype)
            if all(torch.equal(t.to(weights[n].dtype), weights[n]) for n, t in tensors.items()):
                lines = [
                    f"{n} {t.dtype} {list(t.shape)} {hashlib.sha256(_bytes(t)).hexdigest()}"
                    for n, t in sorted(tensors.items())
                ]
                yield _short(hashlib.sha256("\n".join([json.dumps(shape, sort_keys=True), *lines]).encode()))
        return
    sha = hashlib.sha256()
    state = {name: t for name, t in model.module.state_dict().items() if isinstance(t, Tensor)}
    if not any(t.is_meta for t in state.values()):
        for name, t in sorted(state.items()):
            _add(sha, name, t)
        yield _short(sha)


def _short(sha: Any) -> str:
    return sha.hexdigest()[:16]


def _add(sha: Any, name: str, t: Tensor) -> None:
    sha.update(f"{name} {t.dtype} {list(t.shape)}".encode())
    if hasattr(t, "__tensor_flatten__"):
        for inner in t.__tensor_flatten__()[0]:
            _add(sha, f"{name}.{inner}", getattr(t, inner))
    else:
        sha.update(_bytes(t))


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
