"""Tokenizers and texts. Knows nothing of models."""

from rnn_longctx.data.arrivals import Arrival, Arrivals
from rnn_longctx.data.sources import Shard, Source
from rnn_longctx.data.store import TokenStore, stored
from rnn_longctx.data.text import Text, load_text, open_streamed, tokens
from rnn_longctx.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Arrival",
    "Arrivals",
    "ByteTokenizer",
    "HFTokenizer",
    "Shard",
    "Source",
    "Text",
    "TokenStore",
    "Tokenizer",
    "load_text",
    "load_tokenizer",
    "open_streamed",
    "stored",
    "tokens",
]
