"""Finding a remedy's settings for a model and a length, on a text that is not evaluated on.

    objective   mean loss over positions (L/2, L] of some slices of the text
    guard       passkey and multi-key recall at the training length and at twice that: no setting may fall below the
                bare model's by more than GUARD

Three searches behind one interface: `grid` over a remedy's parameters; `quantile` over the quantiles of what was
measured on the text (norms, steps); `spsa`, simultaneous perturbation (Spall 1992; MambaExtend's), of one value a
layer, begun at the best single one: a factor, or what RRI (and a-scale of the decay) forgets a token, 1 - alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnn_longctx.config import parse_length
from rnn_longctx.data import Text, load_text, tokens
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.eval.jobs.base import Job, Measuring
from rnn_longctx.eval.jobs.recall import Counts, Recall
from rnn_longctx.eval.search.unseen import kept as kept_digests
from rnn_longctx.eval.tables.sheets import GUARD
from rnn_longctx.mitigations import mitigate, parse_remedy
from rnn_longctx.mitigations.base import Remedy, train_length
from rnn_longctx.mitigations.rri import RRI
from rnn_longctx.mitigations.stored import Found, shape_of
from rnn_longctx.models.adopt.adopting import reader_of
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.precision import computes_as
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.probes.ablation import tail_losses
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.tasks.multikey import MultiKey
from rnn_longctx.tasks.passkey import Passkey

ALPHAS = (1.0, 0.9999, 0.999, 0.998, 0.996, 0.99)
FACTORS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
LEAST = 0.01  # the smallest factor (MambaExtend)
LARGEST = 1e9  # a loss that is no number, to SPSA
LEAST_FORGOTTEN = 1e-5  # where SPSA begins for an alpha of 1


@dataclass(frozen=True)
class Scored:
    """A setting, its loss in nats per token and its recall; `kept`: whether the guard lets it pass."""

    remedy: str
    loss: float
    recall: dict[str, float]
    kept: bool


def grid_of(name: str, train: int, place: str = "rate") -> dict[str, list[Any]]:
    """The values that are tried of a remedy's parameters (place: of a-scale). InputError: it has none to calibrate."""
    grids: dict[str, dict[str, list[Any]]] = {
        "rri": {"alpha": list(ALPHAS), "beta": [1.0, 0.75, 0.5]},
        "window": {"tokens": [train // 2, train, 2 * train, 4 * train]},
        "state-norm": {"quantile": [1.0, 0.9, 0.75, 0.5, 0.0]},
        "token-filter": {"theta": [0.01, 0.05, 0.2], "clamp": [0.0, 0.05]},
        "a-winsor": {"share": [0.02, 0.05, 0.08, 0.15, 0.25]},
        "a-floor": {"tokens": [train // 2, train, 2 * train, 4 * train]},
        "delta-scale": {"scale": list(FACTORS)},
        "a-scale": {"scale": list(ALPHAS if place == "decay" else FACTORS)},
    }
    if name not in grids:
        raise InputError(f"{name!r} cannot be calibrated{nearest(name, grids)}")
    return grids[name]


METHODS = {"state-norm": "quantile", "token-filter": "quantile", "delta-scale": "spsa", "a-scale": "spsa",
           "rri": "spsa"}  # fmt: skip


def calibrate(model: Any, name: str, target: int | str, text: Text | str | Path, *, seed: int = 0, slices: int = 4,
              prompts: int = 20, steps: int = 50, say: Callable[[str], None] = lambda line: None) -> Found:  # fmt: skip
    """The setting of the remedy `name` with the least loss at `target` tokens that keeps the model's recall. Where that
    loss is not below the one without a remedy, it is said, and the result's `helps` is False.

    Args:
        model: this library's, or one of another library, which is adopted.
        name: of the remedy, with parameters that are held if any: state-norm:every=64.
        target: tokens to be read (32768, "32k").
        text: what it is found on, or its name (`rnn_longctx.load_text`); not what is to be evaluated.
        slices, prompts: of the loss, and of each kind and length of the guard.
        steps: of SPSA, two losses each.
        say: called with a line a setting.
    Raises:
        InputError: a remedy that has nothing to calibrate, a text too short, a count out of range, no setting that
            keeps recall, or none of those that has a finite loss.
    """
    if not isinstance(name, str):
        raise InputError(f"calibrate takes the name of a remedy, such as rri, got {name!r:.80}")
    for what, count, least in (("slices", slices, 1), ("prompts", prompts, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if not isinstance(count, Integral) or count < least:
            raise InputError(f"{what}: expected a whole number, at least {least}, got {count!r:.40}")
    model, target = reader_of(model), parse_length(target, "target")
    text = load_text(text)
    train = train_length(model, "calibration")
    name, _, fixed = name.partition(":")
    held = dict(part.split("=", 1) for part in fixed.split(",") if "=" in part)
    grid = {k: v for k, v in grid_of(name, train, held.get("place", "rate")).items() if k not in held}
    parse_remedy(next(_grid(name, grid, fixed)))  # what is held must be of the remedy
    if target <= train:
        raise InputError(f"the target of {target} tokens must be above the training length of {train}")
    with mitigate(model, next(_grid(name, grid, fixed)), target_length=target, text=text):
        pass  # what this model lacks shows before anything is measured
    objective = _Objective(model, target, text, seed, slices, prompts, train)
    bare = objective.recall("none")
    if not bare:
        raise InputError(f"no prompt of the guard fits into {train} or {2 * train} tokens: nothing would guard recall")
    say(f"none: recall {_shown(bare)}, loss {objective.loss('none'):.4f}")

    def score(remedy: str, guarded: bool = True) -> Scored:
        loss = objective.loss(remedy)
        recall = objective.recall(remedy) if guarded else {}
        kept = all(recall[k] >= bare[k] - GUARD for k in recall)
        say(f"{remedy}: loss {loss:.4f}, recall {_shown(recall)}{'' if kept else ', not kept'}")
        return Scored(remedy, loss, recall, kept)

    scored = [score(r) for r in _grid(name, grid, fixed)]
    method = METHODS.get(name, "grid") if not held.keys() & {"alpha", "scale"} else "grid"  # what SPSA would move
    kept = [s for s in scored if s.kept]
    if not kept:
        raise InputError(f"{name}: no setting of {len(scored)} keeps the recall of the bare model ({_shown(bare)}): "
                         "try another remedy, or a shorter target")  # fmt: skip
    finite = [s for s in kept if math.isfinite(s.loss)]
    if not finite:
        raise InputError(f"{name}: of {len(kept)} settings that keep recall none has a finite loss at {target} tokens")
    best = min(finite, key=lambda s: s.loss)
    if method == "spsa":
        for found in _spsa(best, len(model.mixers), lambda r: objective.loss(r), steps, seed):
            candidate = score(found)
            scored.append(candidate)
            if candidate.kept and candidate.loss < best.loss:
                best = candidate
    with mitigate(model, best.remedy, target_length=target, text=text) as handle:
        policies = [p.to_dict() for p in handle.plan.policies]
        same = all(p == PLAIN for p in handle.plan.policies)
    without = objective.loss("none")
    helps = not same and not best.loss >= without  # (a loss without a remedy that is not finite is beaten)
    if not helps:
        says = "changes nothing" if same else f"has {best.loss:.4f}"
        say(f"no setting of {name} that keeps recall lowers the loss ({without:.4f} without): {best.remedy} {says}")
    scores = {
        "loss": best.loss,
        "loss_without": without,
        "recall": best.recall,
        "recall_without": bare,
        "tried": [{"remedy": s.remedy, "loss": s.loss, "kept": s.kept} for s in scored],
    }
    if model.state_dtype is not None:
        scores["state_dtype"] = str(model.state_dtype)[6:]
    scores["dtype"] = computes_as(model)
    whose = {"name": model.name, "weights": model.weights_hash, **shape_of(model)}
    return Found(best.remedy, whose, policies, target, f"{text.name} {text.hash}", seed, method, scores, helps,
                 kept_digests(text))  # fmt: skip


def _grid(name: str, grid: dict[str, list[Any]], fixed: str = "") -> Iterator[str]:
    for values in product(*grid.values()):
        yield f"{name}:" + ",".join([*([fixed] if fixed else []), *(f"{k}={_text(v)}" for k, v in zip(grid, values))])


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"  # (g cuts whole numbers to six digits)


def _begun(best: Remedy) -> tuple[float, Callable[[np.ndarray], str]]:
    """Where SPSA begins, as a logarithm that every layer has, and what turns one logarithm a layer into a setting."""
    scaled: Any = best
    if isinstance(best, RRI) or getattr(best, "place", "") == "decay":
        alpha, named, rest = (
            (best.alpha, "rri:alpha=", f",beta={best.beta:g}")
            if isinstance(best, RRI)
            else (scaled.scale, f"{scaled.name}:scale=", ",place=decay")
        )

        def forget(point: np.ndarray) -> str:
            return named + "/".join(f"{1 - v:.7g}" for v in np.exp(point).clip(0, 0.5)) + rest

        return math.log(max(1 - float(alpha), LEAST_FORGOTTEN)), forget
    return math.log(
        float(scaled.scale)
    ), lambda point: f"{scaled.name}:scale=" + "/".join(f"{max(LEAST, v):.4g}" for v in np.exp(point))


def _spsa(begun: Scored, layers: int, loss: Callable[[str], float], steps: int, seed: int) -> Iterator[str]:
    """The settings worth a look: the best of the way, and where it ends. One logarithm a layer."""
    rng = np.random.default_rng(seed)
    first, text = _begun(parse_remedy(begun.remedy))
    theta = np.full(layers, first)
    best, least = theta, begun.loss
    for k in range(steps):
        size, reach = 0.5 / (k + 1 + steps / 10) ** 0.602, 0.1 / (k + 1) ** 0.101  # Spall's exponents
        direction = rng.choice([-1.0, 1.0], layers)
        up, down = (loss(text(theta + side * reach * direction)) for side in (1, -1))
        up, down = (v if math.isfinite(v) else LARGEST for v in (up, down))  # away from what is no number
        for value, point in ((up, theta + reach * direction), (down, theta - reach * direction)):
            if value < least:
                best, least = point, value
        theta = theta - np.clip(size * (up - down) / (2 * reach), -0.2, 0.2) * direction
    yield from dict.fromkeys((text(best), text(theta)))


class _Objective:
    """Loss and recall of a model under a remedy; each is measured once."""

    def __init__(self, model: Mamba2LM, target: int, text: Text, seed: int, slices: int, prompts: int, train: int):
        self.model, self.target, self.text = model, target, text
        rows = range(seed * slices, (seed + 1) * slices)
        self.ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, target + 1)[0]) for i in rows])
        self.context = Measuring(model, batch=prompts, seed=seed + 10**6, segment=SEGMENTS[model.device.type])
        tasks, counts = (Passkey(), MultiKey(keys=2)), Counts(n=prompts)
        self.guards: list[tuple[Job, int]] = [(Recall(t, counts), n) for t in tasks for n in (train, 2 * train)]
        self.losses: dict[str, float] = {}

    def loss(self, remedy: str) -> float:
        if remedy not in self.losses:
            with mitigate(self.model, remedy, target_length=self.target, text=self.text):
                self.losses[remedy] = float(tail_losses(self.model, self.ids).mean())
        return self.losses[remedy]

    def recall(self, remedy: str) -> dict[str, float]:
        found = {}
        for task, length in self.guards:
            with mitigate(self.model, remedy, target_length=self.target, text=self.text):  # as it will be used
                try:
                    *_, row = task.run(self.context, [length])
                except InputError:  # the prompt is longer than that
                    continue
            found[f"{task.name}@{length}"] = float(row["value"])
        return found


def _shown(recall: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.2f}" for k, v in recall.items())
