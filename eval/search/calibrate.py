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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import parse_length
from rnn_longctx.data import Text, load_text, tokens
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.eval.jobs.base import Job, Measuring
from rnn_longctx.eval.jobs.recall import Counts, Recall
from rnn_longctx.eval.search.spsa import spsa
from rnn_longctx.eval.search.unseen import smallest_digests
from rnn_longctx.eval.tables.conclusion import GUARD
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.mitigations import REMEDIES, mitigate, parse_remedy
from rnn_longctx.mitigations.base import train_length
from rnn_longctx.mitigations.calibrated import CalibrationFile, shape_of
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.precision import computes_as
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.tasks.multikey import MultiKey
from rnn_longctx.tasks.passkey import Passkey


@dataclass(frozen=True)
class Scored:
    """A setting, its loss in nats per token and its recall; `passes`: whether the guard lets it pass."""

    remedy: str
    loss: float
    recall: dict[str, float]
    passes: bool


def grid_of(name: str, train_length: int, fixed: Mapping[str, str] | None = None) -> dict[str, list[Any]]:
    """Return the values that are tried of a remedy's parameters, but for those that are fixed (`Remedy.grid`).

    Raises InputError for a name that is no remedy's, or of one that has nothing to calibrate.
    """
    if name not in REMEDIES or REMEDIES[name].search is None:
        choices = [kind.name for kind in REMEDIES.values() if kind.search]
        raise InputError(f"{name!r} cannot be calibrated{nearest(name, choices)}")
    fixed = fixed or {}
    return {key: values for key, values in REMEDIES[name].grid(train_length, fixed).items() if key not in fixed}


def calibrate(
    model: Any,
    name: str,
    target: int | str,
    text: Text | str | Path,
    *,
    seed: int = 0,
    slices: int = 4,
    prompts: int = 20,
    steps: int = 50,
    say: Callable[[str], None] = lambda line: None,
) -> CalibrationFile:
    """Return the setting of the remedy `name` with the lowest loss at `target` tokens that keeps the model's recall.
    Where that loss is not below the one without a remedy, it is said, and the result's `helps` is False.

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
    model, target = as_language_model(model), parse_length(target, "target")
    text = load_text(text)
    train = train_length(model, "calibration")
    search = _search_of(name, train)
    if target <= train:
        raise InputError(f"the target of {target} tokens must be above the training length of {train}")
    with mitigate(model, search.settings[0], target_length=target, text=text):
        pass  # what this model lacks shows before anything is measured
    trials = _Trials(Objective(model, target, text, seed, slices, prompts, train), say)
    best = trials.best_of(search)
    if search.method == "spsa":
        best = trials.perturbed(best, steps, seed)
    with mitigate(model, best.remedy, target_length=target, text=text) as handle:
        policies = handle.plan.policies
    return CalibrationFile(
        best.remedy,
        {"name": model.name, "weights": model.weights_hash, **shape_of(model)},
        [policy.to_dict() for policy in policies],
        target,
        f"{text.name} {text.hash}",
        seed,
        search.method,
        trials.scores(best),
        trials.helps(search.name, best, policies),
        smallest_digests(text),
    )


@dataclass(frozen=True)
class _Search:
    """A remedy's name, the settings of its grid as text, and how it goes on from the best of them (`Remedy.search`)."""

    name: str
    settings: list[str]
    method: str


def _search_of(text: str, train_length: int) -> _Search:
    """Return the search that a remedy's name stands for, or the name with parameters that are fixed. Raises InputError
    for what is no remedy's."""
    name, _, parameters = text.partition(":")
    fixed = dict(item.split("=", 1) for item in parameters.split(",") if "=" in item)
    settings = list(_grid(name, grid_of(name, train_length, fixed), parameters))
    parse_remedy(settings[0])  # what is fixed must be of the remedy
    moves = REMEDIES[name].one_a_layer not in fixed  # what SPSA would move
    return _Search(name, settings, (moves and REMEDIES[name].search) or "grid")


def _grid(name: str, grid: dict[str, list[Any]], parameters: str = "") -> Iterator[str]:
    """Yield every combination of the grid's values as text, after the parameters that are fixed."""
    for values in product(*grid.values()):
        items = [f"{key}={_text(value)}" for key, value in zip(grid, values)]
        yield f"{name}:" + ",".join([*([parameters] if parameters else []), *items])


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"  # (g cuts whole numbers to six digits)


class Objective:
    """Loss and recall of a model under a remedy; each is measured once."""

    def __init__(self, model: LanguageModel, target: int, text: Text, seed: int, slices: int, prompts: int, train: int):
        self.model, self.target, self.text, self.train = model, target, text, train
        rows = range(seed * slices, (seed + 1) * slices)
        self.ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, target + 1)[0]) for i in rows])
        self.context = Measuring(model, batch=prompts, seed=seed + 10**6, segment=SEGMENTS[model.device.type])
        tasks, counts = (Passkey(), MultiKey(keys=2)), Counts(n=prompts)
        self.guards: list[tuple[Job, int]] = [(Recall(t, counts), n) for t in tasks for n in (train, 2 * train)]
        self.losses: dict[str, float] = {}

    def loss(self, remedy: str) -> float:
        if remedy not in self.losses:
            with mitigate(self.model, remedy, target_length=self.target, text=self.text):
                self.losses[remedy] = float(tail_loss(self.model, self.ids).mean())
        return self.losses[remedy]

    def recall(self, remedy: str) -> dict[str, float]:
        recall = {}
        for task, length in self.guards:
            with mitigate(self.model, remedy, target_length=self.target, text=self.text):  # as it will be used
                try:
                    *_, row = task.run(self.context, [length])
                except InputError:  # the prompt is longer than that
                    continue
            recall[f"{task.name}@{length}"] = float(row["value"])
        return recall


class _Trials:
    """Settings that are tried, each judged against the model without a remedy.

    Attributes:
        bare: the recall without a remedy, which no setting may fall below.
        tried: in the order in which they were.
    """

    def __init__(self, objective: Objective, say: Callable[[str], None]):
        self.objective, self.say = objective, say
        self.bare, self.tried = objective.recall("none"), list[Scored]()
        if not self.bare:
            lengths = f"{objective.train} or {2 * objective.train} tokens"
            raise InputError(f"no prompt of the guard fits into {lengths}: nothing would guard recall")
        say(f"none: recall {_shown(self.bare)}, loss {objective.loss('none'):.4f}")

    def score(self, remedy: str) -> Scored:
        loss, recall = self.objective.loss(remedy), self.objective.recall(remedy)
        passes = all(recall[guard] >= self.bare[guard] - GUARD for guard in recall)
        self.say(f"{remedy}: loss {loss:.4f}, recall {_shown(recall)}{'' if passes else ', not kept'}")
        self.tried.append(scored := Scored(remedy, loss, recall, passes))
        return scored

    def best_of(self, search: _Search) -> Scored:
        """Return the setting with the lowest loss of those that pass the guard. Raises InputError if there is none."""
        scored = [self.score(setting) for setting in search.settings]
        passing = [s for s in scored if s.passes]
        if not passing:
            raise InputError(
                f"{search.name}: no setting of {len(scored)} keeps the recall of the bare model ({_shown(self.bare)}): "
                "try another remedy, or a shorter target"
            )
        finite = [s for s in passing if math.isfinite(s.loss)]
        if not finite:
            raise InputError(
                f"{search.name}: of {len(passing)} settings that keep recall none has a finite loss at "
                f"{self.objective.target} tokens"
            )
        return min(finite, key=lambda s: s.loss)

    def perturbed(self, best: Scored, steps: int, seed: int) -> Scored:
        """Return the best setting that SPSA finds from one on, that one itself if none is better."""
        layers, loss = len(self.objective.model.mixers), self.objective.loss
        for setting in spsa(parse_remedy(best.remedy), best.loss, layers, loss, steps=steps, seed=seed):
            candidate = self.score(setting)
            if candidate.passes and candidate.loss < best.loss:
                best = candidate
        return best

    def helps(self, name: str, best: Scored, policies: Sequence[ScanPolicy]) -> bool:
        """Return whether the best setting lowers the loss, and say so if it does not."""
        without = self.objective.loss("none")
        same = all(policy == PLAIN for policy in policies)
        if not same and not best.loss >= without:  # (a loss without a remedy that is not finite is beaten)
            return True
        result = f"{best.remedy} " + ("changes nothing" if same else f"has {best.loss:.4f}")
        self.say(f"no setting of {name} that keeps recall lowers the loss ({without:.4f} without): {result}")
        return False

    def scores(self, best: Scored) -> dict[str, Any]:
        """Return what the file says of the search."""
        model = self.objective.model
        kept_in = {} if model.state_dtype is None else {"state_dtype": dtype_name(model.state_dtype)}
        return {
            "loss": best.loss,
            "loss_without": self.objective.loss("none"),
            "recall": best.recall,
            "recall_without": self.bare,
            "tried": [{"remedy": s.remedy, "loss": s.loss, "kept": s.passes} for s in self.tried],
            **kept_in,
            "dtype": computes_as(model),
        }


def _shown(recall: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.2f}" for k, v in recall.items())
