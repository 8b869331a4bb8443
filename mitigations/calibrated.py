"""A calibrated remedy, kept in a small YAML file that `rnn-longctx calibrate` writes and every command reads.

remedy: rri:alpha=0.999,beta=0.75
helps: true                                         false where no setting had a lower loss than no remedy at all
model: {name: demo, weights: 0123456789abcdef, layers: 6, heads: 8, headdim: 64, d_state: 128}
policies: [{add: -0.001, gain: 0.75}, ...]          one a layer (`ScanPolicy.to_dict`)
target, text, seed, method, scores                  how it was found
documents: [0123456789ab, ...]                      digests of the text's: it is not to be evaluated on any of them
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rnn_longctx.config import counted, home_path, load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.measure.calibration import Calibration
from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy
from rnn_longctx.models.checkpoint.legacy import is_of
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text


def shape_of(model: LanguageModel) -> dict[str, Any]:
    """Return the shape that a calibrated policy is valid for: layers, heads, headdim and d_state of the model."""
    mixer = model.mixers[0]
    return {"layers": len(model.mixers), "heads": mixer.heads, "headdim": mixer.headdim, "d_state": mixer.d_state}


@dataclass(frozen=True)
class CalibrationFile:
    """The file's content."""

    remedy: str
    model: dict[str, Any]
    policies: list[dict[str, Any]]
    target: int
    text: str
    seed: int
    method: str
    scores: dict[str, Any] = field(default_factory=dict)
    helps: bool = True
    documents: list[str] = field(default_factory=list)

    @property
    def calibration(self) -> Calibration:
        """What the remedy was found on, and how."""
        name, _, text_hash = self.text.rpartition(" ")
        search = f"{self.method}, seed {self.seed}"
        return Calibration(name, text_hash, search=search, documents=frozenset(self.documents))

    def save(self, path: str | Path) -> None:
        """Write the file, its folder with it."""
        first = {"remedy": self.remedy, "helps": self.helps}
        data = first | {name: getattr(self, name) for name in self.__dataclass_fields__}
        path = home_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))


@dataclass(frozen=True)
class CalibratedRemedy(Remedy):
    """A remedy named by its file, with a hash of its policies: results of two files of one name are kept apart."""

    file: str
    content: CalibrationFile

    @classmethod
    def read(cls, text: str) -> CalibratedRemedy:
        """Read `FILE.yaml` or `FILE.yaml@hash`. Raises InputError: no such file, or not one of these, or changed."""
        file, _, expected = text.partition("@")
        remedy = cls(file, load_yaml(CalibrationFile, file, what="remedy file"))
        try:
            for policy in remedy.content.policies:
                ScanPolicy.from_dict(policy)
        except (TypeError, AttributeError, InputError) as error:
            raise InputError(f"{file}: a policy in it cannot be read ({error})") from None
        if expected and expected != remedy.hash:
            raise InputError(f"{file} has changed: its policies are {remedy.hash}, not {expected}")
        return remedy

    @property
    def kind(self) -> type[Remedy]:
        """The class of the remedy that was calibrated, where it is known here."""
        name = self.content.remedy.partition(":")[0]
        return REMEDIES[name] if name in REMEDIES else type(self)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.content.policies, sort_keys=True).encode()).hexdigest()[:8]

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        policies = self._fitting(model)
        name, weights = self.content.model.get("name"), self.content.model.get("weights")
        now = model.weights_hash
        if (name != model.name) if weights is None else not is_of(weights, model, now):
            _warn(self.file, f"{name} (weights {weights or 'not said'})", f"{model.name} (weights {now})")
        return Plan(policies, calibrations=(self.content.calibration,))

    def _fitting(self, model: LanguageModel) -> tuple[ScanPolicy, ...]:
        """Return the policies. Raises InputError where the model is of another shape than they are."""
        shape = shape_of(model)
        for key, value in shape.items():
            if (calibrated := self.content.model.get(key)) != value:
                raise InputError(f"{self.file} was found for a model with {key} = {calibrated}, this one has {value}")
        if len(self.content.policies) != len(model.mixers):
            policies = counted(len(self.content.policies), "policy", "policies")
            raise InputError(f"{self.file} holds {policies} for {counted(len(model.mixers), 'layer')}")
        fitting = tuple(map(ScanPolicy.from_dict, self.content.policies))
        for layer, policy in enumerate(fitting):
            for name, values in _of_heads(policy):
                if len(values) != shape["heads"]:
                    raise InputError(
                        f"{self.file}: {name} of layer {layer} has {len(values)} values, the model has "
                        f"{counted(shape['heads'], 'head')} a layer"
                    )
        return fitting

    def __str__(self) -> str:
        return f"{self.file}@{self.hash}"


def _of_heads(policy: ScanPolicy) -> Iterator[tuple[str, tuple]]:
    """Yield what a policy says of every head for itself, by its name."""
    values = [(name, getattr(policy, name)) for name in ("mul", "add", "gain", "min_dt", "erase", "least_erase")]
    for name, value in [*values, *(("cap", cap.norm) for cap in policy.caps)]:
        if isinstance(value, tuple):
            yield name, value


@cache  # once: an evaluation works a remedy out for every length
def _warn(file: str, calibrated: str, model: str) -> None:
    """Log that the remedy is of another model: of a fine-tuned sister it may be fair, so that it is taken."""
    logging.getLogger(__name__).warning("%s was calibrated on %s, not on this %s", file, calibrated, model)
