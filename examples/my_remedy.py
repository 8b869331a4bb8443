"""A remedy of your own in one file, held to the contract that every remedy of the library is held to.

    python examples/my_remedy.py        # the contract, and the remedy on the demo: about half a minute on one core
    rnn-longctx eval demo --plugin examples/my_remedy.py --lengths 512,4k --task lm --mitigation half-life:tokens=500

What it shows: a remedy is data. It gives each recurrent layer a policy, here one number added to every log-decay, and
the scan, the kernels, generation, calibration and compositions (`half-life+state-norm`) follow it. Nothing else in the
library names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

import rnn_longctx
from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import Need, Plan, Remedy, same_everywhere
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.testing.remedies import check_remedy


@rnn_longctx.register
@dataclass(frozen=True)
class HalfLife(Remedy):
    """Let every head forget half of what it holds within so many tokens, beside what it forgets anyway.

    tokens: the half-life. The log-decay of each token gets -ln(2) / tokens more, whatever the text says.
    """

    name = "half-life"
    needs = frozenset({Need.RECURRENCE})  # a model of attention alone is refused, with the reason
    examples = ("half-life:tokens=50",)
    tokens: int = 1000

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"half-life: tokens must be at least 1, got {self.tokens}")

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return Plan(same_everywhere(model, ScanPolicy(add=-math.log(2) / self.tokens)))


def main(kinds: tuple[str, ...] | None = None, length: str = "4k") -> pd.DataFrame:
    """Return the losses of the demo under the remedy. kinds: of models that the contract is checked on; None: all."""
    check_remedy("half-life:tokens=50", kinds=kinds)  # prints nothing where the contract holds
    print("the contract holds")

    model = rnn_longctx.load("demo")
    remedies = ["none", "half-life:tokens=500", "half-life:tokens=500+state-norm:every=64", "recompute:last=512"]
    table = rnn_longctx.evaluate(model, ["512", length], ["lm:slices=2,tokens=0"], remedies)
    losses = table[table["metric"] == "nats_per_token"]
    print(losses.pivot_table(index="mitigation", columns="length", values="value").round(3).to_string())
    return losses


if __name__ == "__main__":
    main()
