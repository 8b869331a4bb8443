from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rnn_longctx.data import ByteTokenizer, HFTokenizer, load_tokenizer
from rnn_longctx.errors import InputError

ALPHABET = list("abc de\n\t.'é漢🙂ß  <>|endoftext0123")


def random_text(rng: np.random.Generator, n: int) -> str:
    return "".join(rng.choice(ALPHABET, n))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level BPE such as GPT-2's, trained here: its tokens may split a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the pass key is the grass is green abc abc de de\n"] * 5, trainer)
    return tokenizer


def test_bytes_round_trip() -> None:
    rng = np.random.default_rng()
    tokenizer = ByteTokenizer()
    data = rng.integers(0, 256, 1000).astype(np.uint8).tobytes()
    ids, nbytes = tokenizer.encode_with_bytes(data)
    assert ids.dtype == nbytes.dtype == np.int64 and bytes(ids.tolist()) == data and nbytes.sum() == len(data)
    text = random_text(rng, 100)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0xC3]) == "�" and tokenizer.eos_id == 0 and tokenizer.decode([]) == ""


def test_an_id_that_stands_for_no_token_has_no_text(bpe: Tokenizer) -> None:
    with pytest.raises(
        InputError, match="id 304 stands for no token: tokenizer bytes has 256, their ids lie in 0 to 255"
    ):
        ByteTokenizer().decode([48, 304])
    with pytest.raises(InputError, match="id -1 stands for no token"):
        ByteTokenizer().decode([-1])
    size = bpe.get_vocab_size()
    copy = Tokenizer.from_str(bpe.to_str())
    copy.add_tokens(["<more>"])
    holes = json.loads(copy.to_str())
    holes["added_tokens"][-1]["id"] += 3
    for made, vocab, unused in (
        (bpe, size, []),
        (copy, size + 1, []),
        (Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a")), 6, [1, 2, 3, 4]),
        (Tokenizer.from_str(json.dumps(holes)), None, None),
    ):
        tokenizer = HFTokenizer(made, "t")
        known = made.get_vocab(with_added_tokens=True).values()
        if vocab is None:  # a library may put an added token where there is room
            vocab, unused = max(known) + 1, sorted(set(range(max(known))) - set(known))
        assert tokenizer.vocab_size == vocab and tokenizer.unused.tolist() == unused
        tokenizer.decode(sorted(known))
        for strange in (vocab, *unused):
            with pytest.raises(InputError, match=f"id {strange} stands for no token: tokenizer t .* has {len(known)},"):
                tokenizer.decode([0, strange])


def test_bpe_round_trip_and_byte_counts(bpe: Tokenizer) -> None:
    rng = np.random.default_rng()
    tokenizer = HFTokenizer(bpe, "tiny", eos_id=0)
    for _ in range(20):
        documents = [random_text(rng, int(rng.integers(0, 60))) for _ in range(3)]
        data = "\0".join(documents).encode()
        ids, nbytes = tokenizer.encode_with_bytes(data)
        assert ids.dtype == nbytes.dtype == np.int64
        assert nbytes.sum() == len(data) and (nbytes >= 0).all()
        assert tokenizer.decode(ids) == "<|endoftext|>".join(documents)
        boundary = np.flatnonzero(ids == 0)
        assert len(boundary) == 2, "one end-of-document token a NUL, and none from the text's own <|endoftext|>"
        before = [len("\0".join(documents[:k]).encode()) for k in (1, 2)]
        assert [int(nbytes[:b].sum()) for b in boundary] == before
        assert (tokenizer.encode(data) == ids).all()


def test_nbytes_line_up_with_each_token(bpe: Tokenizer) -> None:
    text = "the pass key is abc de é漢🙂 the"
    ids, nbytes = HFTokenizer(bpe, "tiny").encode_with_bytes(text.encode())
    ends = np.cumsum(nbytes)
    # At every token that ends a character the bytes so far are the decoded text so far.
    for i in range(len(ids)):
        decoded = bpe.decode(ids[: i + 1].tolist())
        if not decoded.endswith("�"):
            assert ends[i] == len(decoded.encode())


def test_text_that_the_tokenizer_drops_is_still_counted(bpe: Tokenizer) -> None:
    copy = Tokenizer.from_str(bpe.to_str())
    copy.normalizer = normalizers.Strip()
    tokenizer = HFTokenizer(copy, "strip")
    for data in (b"  abc  ", b"abc\0   \0de \0", b"\0\0abc", "  é \0".encode()):
        ids, nbytes = tokenizer.encode_with_bytes(data)
        assert nbytes.sum() == len(data) and len(ids)
    assert len(tokenizer.encode(b"")) == len(tokenizer.encode(b"  ")) == 0


def test_the_callers_tokenizer_is_not_changed(bpe: Tokenizer) -> None:
    copy = Tokenizer.from_str(bpe.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=4)
    ids = HFTokenizer(copy, "t").encode("abc de " * 20)
    assert len(ids) > 20 and len(copy.encode("abc de " * 20).ids) == 4


def test_not_utf8_names_the_byte(bpe: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"tiny [0-9a-f]{8} needs UTF-8 text; byte 3 is not"):
        HFTokenizer(bpe, "tiny").encode(b"abc\xff")


def test_load_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    assert load_tokenizer("bytes").name == "bytes"
    directory = tmp_path / "my-tokenizer"
    directory.mkdir()
    bpe.save(str(directory / "tokenizer.json"))
    assert load_tokenizer(directory).eos_id is None
    for eos in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(directory)
        assert tokenizer.name.startswith("my-tokenizer ")
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, bpe.get_vocab_size())
        assert (tokenizer.encode("abc de") == bpe.encode("abc de").ids).all()


def test_transformers_tokenizer(bpe: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer = HFTokenizer(wrapped, "w")
    assert tokenizer.eos_id == 0 and (tokenizer.encode("abc de") == bpe.encode("abc de").ids).all()


def test_load_tokenizer_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("cannot reach the hub\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="cannot load tokenizer 'no-such/tokenizer'") as error:
        load_tokenizer("no-such/tokenizer")
    assert "\n" not in str(error.value) and "neither a directory nor a hub id" in str(error.value)
    for missing in (str(tmp_path / "none"), tmp_path / "none", "two/many/parts"):
        with pytest.raises(InputError, match=f"no tokenizer at {missing}: there is no such directory"):
            load_tokenizer(missing)
    for wrong in (3, object()):
        with pytest.raises(InputError, match=r"is no tokenizer; .* or the name of one"):
            HFTokenizer(wrong)

    class Slow:
        encode = list

    with pytest.raises(InputError, match="tokenizer Slow gives no byte offsets"):
        HFTokenizer(Slow())
