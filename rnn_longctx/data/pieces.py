"""Text encoded piece by piece, so that every piece has tokens of its own.

A piece of text has other tokens alone than where it stands: a tokenizer may put a space before it (Metaspace), or join
its ends with what stands beside it (byte-level BPE: ``" 865"``, ``".\\n"``). So no piece is encoded alone to count or
place its tokens: `encode_after` encodes it behind what stands before it, and pieces put together are the text.
"""

from __future__ import annotations

import numpy as np

from rnn_longctx.data.tokenizers import Tokenizer

# Tried in turn where a token would hold characters of both sides; the last of them joins with nothing.
OTHERS = ("x", ".", "\n", "\N{SYMBOL FOR RECORD SEPARATOR}")


def encode_after(tokenizer: Tokenizer, before: bytes | str, text: bytes | str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of `text` where it stands after `before`, none of which holds a character of `before`.

    Where the tokenizer would join the two in one token, `text` is encoded after another character that it does not join
    with, or alone.

    Returns:
        ids (n,) int64; nbytes (n,) int64, the bytes of `text` that each stands for, which sum to those of `text`.
    """
    data = text.encode() if isinstance(text, str) else text
    for head in (before, *OTHERS) if len(before) and tokenizer.name != "bytes" else ():
        raw = head.encode() if isinstance(head, str) else head
        first = tokenizer.encode_with_bytes(raw)[0]
        ids, nbytes = tokenizer.encode_with_bytes(raw + data)
        n, ends = len(first), np.cumsum(nbytes) - len(raw)
        if np.array_equal(ids[:n], first) and (not n or ends[n - 1] <= 0):
            # bytes of the head that the tokenizer drops are counted to the token after them
            return ids[n:], np.diff(np.maximum(ends[n:], 0), prepend=0)
    return tokenizer.encode_with_bytes(data)
