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
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rnn_longctx.config import home_path, load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Plan, Remedy
from rnn_longctx.models.checkpoint.legacy import is_of
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


def shape_of(model: Mamba2LM) -> dict[str, Any]:
    """What of a model its policies depend on."""
    m = model.mixers[0]
    return {"layers": len(model.mixers), "heads": m.heads, "headdim": m.headdim, "d_state": m.d_state}


@dataclass(frozen=True)
class Found:
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

    def save(self, path: str | Path) -> None:
        first = {"remedy": self.remedy, "helps": self.helps}
        data = first | {k: getattr(self, k) for k in self.__dataclass_fields__}
        path = home_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))


@dataclass(frozen=True)
class Stored(Remedy):
    """Named by its file, with a hash of its policies: results of two files of one name are kept apart."""

    file: str
    found: Found

    @classmethod
    def read(cls, text: str) -> Stored:
        """From `FILE.yaml` or `FILE.yaml@hash`. Raises InputError: no such file, or not one of these, or changed."""
        file, _, expected = text.partition("@")
        remedy = cls(file, load_yaml(Found, file, what="remedy file"))
        try:
            for policy in remedy.found.policies:
                ScanPolicy.from_dict(policy)
        except (TypeError, AttributeError, InputError) as error:
            raise InputError(f"{file}: a policy in it cannot be read ({error})") from None
        if expected and expected != remedy.hash:
            raise InputError(f"{file} has changed: its policies are {remedy.hash}, not {expected}")
        return remedy

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.found.policies, sort_keys=True).encode()).hexdigest()[:8]

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        shape = shape_of(model)
        for key, value in shape.items():
            if self.found.model.get(key) != value:
                had = self.found.model.get(key)
                raise InputError(f"{self.file} was found for a model of {had} {key}, this one has {value}")
        if len(self.found.policies) != len(model.mixers):
            raise InputError(f"{self.file} holds {len(self.found.policies)} policies for {len(model.mixers)} layers")
        named, had = self.found.model.get("name"), self.found.model.get("weights")
        now = model.weights_hash
        if (named != model.name) if had is None else not is_of(had, model, now):
            _warn(self.file, f"{named} (weights {had or 'not said'})", f"{model.name} (weights {now})")
        calibration = f"{self.found.text}, {self.found.method}, seed {self.found.seed}"
        policies = tuple(map(ScanPolicy.from_dict, self.found.policies))
        for layer, p in enumerate(policies):
            for name, value in (*((n, getattr(p, n)) for n in ("mul", "add", "gain", "min_dt")),
                                *(("cap", cap.norm) for cap in p.caps)):  # fmt: skip
                if isinstance(value, tuple) and len(value) != shape["heads"]:
                    raise InputError(f"{self.file}: {name} of layer {layer} has {len(value)} values, the model has "
                                     f"{shape['heads']} heads a layer")  # fmt: skip
        return Plan(policies, calibration=calibration, documents=frozenset(self.found.documents))

    def __str__(self) -> str:
        return f"{self.file}@{self.hash}"


@cache  # once: an evaluation works a remedy out for every length
def _warn(file: str, found: str, given: str) -> None:
    """Of a sister of the model, fine-tuned say, it may be fair: it is taken, but not in silence."""
    logging.getLogger(__name__).warning("%s was calibrated on %s, not on this %s", file, found, given)
