"""A Mamba-2 in the format of transformers: put a remedy on it, let it write, and measure where it stops working.

    python examples/my_transformers_model.py                      # a small model with random weights, made here
    python examples/my_transformers_model.py FOLDER_OR_HUB_ID 2k  # yours, and the tokens of a context in its training

What it shows: the model stays transformers' own. `mitigate` replaces the scan of its layers while it is on, its own
`generate` goes on working, and taken off the model says what it said before. To measure, `adopt` it once, which also
says what its config does not: the training length, and a tokenizer where none lies beside the weights.
"""

from __future__ import annotations

import sys
import tempfile

import pandas as pd
import torch
import transformers

import rnn_longctx
from rnn_longctx.data import Text

TRAIN_LENGTH = 64  # of the random model, in tokens: it was not trained, but the remedies need to know


def make_random_model(folder: str) -> None:
    """Write a Mamba-2 of 50K random weights, whose tokens are bytes, as transformers keeps it."""
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16, "hidden_size": 32, "chunk_size": 16}
    config = transformers.Mamba2Config(vocab_size=256, num_hidden_layers=2, eos_token_id=0, pad_token_id=0, **sizes)
    transformers.Mamba2ForCausalLM(config).save_pretrained(folder)


def main(name: str | None = None, train_length: str | int = TRAIN_LENGTH) -> tuple[bool, pd.DataFrame]:
    """Return whether the model of a name, or a random one, is what it was after a remedy, and what was measured."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        if name is None:
            make_random_model(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(name or folder).eval()

    # Adopt it once. A random model has no tokenizer; yours has one beside its weights, which is found.
    ours = rnn_longctx.adopt(model, train_length=train_length, tokenizer="bytes" if name is None else None)

    # The model's own forward and generate, without a remedy and with one.
    ids = torch.from_numpy(ours.tokenizer.encode("import os\n" * 10))[None].long()
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    with torch.inference_mode():
        before = model(ids).logits
        with rnn_longctx.mitigate(model, "rri:alpha=0.99,beta=0.75"):
            under = model(ids).logits
            written = model.generate(ids, **how)[0, ids.shape[1] :]
        after = model(ids).logits
    print(f"under the remedy its logits are others, by up to {float((under - before).abs().max()):.3f}")
    print(f"once it is off they are what they were, bit for bit: {torch.equal(before, after)}")
    print(f"its own generate wrote {len(written)} tokens under the remedy")

    # Loss beyond the training length: without a remedy, with one, and with the control that reads its last tokens.
    text = Text("counting", b" ".join(str(i).encode() for i in range(4000)))
    lengths = [ours.train_length, 4 * ours.train_length, 16 * ours.train_length]
    remedies = ["none", "state-norm", f"recompute:last={ours.train_length}"]
    table = rnn_longctx.evaluate(ours, lengths, ["lm:slices=2,tokens=0"], remedies, text=text)
    losses = table[table["metric"] == "nats_per_token"]
    print(losses.pivot_table(index="mitigation", columns="length", values="value").round(3).to_string())
    return torch.equal(before, after) and not torch.equal(before, under), losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
