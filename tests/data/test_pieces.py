"""What is encoded piece by piece is the text, with tokenizers of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from made_tokenizers import NAMES, as_read, lines, made_tokenizer

from rnn_longctx.data import Text, tokens
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.tasks import prompts


@pytest.mark.parametrize("kind", NAMES)
def test_a_piece_has_tokens_of_its_own(kind: str) -> None:
    tokenizer, rng, corpus = made_tokenizer(kind), np.random.default_rng(), " ".join(lines())
    for _ in range(100):
        a, n, m = rng.integers(0, len(corpus) - 100), *rng.integers(1, 40, 2)
        before, text = "x\n" + corpus[a : a + n], corpus[a + n : a + n + m]
        ids, nbytes = encode_after(tokenizer, before, text)
        assert nbytes.sum() == (len(text) if len(ids) else 0) and (nbytes >= 0).all()
        whole = tokenizer.decode(np.concatenate([tokenizer.encode(before), ids]))
        assert as_read(kind, whole.lstrip()) == as_read(kind, (before + text).lstrip())


@pytest.mark.parametrize("kind", NAMES)
def test_where_a_token_would_hold_both_sides(kind: str) -> None:
    """A word and a line cut in two: what stands after the cut has no token with what stands before it."""
    tokenizer = made_tokenizer(kind)
    for before, text in (("The pass", "key"), ("again.", "\nThe"), ("86", "556"), ("86556", " is"), ("is ", "86556")):
        ids = encode_after(tokenizer, before, text)[0]
        after = tokenizer.decode(np.concatenate([encode_after(tokenizer, "", "x.")[0], ids])).lstrip()
        assert as_read(kind, after).removeprefix("x.").lstrip() == as_read(kind, text).lstrip()


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-prefix", "metaspace-always", "llama-2", "unigram", "t5"])
def test_blocks_of_a_text_join(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is encoded in blocks: no space comes between two of them, and every byte is counted."""
    from rnn_longctx.data import text as module

    monkeypatch.setattr(module, "BLOCK", 200)
    rng = np.random.default_rng()
    written = "".join(" " * rng.integers(0, 5) + prompts.FILLER + "\n" * rng.integers(1, 3) for _ in range(90)).lstrip()
    text = Text("t", written.encode())
    start = text.start(0)
    ids, nbytes = tokens(text, made_tokenizer(kind), 0, 600)
    read, expected = made_tokenizer(kind).decode(ids), written[start : start + nbytes.sum()]
    if kind == "t5":
        read, expected = " ".join(read.split()), " ".join(expected.split())
    assert read.lstrip() == expected.lstrip()
