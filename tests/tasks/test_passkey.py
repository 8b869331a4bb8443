from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from made_prompts import multikey_batch, training_sequence, words_batch

from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.multikey import LABELS
from rnn_longctx.tasks.passkey import STYLES, make_passkey, passkey_batch
from rnn_longctx.tasks.prompts import FILLER, Style
from rnn_longctx.tasks.words import WORDS

TOKENIZER = ByteTokenizer()


class Pairs(ByteTokenizer):
    """Tokens of up to two bytes: fewer tokens than characters, and odd lengths."""

    name = "pairs"

    def encode(self, data: bytes | str) -> np.ndarray:
        raw = data.encode() if isinstance(data, str) else data
        return np.array([int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2)], dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(int(i).to_bytes(2, "big").lstrip(b"\0") for i in ids).decode()

    def encode_with_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(data)
        return ids, np.where(ids < 256, 1, 2)


@pytest.mark.parametrize("style", ["paper", "headerless"])
def test_wording_length_and_position(style: str) -> None:
    rng = np.random.default_rng()
    for _ in range(20):
        length, depth = int(rng.integers(300, 3000)), float(rng.random())
        prompt = make_passkey(TOKENIZER, length, depth, rng, style)
        text = TOKENIZER.decode(prompt.ids)
        assert len(prompt.ids) == length and prompt.ids.dtype == np.int64
        assert re.fullmatch("[1-9][0-9]{4}", prompt.answer) and text.count(prompt.answer) == 2
        key, wording = STYLES[style].key.format(prompt.answer), STYLES[style]
        assert text.startswith(wording.header) and text.endswith(wording.question)
        assert text.index(key) == prompt.position
        room = length - len(wording.header) - len(key) - len(wording.question)
        assert prompt.position == len(wording.header) + round(depth * room)
        before = text[len(wording.header) : prompt.position]
        after = text[prompt.position + len(key) : -len(wording.question)]
        for filler in (before, after):
            assert (FILLER * (length // len(FILLER) + 1)).endswith(filler), "only its left end may be cut"


def test_the_papers_fixed_parts_take_244_bytes() -> None:
    wording = STYLES["paper"]
    text = wording.header + wording.key.format(34847) + wording.question + " 34847"
    assert len(text) == 244


def test_auto_style() -> None:
    rng = np.random.default_rng()
    assert "important info" not in TOKENIZER.decode(make_passkey(TOKENIZER, 1023, 0.5, rng).ids)
    assert "important info" in TOKENIZER.decode(make_passkey(TOKENIZER, 1024, 0.5, rng).ids)


@pytest.mark.parametrize("style", ["paper", "headerless"])
def test_too_short_says_the_smallest(style: str) -> None:
    rng = np.random.default_rng()
    with pytest.raises(InputError, match="takes at least") as error:
        make_passkey(TOKENIZER, 20, 0.5, rng, style)
    smallest = int(re.search(r"at least (\d+)", str(error.value))[1])  # type: ignore[index]
    assert len(make_passkey(TOKENIZER, smallest, 0.5, rng, style).ids) == smallest
    with pytest.raises(InputError):
        make_passkey(TOKENIZER, smallest - 1, 0.5, rng, style)


def test_mistakes() -> None:
    rng = np.random.default_rng()
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="depth"):
            make_passkey(TOKENIZER, 500, depth, rng)
    with pytest.raises(InputError, match='did you mean "paper"'):
        make_passkey(TOKENIZER, 500, 0.5, rng, "papr")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Pairs()])
def test_any_tokenizer_gives_exact_lengths(tokenizer: ByteTokenizer) -> None:
    rng = np.random.default_rng()
    for length in rng.integers(200, 5000, 20).tolist():
        assert len(make_passkey(tokenizer, length, float(rng.random()), rng).ids) == length
        ids, mask = training_sequence(tokenizer, length, rng)
        assert len(ids) == len(mask) == length


def test_batches_are_reproducible_with_fresh_keys() -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    few, again = (passkey_batch(TOKENIZER, 400, 5, seed) for _ in range(2))
    assert [p.depth for p in few] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert all((a.ids == b.ids).all() for a, b in zip(few, again))
    many = passkey_batch(TOKENIZER, 400, 50, seed)
    assert [p.depth for p in many[:11]] == pytest.approx([*(np.arange(10) + 0.5) / 10, 0.05])
    assert [p.answer for p in many[:5]] == [p.answer for p in few], "more prompts do not change the first keys"
    assert len({p.answer for p in many}) > 45
    assert {p.answer for p in passkey_batch(TOKENIZER, 401, 50, seed)} != {p.answer for p in many}
    assert {p.answer for p in passkey_batch(TOKENIZER, 400, 50, seed + 1)} != {p.answer for p in many}


def test_training_sequence() -> None:
    rng = np.random.default_rng()
    positions = set()
    for _ in range(30):
        length = int(rng.integers(110, 300))
        ids, mask = training_sequence(TOKENIZER, length, rng)
        text = TOKENIZER.decode(ids)
        key = re.search(r"passkey is (\d{5})\. Remember", text)
        assert key and text.endswith(f"The passkey is {key[1]}.") and mask.dtype == bool
        assert TOKENIZER.decode(ids[mask]) == f" {key[1]}."
        state = rng.bit_generator.state
        ids, mask = training_sequence(TOKENIZER, length, rng, said_again=True)
        rng.bit_generator.state = state
        same, answer = training_sequence(TOKENIZER, length, rng)
        found = TOKENIZER.decode(ids[mask])
        assert (ids == same).all() and mask[answer].all() and re.fullmatch(r"(\d{5}) \1\.", found)
        assert f"Remember it. {found[:5]} is" in TOKENIZER.decode(ids[: mask.nonzero()[0][0] + 8])
        positions.add(key.start() / length)
    assert max(positions) - min(positions) > 0.2
    with pytest.raises(InputError, match="at least"):
        training_sequence(TOKENIZER, 60, rng)


def test_another_haystack_and_wording() -> None:
    rng = np.random.default_rng()
    hay = Text("hay", bytes(rng.integers(97, 123, 4000, dtype=np.uint8)))
    one = Style("Look! ", "<{0} {x} {0}>", "Which {x}?")
    several = Style("", "<{1}: {0}>", "{1}?")
    for i, prompt in enumerate(passkey_batch(TOKENIZER, 701, 12, int(rng.integers(1 << 30)), one, hay)):
        text, said = TOKENIZER.decode(prompt.ids), f"<{prompt.answer} {{x}} {prompt.answer}>"
        room = 701 - len("Look! ") - len(said) - len("Which {x}?")
        filler = hay.slice(i, room).decode()
        before = round(prompt.depth * room)
        assert text == "Look! " + filler[:before] + said + filler[before:] + "Which {x}?"
    for prompt in words_batch(TOKENIZER, 300, 5, 3, one, hay):
        assert prompt.answer in WORDS and f"<{prompt.answer} {{x}} {prompt.answer}>" in TOKENIZER.decode(prompt.ids)
    for prompt in multikey_batch(TOKENIZER, 300, 5, 3, 3, several, hay):
        bound = dict(re.findall(r"<(\w+): (\d{5})>", TOKENIZER.decode(prompt.ids)))
        asked = TOKENIZER.decode(prompt.ids).rpartition("?")[0][-8:]
        assert len(bound) == 3 and set(bound) <= set(LABELS)
        assert [bound[w] for w in bound if asked.endswith(w)] == [prompt.answer]
    with pytest.raises(InputError, match=r"must hold \{1\}"):
        multikey_batch(TOKENIZER, 300, 5, 3, 3, one)
    with pytest.raises(InputError, match="has 4000 bytes"):
        passkey_batch(TOKENIZER, 5000, 1, 0, one, hay)
    for wrong in (("", "no answer", "?"), ("", "{0}", "{0}?")):
        with pytest.raises(InputError, match=r"key must hold \{0\}"):
            Style(*wrong)
