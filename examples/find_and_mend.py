"""Find the heads that collapse, prove that it is they, and mend the model: beside the two controls.

    python examples/find_and_mend.py            # the demo up to 8K tokens: about a minute on one core
    python examples/find_and_mend.py demo 32k   # or another model, and further

What it shows: a probe reads once and accuses heads; with prove=True it caps the accused alone and then as many others,
so that the accusation can fail. And a remedy is judged beside `reset` and `recompute`, which forget on purpose: one
that keeps the loss flat by forgetting everything is no better than they are.
"""

from __future__ import annotations

import sys

import pandas as pd

import rnn_longctx
from rnn_longctx.config import parse_length
from rnn_longctx.eval.show.terminal import conclusion
from rnn_longctx.probes.probe import Probe, probe


def main(name: str = "demo", length: str = "8k", slices: int = 2, prompts: int = 10) -> tuple[Probe, pd.DataFrame]:
    """Return what the probe found, and the table of the remedy and its controls."""
    model = rnn_longctx.load(name)
    text = rnn_longctx.load_text("stdlib")  # Python's library, which the demo never saw
    tokens = parse_length(length)
    trained = model.train_length

    # 1. Which heads leave the range that they had in training, when, and is it they that cost the loss?
    found = probe(model, text, tokens, slices=slices, prove=True)
    print(found.verdict)
    print(found.heads.head(5)[["layer", "head", "onset", "worst"]].to_string(index=False))

    # 2. A remedy for such heads: `a-floor` raises the decay of those that would remember longer than the training
    #    length. The controls drop the state every T tokens, or read the last T tokens afresh.
    controls = [f"reset:every={trained},overlap={trained // 2}", f"recompute:last={trained}"]
    tasks = [f"lm:slices={slices},tokens=0", f"passkey:n={prompts},max={2 * trained}"]
    table = rnn_longctx.evaluate(
        model, [trained, 2 * trained, tokens], tasks, ["none", "a-floor", *controls], text=text
    )
    losses = table[table["metric"] == "nats_per_token"]
    print(losses.pivot_table(index="mitigation", columns="length", values="value").round(3).to_string())
    print(conclusion(table))
    return found, table


if __name__ == "__main__":
    main(*sys.argv[1:3])
