"""Watch a model while it reads and writes, and let the watch act when the model collapses.

    python examples/watch_a_stream.py           # the demo over 8K tokens: about half a minute on one core

What it shows: whether a model has collapsed can be seen from its states, without a label and without a loss. The
monitor looks every 256 tokens from inside the scan. Here it only warns at first, and then, on the same stream, goes
back to where the model was last healthy, switches a remedy on, and reads the tokens since again.
"""

from __future__ import annotations

import sys
import warnings

import torch

import rnn_longctx
from rnn_longctx.config import parse_length
from rnn_longctx.data import tokens

PIECE = 1024  # tokens that arrive at once


def follow(model, ids: torch.Tensor, monitor, action: str) -> tuple[list, float]:
    """Read a stream piece by piece under the monitor, write a few tokens after it, and return the reports and the mean
    loss over the second half."""
    losses = []
    with warnings.catch_warnings(), monitor.on(model, action=action) as watch, torch.inference_mode():
        warnings.simplefilter("ignore")  # what it warns of is printed below
        cache, status = model.new_cache(), "ok"
        for start in range(0, ids.shape[1] - 1, PIECE):
            piece = ids[:, start : start + PIECE + 1]
            hidden = model(piece[:, :-1], cache)
            losses.append(model.losses(hidden, piece[:, 1:]))
            if watch.status != status:
                status = watch.status
                print(f"  {watch.reports[-1]}")
        said = rnn_longctx.generate(model, ids[0, -1:], max_new_tokens=20, cache=cache)
        print(f"  writes {model.tokenizer.decode(said[0])!r}")
        print(f"  {watch.summary()}")
    loss = torch.cat(losses, 1)
    return watch.reports, float(loss[:, loss.shape[1] // 2 :].mean())


def main(length: str = "8k") -> dict[str, tuple[list, float]]:
    """Return the reports and the loss of each action."""
    model = rnn_longctx.load("demo")
    monitor = rnn_longctx.CollapseMonitor.calibrated(model)
    text = rnn_longctx.load_text("stdlib")
    ids = torch.from_numpy(tokens(text, model.tokenizer, 0, parse_length(length) + 1)[0])[None].long()
    seen = {}
    for action in ("warn", "rollback:state-norm:every=64"):
        print(f"{action}:")
        seen[action] = follow(model, ids, monitor, action)
        print(f"  loss over the second half: {seen[action][1]:.3f} nats a token")
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:2])
