"""Models in training as checkpoints that `rnn_longctx.load` reads, with what they are made of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import to_dict
from rnn_longctx.devices import DTYPES, device_name
from rnn_longctx.measure.envelope import SLICES, measure_envelope
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import LM
from rnn_longctx.train.config import TrainConfig
from rnn_longctx.train.corpus import Corpus
from rnn_longctx.train.state import RunState


def export(
    config: TrainConfig, corpus: Corpus, model: LM, where: Path, metrics: dict[str, Any], envelope: bool = True
) -> None:
    """Write `model` to the directory `where`, in `config.save_dtype` and `config.save_layout`; envelope: with how far
    its states go. Raises InputError where it cannot be written."""
    model.eval()
    provenance, calibration = _provenance(config, corpus, model, metrics), None
    if envelope:
        calibration = _envelope(config, corpus, model)
    dtype = DTYPES[config.save_dtype]
    checkpoint.save(
        model, where, dtype=dtype, provenance=provenance, layout=config.save_layout, calibration=calibration
    )
    model.train()


def keep_best(config: TrainConfig, corpus: Corpus, model: LM, out: Path, score: list[float], state: RunState) -> None:
    """Make the model just evaluated last/, and best/ if its score is the largest so far."""
    metrics = {"step": state.step}
    export(config, corpus, model, out / "last", metrics, envelope=False)
    if state.best is None or score > state.best:
        state.best = score
        export(config, corpus, model, out / "best", metrics, envelope=False)


def _envelope(config: TrainConfig, corpus: Corpus, model: LM) -> dict[str, Any] | None:
    """Return how far the states of the finished model go within the training length, on the held-out text, or None
    where there is not enough of it or some layer has no state."""
    if len(model.mixers) < len(model.layers):  # it is that of recurrent layers
        return None
    windows = next(corpus.validation(config.longest, SLICES, most=SLICES), None)
    if windows is None or len(windows) == 0:
        return None
    ids = windows[:, :-1]
    digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]
    names = "+".join(str(t["name"]) for t in corpus.texts)
    return measure_envelope(model, ids, f"{names} (held out)", digest).to_dict()


def _provenance(config: TrainConfig, corpus: Corpus, model: LM, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return what the finished model is made of, and what the one it was started from was. No paths: texts go by their
    canonical names."""
    recipe = {k: v for k, v in to_dict(config).items() if k not in ("out", "device", "licences")}
    entries = [{k: v for k, v in to_dict(text).items() if v is not None} for text in config.data.parts]
    named = [{**entry, "source": t["name"]} for entry, t in zip(entries, corpus.texts, strict=True)]
    recipe["data"]["text"] = [entry if len(entry) > 1 else entry["source"] for entry in named]
    others = [t["name"] for t in corpus.texts if t["name"] != "site-packages"]
    excluded = "Python's standard library: not in the training text, nor is any installed file that has more than "
    excluded += "20% of its longer lines in common with it"
    if others:
        excluded += f" (not checked in {', '.join(map(str, others))})"
    return {
        **model.provenance,
        "recipe": recipe,
        "seed": config.seed,
        "data": {"texts": corpus.texts, "licences": config.licences, "excluded": excluded},
        "metrics": metrics,
        "torch": torch.__version__,
        "device": device_name(model.device),
    }
