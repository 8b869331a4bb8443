"""Text as it is made, with every kind of tokenizer, and what a checkpoint says of where an answer ends."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rnn_longctx import generate, load
from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.stops import TextStream, end_ids, unused_rows

WORDS = "the pass key is green, the grass is blue. Hélène said: 漢字 and 🙂👍🏽 are well-known ABC tokens 12345\n"


def _bpe():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def _fallback(prefix):
    """Pieces with a mark for a space, and bytes for what is no piece, as in Llama's."""
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz.,:-", "▁the", "▁is", "en"]
    vocab = [("<unk>", 0.0), *((piece, -float(i % 7 + 2)) for i, piece in enumerate(pieces))]
    made = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prefix)])
    return made


def _words():
    made = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        [WORDS] * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    )
    return made


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "byte-level BPE": lambda: HFTokenizer(_bpe(), "bpe"),
    "spaces with a prefix": lambda: HFTokenizer(_fallback("always"), "always"),
    "spaces without a prefix": lambda: HFTokenizer(_fallback("never"), "never"),
    "WordPiece": lambda: HFTokenizer(_words(), "words"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_text(kind):
    """Put together they are the whole; none holds half a character, and none takes a word back."""
    tokenizer, rng = TOKENIZERS[kind](), np.random.default_rng()
    for _ in range(20):
        text = "".join(rng.choice(list(WORDS), 40))
        ids = tokenizer.encode(text).tolist()
        stream, pieces = TextStream(tokenizer), []
        for token in ids:
            stream.add(token)
            pieces.append(stream.take())
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)
    assert sum(map(bool, pieces)) > 5  # as it is made


def test_bytes_that_are_no_text():
    stream, said = TextStream(ByteTokenizer()), []
    for token in b"a\xff\xfeb\xe6\xbc":
        stream.add(token)
        said.append(stream.take())
    assert said == ["a", "", "", "\ufffd\ufffdb", "", ""] and stream.rest() == "\ufffd" and stream.rest() == ""


@pytest.mark.parametrize("kind", ["bytes", "byte-level BPE"])
def test_a_stop_string_is_not_told_in_halves(kind):
    tokenizer = TOKENIZERS[kind]()
    stream, pieces = TextStream(tokenizer, ["blue. Hé", "bluest"]), []
    for token in tokenizer.encode("the blues, blue and bluest").tolist():
        stream.add(token)
        pieces.append(stream.take())
        if stream.stopped:
            break
    assert "".join(pieces) == "the blues, blue and bluest" and not stream.rest()
    assert pieces[-1].endswith("bluest")
    at = 0
    for piece in pieces[:-1]:  # nowhere does what was told end with the beginning of one
        at += len(piece)
        told = "the blues, blue and bluest"[:at]
        assert not any(told.endswith(s[:n]) for s in stream.stops for n in range(1, len(s)))
    again = TextStream(tokenizer, ["e. H"])
    for token in tokenizer.encode("blue. Hélène").tolist():
        again.add(token)
    assert again.stopped and again.take().startswith("blue. H")


def test_holes_of_a_vocabulary():
    made = HFTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 2, "c": 5}, unk_token="a")), "holes")
    assert unused_rows(made, 8).tolist() == [False, True, False, True, True, False, True, True]
    assert unused_rows(made, 3).tolist() == [False, True, False]
    assert unused_rows(ByteTokenizer(), 256) is None and unused_rows(None, 300) is None
    assert unused_rows(ByteTokenizer(), 258).nonzero().flatten().tolist() == [256, 257]


def test_a_tokenizer_out_of_reach_is_looked_for_once(make, monkeypatch):
    asked = []

    def unreachable(*given, **more):
        asked.append(given)
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    lm = make()
    lm.tokenizer = LazyTokenizer("owner/name", "small", 61)
    with pytest.warns(RuntimeWarning, match="generation of small knows neither its end of text"):
        said = generate(lm, [1, 2], 3)
    assert torch.equal(generate(lm, [1, 2], 3), said) and len(asked) == 1
    lm.tokenizer = LazyTokenizer(None, "small", 61)  # there is none to be looked for
    assert torch.equal(generate(lm, [1, 2], 3), said)


@pytest.mark.parametrize("layout", ["rnn-longctx", "transformers", "state-spaces"])
@pytest.mark.parametrize("ends", [None, 7, [7, 3]])
def test_ends_are_kept_with_a_checkpoint(make, layout, ends, tmp_path):
    lm = make(vocab_size=256)
    lm.tokenizer, lm.eos_token_id = ByteTokenizer(), ends
    checkpoint.save(lm, tmp_path / "m", layout=layout)
    again = load(tmp_path / "m", tokenizer="bytes")
    assert again.eos_token_id == ends and end_ids(again) == (0, *([] if ends is None else np.atleast_1d(ends)))


def test_generation_config_goes_before_config(make, tmp_path):
    lm = make(vocab_size=256)
    lm.tokenizer, lm.eos_token_id = ByteTokenizer(), 7
    checkpoint.save(lm, tmp_path / "m", layout="transformers")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert end_ids(load(tmp_path / "m")) == (0, 9, 7)


@pytest.mark.gpu
def test_looking_for_ends_costs_little():
    """On a GPU, whose steps are queued: tokens a second with an end id and with a stop string, beside those without."""
    model = Mamba2LM(Mamba2Config(d_model=1024, n_layer=48, vocab_size=50288)).eval().to("cuda", torch.bfloat16)
    model.tokenizer = ByteTokenizer()
    ids, speeds = torch.randint(1, 256, (1, 512)), {}
    for name, eos, stop in (("an end id", 0, ()), ("a stop string", 0, "\0\0"), ("neither", None, ())):
        model.tokenizer.eos_id = eos
        with torch.no_grad():
            model.lm_head.weight[0] = 0  # (never said)
        taken = []
        for _ in range(4):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            said = generate(model, ids, 512, stop=stop).shape[1]
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - begun) / said)
        speeds[name] = 1 / min(taken)
    print({name: round(speed) for name, speed in speeds.items()}, torch.cuda.get_device_name(), torch.__version__)
    assert min(speeds["an end id"], speeds["a stop string"]) > 0.8 * speeds["neither"]
