"""The tokenizer of a checkpoint: named by it, or in files beside its weights."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

from rnn_longctx.config import home_path
from rnn_longctx.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.json_files import write_json
from rnn_longctx.models.lm import LM


class LazyTokenizer:
    """A tokenizer that is loaded when first used: a model works where its tokenizer cannot be had, and the
    InputError that says so comes only when text must be read."""

    def __init__(self, spec: str | Path | None, model: str, size: int):
        self.spec, self.model, self.size = spec, model, size
        self._tokenizer: Tokenizer | None = None
        self._missing = spec is None  # whether it was looked for in vain

    def at_hand(self) -> Tokenizer | None:
        """Return the tokenizer, or None where it cannot be had, which is tried once and warned of."""
        try:
            return None if self._missing else self.load()
        except InputError as error:
            self._missing = True
            warnings.warn(f"generation of {self.model} knows neither its end of text nor which rows of its vocabulary "
                          f"stand for no token: {error}", RuntimeWarning, stacklevel=2)  # fmt: skip
            return None

    def load(self) -> Tokenizer:
        if self.spec is None:
            raise InputError(
                f"model {self.model} comes with no tokenizer; name one with --tokenizer (tokenizer= of load or adopt "
                "in Python): a directory, a hub id, bytes"
            )
        if self._tokenizer is None:
            try:
                self._tokenizer = fits(load_tokenizer(self.spec), self.size)
            except InputError as error:
                raise InputError(f"{error}; name another with --tokenizer (tokenizer= in Python)") from None
        return self._tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for these
            raise AttributeError(name)
        return getattr(self.load(), name)


def tokenizer_of(source: str | Path) -> str | Path | None:
    """Return where the tokenizer of a model lies that transformers read from `source`: that folder, if it holds one, or
    a hub id; None where there is none to be seen."""
    folder = home_path(source)
    if folder.is_dir():
        return (
            folder if any((folder / f"{file}.json").is_file() for file in ("tokenizer", "tokenizer_config")) else None
        )
    return str(source) if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)) else None


def fits(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """Return the tokenizer, or raise InputError where it has ids that a vocabulary of `size` has not. (A padded one has
    more.)"""
    if tokenizer.vocab_size > size:
        raise InputError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's vocabulary {size}")
    return tokenizer


def tokenizer_spec(model: LM) -> str | None:
    """Return what config.json says: a name that loads anywhere, or None where files lie beside the weights."""
    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    spec = tokenizer.spec if isinstance(tokenizer, LazyTokenizer) else None
    return spec if isinstance(spec, str) and not home_path(spec).exists() else None


def write_tokenizer(model: LM, directory: Path) -> None:
    """Write the files of a model's tokenizer beside its weights, where it is one that files hold."""
    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, LazyTokenizer) and tokenizer_spec(model) is None:
        with contextlib.suppress(InputError):  # a model without a tokenizer is saved without one
            tokenizer = tokenizer.load()
    if not isinstance(tokenizer, HFTokenizer):
        return
    fast = tokenizer._fast
    fast.save(str(directory / "tokenizer.json"))
    eos = None if tokenizer.eos_id is None else fast.id_to_token(tokenizer.eos_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    of_transformers = tokenizer.transformers()
    for name in ("bos_token", "unk_token", "chat_template"):  # what prompts are made of
        if value := getattr(of_transformers, name, None):
            settings[name] = value
    write_json(directory / "tokenizer_config.json", settings)
