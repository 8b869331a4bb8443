"""Text to token ids and back, with the number of bytes of text that every token stands for.

A NUL byte separates documents. Losses per byte need ``nbytes``: it always sums to the bytes of text that went
in, so a text's loss per byte can be compared between tokenizers.

A model's vocabulary may be larger than its tokenizer's (50277 tokens padded to 50288 rows, say). A row that stands for
no token is never said (`rnn_longctx.models.stops`) and has no text: `decode` raises InputError for its id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError, one_line

_FILES = ["config.json", "*tokenizer*", "special_tokens*", "added_tokens.json", "vocab*", "merges.txt"]


class Tokenizer(Protocol):
    """A tokenizer as the library uses it. Ids and byte counts are int64 arrays of shape (tokens,).

    `vocab_size` is the largest id + 1. Where ids below it stand for no token, an attribute `unused` lists them.
    """

    name: str
    vocab_size: int
    eos_id: int | None

    def encode(self, data: bytes | str) -> np.ndarray: ...

    def decode(self, ids: Any) -> str: ...

    def encode_with_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray]: ...

    def __hash__(self) -> int: ...


class ByteTokenizer:
    """One token a byte; id 0 (NUL) ends a document."""

    name = "bytes"
    vocab_size = 256
    eos_id: int | None = 0

    def encode(self, data: bytes | str) -> np.ndarray:
        raw = data.encode() if isinstance(data, str) else data
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Any) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD. Raises InputError for an id beyond 255."""
        return _known(self, ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def encode_with_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(data)
        return ids, np.ones_like(ids)


class HFTokenizer:
    """A Hugging Face tokenizer (`tokenizers.Tokenizer`, or a fast one of transformers) behind the same
    interface.

    Nothing is added to what `encode` is given (no BOS), and text is never read as a special token. Input
    bytes must be UTF-8. A NUL becomes the end-of-document token; without one it is dropped and its byte
    counted to the next token.
    """

    def __init__(self, tokenizer: Any, name: str | None = None, eos_id: int | None = None, folder: Path | None = None):
        """folder: where it was read from, if not by transformers."""
        from tokenizers import Tokenizer as Fast

        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Fast):
            kind, needed = type(tokenizer).__name__, "a fast tokenizer (tokenizer.json) is needed"
            if not hasattr(tokenizer, "encode"):
                raise InputError(f"{kind} {tokenizer!r:.60} is no tokenizer; {needed}, or the name of one")
            raise InputError(f"tokenizer {kind} gives no byte offsets; {needed}")
        # A copy: the settings below must not change the tokenizer of the caller.
        self._fast = Fast.from_str(backend.to_str())
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self._folder, self._theirs = folder, None if isinstance(tokenizer, Fast) else tokenizer
        name = name or str(getattr(tokenizer, "name_or_path", "") or "tokenizer")
        # Two folders of one name may hold two tokenizers: the name says which one this is.
        self.name = f"{name} {hashlib.sha256(self._fast.to_str().encode()).hexdigest()[:8]}"
        tokens = np.array(sorted(self._fast.get_vocab(with_added_tokens=True).values()), dtype=np.int64)
        self.vocab_size = int(tokens[-1]) + 1 if len(tokens) else 0
        self.unused = np.setdiff1d(np.arange(self.vocab_size), tokens)
        self.eos_id = eos_id if eos_id is not None else getattr(tokenizer, "eos_token_id", None)

    def encode(self, data: bytes | str) -> np.ndarray:
        """Return the ids of a text; documents are encoded in parallel, without offsets, which take longer."""
        documents = self._documents(data.encode() if isinstance(data, str) else data)
        encodings = self._fast.encode_batch_fast(documents, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        end = np.array([] if self.eos_id is None else [self.eos_id], dtype=np.int64)
        return np.concatenate([piece for document in ids for piece in (end, document)][1:])

    def decode(self, ids: Any) -> str:
        """Return the text of ids, special tokens included. Raises InputError for an id that stands for no token."""
        return self._fast.decode(_known(self, ids).tolist(), skip_special_tokens=False)

    def transformers(self) -> Any:
        """Return it as transformers reads prompts: with its BOS, special tokens in a text as one id each, and its chat
        template. It is the caller's own tokenizer where one was given."""
        if self._theirs is None:
            from tokenizers import Tokenizer as Fast
            from transformers import AutoTokenizer, PreTrainedTokenizerFast

            if self._folder is not None:
                with contextlib.suppress(Exception):  # transformers raises many kinds; tokenizer.json has been read
                    self._theirs = AutoTokenizer.from_pretrained(self._folder)
            if self._theirs is None:
                end = None if self.eos_id is None else self._fast.id_to_token(self.eos_id)
                copy = Fast.from_str(self._fast.to_str())  # one in which text is read as special tokens
                self._theirs = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token=end)
        return self._theirs

    def _documents(self, data: bytes) -> list[str]:
        try:
            return data.decode("utf-8").split("\0")
        except UnicodeDecodeError as error:
            raise InputError(f"tokenizer {self.name} needs UTF-8 text; byte {error.start} is not") from None

    def encode_with_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        documents = self._documents(data)
        ids: list[np.ndarray] = []
        ends: list[np.ndarray] = []  # bytes of `data` read up to and including each token
        offset = 0
        for i, text in enumerate(documents):
            if i and self.eos_id is not None:
                ids.append(np.array([self.eos_id], dtype=np.int64))
                ends.append(np.array([offset], dtype=np.int64))
            encoding = self._fast.encode(text, add_special_tokens=False)
            if encoding.ids:
                stops = np.array([stop for _, stop in encoding.offsets], dtype=np.int64)
                ids.append(np.array(encoding.ids, dtype=np.int64))
                ends.append(offset + _byte_ends(text)[np.maximum.accumulate(stops)])
            offset += len(text.encode()) + 1  # + 1: the NUL after it
        if not ids:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        end = np.concatenate(ends)
        end[-1] = len(data)  # text after the last token (spaces that a normaliser drops, say) belongs to it
        return np.concatenate(ids), np.diff(end, prepend=0)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer of a name: "bytes", a directory with tokenizer.json, or a hub id.

    Raises:
        InputError: it is missing or cannot be reached.
    """
    if not isinstance(spec, str | Path):
        kind = type(spec).__name__
        raise InputError(f'a tokenizer is named by "bytes", a directory or a hub id; got {kind} {spec!r:.60}')
    if str(spec) == "bytes":
        return ByteTokenizer()
    directory = home_path(spec)
    file = directory / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer as Fast

        try:
            fast = Fast.from_file(str(file))
            eos = _eos_token(directory)
        except Exception as error:
            raise InputError(f"cannot read tokenizer {file}: {one_line(error)}") from None
        return HFTokenizer(fast, directory.resolve().name, fast.token_to_id(eos) if eos else None, directory)
    if directory.exists() and not (directory / "tokenizer_config.json").is_file():
        raise InputError(f"{spec} holds no tokenizer.json; expected a tokenizer directory, a hub id or bytes")
    if not directory.exists() and (isinstance(spec, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", spec)):
        raise InputError(f"no tokenizer at {spec}: there is no such directory, and a hub id looks like owner/name")
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    try:  # fetched first: on its own, transformers tries a hub out of reach again and again, file by file
        path = str(spec) if directory.exists() else snapshot_download(str(spec), allow_patterns=_FILES)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and its hub client raise many kinds
        what = "" if directory.exists() else ", which is neither a directory nor a hub id that can be reached"
        raise InputError(f"cannot load tokenizer {str(spec)!r}{what}: {one_line(error)}") from None
    return HFTokenizer(tokenizer, directory.resolve().name if directory.exists() else str(spec))


def _known(tokenizer: Tokenizer, ids: Any) -> np.ndarray:
    """Return the ids (tokens,) as an array. Raises InputError where one of them stands for no token."""
    ids = np.asarray(ids, dtype=np.int64)
    strange = ids[(ids < 0) | (ids >= tokenizer.vocab_size) | np.isin(ids, getattr(tokenizer, "unused", ()))]
    if len(strange):
        count = tokenizer.vocab_size - len(getattr(tokenizer, "unused", ()))
        has = f"tokenizer {tokenizer.name} has {count}, their ids lie in 0 to {tokenizer.vocab_size - 1}"
        raise InputError(f"id {strange[0]} stands for no token: {has}")
    return ids


def _byte_ends(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes of text[:i] for every i; shape (characters + 1,)."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    # NUL never occurs here, so utf-32 code points give each character's byte length.
    code = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    size = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(size)])


def _eos_token(directory: Path) -> str | None:
    """Return the end-of-document token's text as the directory's settings have it: a string, or a dict with
    `content`."""
    file = directory / "tokenizer_config.json"
    token = json.loads(file.read_text(encoding="utf-8")).get("eos_token") if file.is_file() else None
    return token.get("content") if isinstance(token, dict) else token
