"""Tokenizers, texts and synthetic tasks. Knows nothing of models."""

from rnn_longctx.data.arrivals import Arrival, Arrivals
from rnn_longctx.data.sources import Shard, Source
from rnn_longctx.data.store import Stored, stored
from rnn_longctx.data.text import Text, load_text, open_streamed, tokens
from rnn_longctx.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from rnn_longctx.tasks.passkey import (
    PasskeyPrompt,
    Style,
    make_passkey,
    multikey_batch,
    passkey_batch,
    training_sequence,
    words_batch,
)

__all__ = [
    "Arrival",
    "Arrivals",
    "ByteTokenizer",
    "HFTokenizer",
    "PasskeyPrompt",
    "Shard",
    "Source",
    "Stored",
    "Style",
    "Text",
    "Tokenizer",
    "load_text",
    "load_tokenizer",
    "make_passkey",
    "multikey_batch",
    "open_streamed",
    "passkey_batch",
    "stored",
    "tokens",
    "training_sequence",
    "words_batch",
]
