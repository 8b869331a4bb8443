"""A remedy's parameters, tuned on a checkpoint by what `rnn_longctx.eval.search.calibrate` goes by: the least loss at a
length that keeps recall. Here that is the recall of the remedy's default setting, and settings are drawn by a sampler
over ranges, where calibration tries a grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from rnn_longctx.data import load_text
from rnn_longctx.devices import device_of
from rnn_longctx.errors import InputError
from rnn_longctx.eval.search.calibrate import Objective
from rnn_longctx.eval.search.unseen import shared
from rnn_longctx.eval.tune.problem import Held, Outcome, mean, short, table_of
from rnn_longctx.eval.tune.space import Space
from rnn_longctx.files import write_atomic
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.mitigations import REMEDIES, mitigate
from rnn_longctx.mitigations.base import train_length
from rnn_longctx.models.adopt.adopting import load_any
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.progress import Say

REPORTS = "reports.csv"


@dataclass(frozen=True)
class RemedyProblem:
    """A remedy on a checkpoint, for a length.

    Attributes:
        model: as `rnn_longctx.load` takes it; device to given_train_length: how.
        mitigation: its name, with the parameters that stay as they are.
        target: tokens that are read.
        text: searched on; held_out: compared on, which shares no document with it.
        slices, prompts: of a loss, and of each kind and length of recall.
        seeds: of the comparison: other slices and prompts each.
        weights: the model's hash, by which a study knows its checkpoint.
    """

    model: str
    mitigation: str
    target: int
    text: str = "builtin"
    held_out: str = "stdlib"
    slices: int = 4
    prompts: int = 20
    seeds: int = 5
    device: str = "auto"
    dtype: str = "float32"
    tokenizer: str | None = None
    state_dtype: str | None = None
    given_train_length: str | None = None
    weights: str = ""

    kind: ClassVar[str] = "mitigation"
    metric: ClassVar[str] = "loss"
    warmup: ClassVar[int] = 0

    @classmethod
    def of(cls, described: dict[str, Any]) -> RemedyProblem:
        return cls(**{key: value for key, value in described.items() if key != "kind"})

    def described(self) -> dict[str, Any]:
        return asdict(self)

    def prepared(self, out: Path) -> RemedyProblem:
        """Return the problem with its checkpoint's hash, checked. Raises InputError: no such model or text, a remedy
        that it cannot take, a target within its training length."""
        space = self.space
        model = self._model
        length = train_length(model, "tuning")
        if self.target <= length:
            raise InputError(f"the target of {self.target} tokens must be above the training length of {length}")
        text, held_out = load_text(self.text), load_text(self.held_out)
        if shared(text, held_out):
            raise InputError(f"{text.name} is searched on and shares text with {held_out.name}: compare on another")
        with mitigate(model, space.default_text, target_length=self.target, text=text):
            pass  # what this model lacks shows before anything is measured
        return replace(self, weights=model.weights_hash)

    @cached_property
    def space(self) -> Space:
        return Space.of("mitigation", self.mitigation, REMEDIES)

    @property
    def comparison(self) -> float:
        return 3 * self.seeds

    def check(self, setting: str) -> None:
        """(A remedy that can be made can be put on the model, as its default can.)"""

    def measure(self, setting: str, folder: Path) -> Outcome:
        objective = self._objective(self.text, 0)
        losses: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / REPORTS).open("w") as file:
            file.write("step,value\n")
            with mitigate(objective.model, setting, target_length=self.target, text=objective.text):
                for row in objective.ids:
                    losses.append(float(tail_loss(objective.model, row[None]).mean()))
                    file.write(f"{len(losses)},{mean(losses)!r}\n")
                    file.flush()
        recall = mean(list(objective.recall(setting).values()))
        return Outcome(mean(losses), recall)

    def reports(self, folder: Path) -> dict[int, float]:
        return {int(row["step"]): float(row["value"]) for row in table_of(folder / REPORTS)}

    def tidy(self, folder: Path) -> None:
        """(A trial leaves nothing large.)"""

    def compare(self, settings: Sequence[str], out: Path, say: Say) -> dict[str, list[list[Held]]]:
        folder = out / "compare"
        held: dict[str, list[list[Held]]] = {}
        for seed in range(1, self.seeds + 1):  # (trials have seen the prompts of seed 0)
            for setting in ("none", *settings):
                file = folder / f"{short(setting)}-s{seed}.json"
                if not file.exists():
                    rows = self._held(setting, seed)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomic(file, json.dumps([asdict(row) for row in rows]).encode())
                rows = [Held(**row) for row in json.loads(file.read_text())]
                held.setdefault(setting, []).append(rows)
                say(f"seed {seed}: {setting}: loss {rows[0].value:.4f}, recall {mean([r.value for r in rows[1:]]):.2f}")
        return held

    def _held(self, setting: str, seed: int) -> list[Held]:
        objective = self._objective(self.held_out, seed)
        loss = Held("loss", objective.text.name, self.target, self._loss(objective, setting))
        rows = [loss]
        for name, value in objective.recall(setting).items():
            task, _, length = name.rpartition("@")
            rows.append(Held("recall", task, int(length), value))
        return rows

    def _loss(self, objective: Objective, setting: str) -> float:
        # what a remedy is worked out on is never what it is measured on
        with mitigate(objective.model, setting, target_length=self.target, text=load_text(self.text)):
            return float(tail_loss(objective.model, objective.ids).mean())

    @cached_property
    def _model(self) -> LanguageModel:
        model = load_any(
            self.model,
            device=device_of(self.device),
            dtype=self.dtype,
            tokenizer=self.tokenizer,
            train_length=self.given_train_length,
        )
        model.use_state_dtype(self.state_dtype)
        return model

    def _objective(self, text: str, seed: int) -> Objective:
        model = self._model
        return Objective(
            model, self.target, load_text(text), seed, self.slices, self.prompts, train_length(model, "tuning")
        )
