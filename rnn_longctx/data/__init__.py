"""Tokenizers and texts. Knows nothing of models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnn_longctx.lazy import on_first_use

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

_WHERE = {
    "Arrival": "rnn_longctx.data.arrivals",
    "Arrivals": "rnn_longctx.data.arrivals",
    "ByteTokenizer": "rnn_longctx.data.tokenizers",
    "HFTokenizer": "rnn_longctx.data.tokenizers",
    "Shard": "rnn_longctx.data.sources",
    "Source": "rnn_longctx.data.sources",
    "Text": "rnn_longctx.data.text",
    "TokenStore": "rnn_longctx.data.store",
    "Tokenizer": "rnn_longctx.data.tokenizers",
    "load_text": "rnn_longctx.data.text",
    "load_tokenizer": "rnn_longctx.data.tokenizers",
    "open_streamed": "rnn_longctx.data.text",
    "stored": "rnn_longctx.data.store",
    "tokens": "rnn_longctx.data.text",
}

if TYPE_CHECKING:
    from rnn_longctx.data.arrivals import Arrival, Arrivals
    from rnn_longctx.data.sources import Shard, Source
    from rnn_longctx.data.store import TokenStore, stored
    from rnn_longctx.data.text import Text, load_text, open_streamed, tokens
    from rnn_longctx.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__getattr__, __dir__ = on_first_use(__name__, _WHERE)
