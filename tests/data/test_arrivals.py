from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, trainers

from rnn_longctx.data import Arrivals, ByteTokenizer, HFTokenizer, Tokenizer
from rnn_longctx.data import arrivals as module
from rnn_longctx.errors import InputError

ALPHABET = list("abc de\n\t\"\\'é漢🙂ß")


def words(n: int) -> str:
    return "".join(np.random.default_rng().choice(ALPHABET, n))


def bpe(text: str) -> HFTokenizer:
    """Merges of bytes, also of parts of characters."""
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    fast.train_from_iterator([text], trainer)
    return HFTokenizer(fast, "bpe", eos_id=fast.token_to_id("<end>"))


def meant(folder: Path, spans: list[tuple[str, int, int]]) -> list[str]:
    """The documents that the spans hold; those of JSON Lines end, the last of the others goes on."""
    found = []
    for name, start, stop in spans:
        raw = (folder / name).read_bytes()[start:stop]
        found += [json.loads(line)["text"] for line in raw.splitlines()] if name.endswith("l") else [raw.decode()]
    return found


def said(tokenizer: Tokenizer, ids: np.ndarray) -> list[str]:
    cuts = np.flatnonzero(ids == tokenizer.eos_id)
    parts = [part[part != tokenizer.eos_id] for part in np.split(ids, cuts)]
    return [tokenizer.decode(part) for part in parts if len(part)]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_each_byte_is_read_once_however_the_files_grow(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng()
    monkeypatch.setattr(module, "BLOCK", int(rng.integers(5, 90)))  # blocks that end anywhere
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else bpe(words(3000))
    written = {"a.txt": words(900).encode(), "c/b.txt": words(700).encode(), "d.py": words(300).encode()}
    written |= {"b.jsonl": b"".join(json.dumps({"text": words(50)}).encode() + b"\n" for _ in range(20))}
    there = dict.fromkeys(written, 0)
    arrivals, found = Arrivals(tmp_path, tokenizer), []
    while True:
        arrival = arrivals.take(n := int(rng.integers(20, 200)))
        if arrival is not None:
            assert n <= len(arrival.ids) <= n + 200  # a record has 50 characters
            assert said(tokenizer, arrival.ids) == meant(tmp_path, arrival.spans)
            assert np.array_equal(arrivals.take(n).ids, arrival.ids), "nothing is read before it is done"
            arrivals.done(arrival)
            found += arrival.spans
            continue
        if there == {name: len(raw) for name, raw in written.items()}:
            break
        name = str(rng.choice([k for k in written if there[k] < len(written[k])]))
        there[name] = min(len(written[name]), there[name] + int(rng.integers(1, 300)))  # also inside a character
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(written[name][: there[name]])
    while (arrival := arrivals.take(1)) is not None:
        arrivals.done(arrival)
        found += arrival.spans
    assert not arrivals.skipped
    for name, raw in written.items():
        spans = [(start, stop) for n, start, stop in found if n == name]
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])] and spans[-1][1] == len(raw)


def test_files_are_read_by_name_and_others_not_at_all(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".c.txt", "STOP", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    arrivals = Arrivals(tmp_path, ByteTokenizer())
    arrival = arrivals.take(19)
    assert arrival is not None and bytes(arrival.ids.astype(np.uint8)) == b"a.txt\0a/z.txt\0b.txt"
    assert arrivals.stopped and arrivals.take(20) is None


def test_what_is_still_being_written_waits(tmp_path: Path) -> None:
    arrivals = Arrivals(tmp_path, ByteTokenizer())
    line, text = json.dumps({"text": "x" * 40}).encode(), "漢".encode()
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "b.txt").write_bytes(text[:2])
    assert arrivals.take(1) is None and not arrivals.skipped
    (tmp_path / "b.txt").write_bytes(text)
    first = arrivals.take(1)
    assert first is not None and first.spans == [("b.txt", 0, 3)] and len(first.ids) == 3
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    both = arrivals.take(44)
    assert both is not None and bytes(both.ids.astype(np.uint8)) == b"x" * 40 + b"\0" + text


BAD = {
    "nul.txt": (b"good\0bad", "not UTF-8 text at byte 4"),
    "latin.txt": ("gut für".encode("latin1"), "not UTF-8 text at byte 5"),
    "torn.jsonl": (b'{"text": "a"}\n{"text"\n', "at byte 14: not a line of JSON in UTF-8"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "at byte 0: not a line of JSON in UTF-8"),
    "field.jsonl": (b'{"body": "a"}\n', "at byte 0: no field 'text' (fields: body)"),
    "number.jsonl": (b'{"text": 3}\n', "at byte 0: field 'text' is int, not text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_text_is_skipped_with_the_reason(name: str, tmp_path: Path) -> None:
    raw, reason = BAD[name]
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "z.txt").write_text("and on")
    arrivals = Arrivals(tmp_path, ByteTokenizer())
    arrival = arrivals.take(6)
    assert arrival is not None and arrival.spans == [("z.txt", 0, 6)]
    assert arrivals.skipped == {name: reason}


def test_what_cannot_be_read_is_skipped_with_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for a writer
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "cut.txt").write_text("long at first")
    arrivals = Arrivals(tmp_path, ByteTokenizer())
    first = arrivals.take(13)
    assert first is not None
    arrivals.done(first)
    (tmp_path / "cut.txt").write_text("short")
    assert arrivals.take(1) is None
    assert arrivals.skipped["cut.txt"] == "5 bytes, fewer than the 13 that were read of it"
    assert arrivals.skipped["pipe.txt"] == "not a regular file" and "symbolic links" in arrivals.skipped["loop.txt"]


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stream: no directory at .*nowhere"):
        Arrivals(tmp_path / "nowhere", ByteTokenizer())
    (tmp_path / "here").mkdir()
    arrivals = Arrivals(tmp_path / "here", ByteTokenizer())
    (tmp_path / "here").rmdir()
    with pytest.raises(InputError, match="stream: no directory"):
        arrivals.take(1)
