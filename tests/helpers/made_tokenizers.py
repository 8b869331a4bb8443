"""Tokenizers of every kind, each trained here on a few lines, and what of a text each of them changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.tasks.multikey import LABELLED
from rnn_longctx.tasks.passkey import PAPER
from rnn_longctx.tasks.prompts import FILLER, Style
from rnn_longctx.tasks.words import WORDED, WORDS

UNKNOWN, SIZE, SEED = "<unk>", 600, 0
# Llama 3's and GPT-4's: punctuation takes the newlines after it, digits go by three.
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def lines() -> list[str]:
    """A few sentences, and a few hundred numbers and words to join digits and letters by."""
    rng = np.random.default_rng(SEED)
    wordings = [PAPER, LABELLED, WORDED, Style("", "<{0} {x} {0}>", "Which {x}? ")]
    said = [w.key.replace("{0}", str(rng.integers(10_000, 100_000))) for w in wordings for _ in range(20)]
    numbers = [f" {a} and {b}." for a, b in rng.integers(10, 100_000, (200, 2))]
    letters = ["abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789?!.,:;<>{}()'\n"]
    sentences = [w.header + w.question for w in wordings]
    return [FILLER * 2, *sentences, *said, *numbers, " ".join(WORDS), *letters]


def byte_level(regex: bool = True, prefix: bool = False, pattern: str | None = None) -> Tokenizer:
    """GPT-2's kind; without its regular expression a token may hold the end of a key and what follows."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, made.pre_tokenizer])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(lines(), trainer)
    return made


def metaspace(scheme: str, unigram: bool = False, digits: bool = False, split: bool = True) -> Tokenizer:
    made = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token=UNKNOWN))
    spaces = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    alone = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    made.pre_tokenizer = pre_tokenizers.Sequence([spaces, *alone])
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    kind = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    trainer = kind(vocab_size=SIZE, special_tokens=[UNKNOWN], show_progress=False, unk_token=UNKNOWN)
    made.train_from_iterator(lines(), trainer)
    return made


def llama2() -> Tokenizer:
    """A prefix by the normaliser, whatever the text begins with; digits alone; what is unknown by its bytes."""
    trained = metaspace("always", digits=True)
    settings = json.loads(trained.to_str())
    vocab, merges = settings["model"]["vocab"], settings["model"]["merges"]
    vocab |= {f"<0x{i:02X}>": len(vocab) + i for i in range(256)}
    del vocab["\n"]
    merges = [tuple(pair) for pair in merges if "\n" not in "".join(pair)]
    vocab = {t: i for i, t in enumerate(t for t in vocab if "\n" not in t)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return made


def word_piece(lower: bool) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lower)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(lines(), trainer)
    return made


def collapsing() -> Tokenizer:
    """T5's kind: white space of any length is one space, at the ends none."""
    made = metaspace("always", unigram=True)
    squeeze = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([squeeze, normalizers.Strip()])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level-prefix": lambda: byte_level(prefix=True),
    "byte-level-whole": lambda: byte_level(regex=False),
    "llama-3": lambda: byte_level(regex=False, pattern=LLAMA3),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-never": lambda: metaspace("never"),
    "metaspace-whole": lambda: metaspace("never", split=False),
    "llama-2": llama2,
    "unigram": lambda: metaspace("always", unigram=True),
    "unigram-first": lambda: metaspace("first", unigram=True),
    "unigram-never": lambda: metaspace("never", unigram=True),
    "unigram-whole": lambda: metaspace("never", unigram=True, split=False),
    "t5": collapsing,
    "digits": lambda: metaspace("first", digits=True),
    "word-piece": lambda: word_piece(lower=False),
    "word-piece-lower": lambda: word_piece(lower=True),
}
NAMES = ("bytes", *KINDS)


@cache
def made_tokenizer(kind: str) -> ByteTokenizer | HFTokenizer:
    return ByteTokenizer() if kind == "bytes" else HFTokenizer(KINDS[kind](), kind)


def as_read(kind: str, text: str) -> str:
    """A text less what this kind of tokenizer drops of any."""
    if kind.startswith("word-piece"):
        text = (text.lower() if kind.endswith("lower") else text).removeprefix("##")  # of a first token inside a word
    exact = not kind.startswith(("word-piece", "t5"))
    return text if exact else "".join(text.split())
