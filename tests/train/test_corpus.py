from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.train.config import DataConfig, PasskeyConfig, TrainConfig
from rnn_longctx.train.corpus import Corpus, load_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng()
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(rng.integers(1, 128, 500).astype(np.uint8).tobytes())
    return tmp_path


def config(folder: Path, fraction: float, **more: Any) -> TrainConfig:
    passkey = PasskeyConfig(fraction=fraction, lengths=(110, 150))
    data = DataConfig(text=[str(folder)], held_out=0.1, passkey=passkey)
    return TrainConfig(model=Mamba2Config(), data=data, **{"train_length": 150, "batch_size": 8, **more})


def corpus(c: TrainConfig) -> Corpus:
    return load_corpus(c.data, ByteTokenizer(), c.train_length)


def test_a_batch_is_a_function_of_seed_and_step(folder: Path) -> None:
    c = config(folder, 0.5, seed=int(np.random.default_rng().integers(1 << 30)))
    one, two = corpus(c), corpus(c)
    for step in (7, 3):  # in any order, from any reader
        a, b = one.batch(c, step), two.batch(c, step)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.answer, b.answer)
    assert not torch.equal(one.batch(c, 3).ids, one.batch(c, 4).ids)
    other = config(folder, 0.5, seed=c.seed + 1)
    assert not torch.equal(one.batch(c, 3).ids, one.batch(other, 3).ids)


def test_rows_are_windows_of_the_text(folder: Path) -> None:
    c = config(folder, 0.0)
    data = corpus(c)
    raw = bytes(data.train.tolist())
    batch = data.batch(c, 0)
    assert batch.ids.shape == (8, 151) and batch.ids.dtype == torch.int64 and not batch.answer.any()
    starts = [raw.find(bytes(row.tolist())) for row in batch.ids]
    assert min(starts) >= 0 and len(set(starts)) > 4


def test_passkey_rows(folder: Path) -> None:
    c = config(folder, 1.0)
    data = corpus(c)
    raw = bytes(data.train.tolist())
    lengths = set()
    for step in range(5):
        batch = data.batch(c, step)
        for ids, answer in zip(batch.ids, batch.answer):
            row = bytes(ids.tolist())
            before, _, prompt = row.rpartition(b"\0")  # the text, its end, and the prompt
            assert bytes(ids[1:][answer].tolist()) == row[-7:], "the answer's tokens, as targets"
            assert row[-6:-1] in prompt[:-7] and row[-7:-6] == b" " and row[-1:] == b"."
            assert 110 <= len(prompt) <= 150 and before in raw
            lengths.add(len(prompt))
    assert len(lengths) > 10


def test_a_row_is_filled_with_prompts(folder: Path) -> None:
    c = config(folder, 1.0)
    passkey = replace(c.data.passkey, lengths=(110, 700), fill=True)
    c = replace(c, train_length=2000, batch_size=6, data=replace(c.data, passkey=passkey))
    data = corpus(c)
    raw, lengths = bytes(data.train.tolist()), []
    for step in range(12):
        batch = data.batch(c, step)
        for ids, answer in zip(batch.ids, batch.answer):
            before, *prompts = bytes(ids.tolist()).split(b"\0")[-int(answer.sum()) // 12 - 1 :]
            assert before in raw and len(before) <= 110 and len(prompts) * 12 == int(answer.sum())
            said = b"".join(prompt[-6:-1] + prompt[-7:] for prompt in prompts)  # in the key's sentence again, and asked
            assert bytes(ids[1:][answer].tolist()) == said
            assert all(prompt[-6:-1] in prompt[:-7] for prompt in prompts)
            assert min(map(len, prompts)) >= 110 and max(map(len, prompts)) <= 700
            lengths += map(len, prompts)
    # log-uniform: as many on either side of the geometric mean; a little shorter, since the last must fit
    assert 0.4 < np.mean(np.array(lengths) < np.sqrt(110 * 700)) < 0.75


def test_the_fraction_holds_on_average(folder: Path) -> None:
    c = config(folder, 0.15)
    data = corpus(c)
    counts = [int(data.batch(c, step).answer.any(1).sum()) for step in range(300)]
    assert set(counts) <= {1, 2} and abs(np.mean(counts) - 0.15 * 8) < 0.15


def test_held_out_documents_are_not_trained_on(folder: Path) -> None:
    c = config(folder, 0.0)
    data = corpus(c)
    documents = [f.read_bytes() for f in sorted(folder.iterdir())]
    held, trained = bytes(data.held_out.tolist()), bytes(data.train.tolist())
    for i, document in enumerate(documents):
        assert (document in held) != (document in trained), f"document {i} is in one of the two, whole"
    assert 0 < len(held) <= 0.2 * len(trained) and documents[-1] in held
    windows = torch.cat(list(data.validation(150, 4)))
    assert windows.shape[1] == 151 and len(windows) == len(held) // 151
    assert all(bytes(w.tolist()) in held for w in windows)
    assert len(torch.cat(list(data.validation(10, 4, most=7)))) == 7
    assert list(data.validation(5000, 4)) == []


def test_one_document_is_cut_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("漢" * 400)
    data = load_corpus(DataConfig(text=[str(tmp_path / "a.txt")], held_out=0.1), ByteTokenizer(), 10)
    assert bytes(data.held_out.tolist()) == ("漢" * 40).encode() + b"\0"
    assert data.texts == [{"name": "file:a.txt", "hash": data.texts[0]["hash"], "bytes": 1200}]


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="train_length 256 needs more"):
        load_corpus(DataConfig(text=[str(tmp_path / "a.txt")]), ByteTokenizer(), 256)
    (tmp_path / "b.txt").write_text("long " * 200)
    with pytest.raises(InputError, match=r"gives 7 tokens to train on, .* needs more; 1001 are held out"):
        load_corpus(DataConfig(text=[str(tmp_path)]), ByteTokenizer(), 256)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc \xff")
    toy = HFTokenizer(Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), "toy")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text at byte 4"):
        load_corpus(DataConfig(text=[str(tmp_path / "a.txt")]), toy, 2)
