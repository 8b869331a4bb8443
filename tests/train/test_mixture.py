"""Texts that are streamed, mixed, and made of documents: the batches of a run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import TINY

from rnn_longctx.config import from_dict
from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.train import corpus as corpus_module
from rnn_longctx.train.bptt import MicroBatch, accumulate
from rnn_longctx.train.config import DataConfig, MixedText, PassingConfig, PasskeyConfig, TrainConfig
from rnn_longctx.train.corpus import Batch, Corpus, load_corpus
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.starts import Starts

Texts = list[str | MixedText]


def documents(n: int, alphabet: str = "abcdefgh", most: int = 400) -> list[bytes]:
    rng = np.random.default_rng()
    return ["".join(rng.choice(list(alphabet), rng.integers(1, most))).encode() for _ in range(n)]


def jsonl(path: Path, parts: Sequence[bytes]) -> str:
    path.write_text("".join(json.dumps({"text": d.decode()}) + "\n" for d in parts))
    return str(path)


def config(text: Texts, fraction: float = 0.0, data: dict[str, Any] | None = None, **more: Any) -> TrainConfig:
    passkey = PasskeyConfig(fraction=fraction, lengths=(110, 150))
    made = DataConfig(text=text, passkey=passkey, **{"held_out": 0.0, **(data or {})})
    seed = random.randrange(1 << 30)
    return TrainConfig(model=Mamba2Config(), data=made, **{"train_length": 150, "batch_size": 8, "seed": seed, **more})


def corpus(c: TrainConfig) -> Corpus:
    return load_corpus(c.data, ByteTokenizer(), c.longest)


def same(a: Batch, b: Batch) -> None:
    for name in ("ids", "answer", "carried", "reset", "counted"):
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), name


PASSING = {"windows": None, "previous": PassingConfig(50, "all", "previous", 0.7)}


@pytest.mark.parametrize("mode", PASSING)
def test_a_stored_text_is_read_as_one_that_is_held(tmp_path: Path, mode: str) -> None:
    parts = documents(50)
    (tmp_path / "held.txt").write_bytes(b"\0".join(parts))
    stored = jsonl(tmp_path / "a.jsonl", parts)
    one = config([str(tmp_path / "held.txt")], 0.4, {"reset": True}, passing=PASSING[mode])
    two = replace(one, data=replace(one.data, text=[stored]))
    a, b = corpus(one), corpus(two)
    assert torch.equal(a.train, b.train) and b.mapped and not a.mapped
    for step in (5, 0, 1):
        same(a.batch(one, step), b.batch(two, step))


@pytest.mark.parametrize("mode", PASSING)
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_share_a_batch_out(tmp_path: Path, mode: str, ranks: int) -> None:
    text: Texts = [MixedText(jsonl(tmp_path / f"{i}.jsonl", documents(30)), i + 0.5) for i in range(2)]
    c = config(text, 0.3, {"reset": True, "mask_first": True}, passing=PASSING[mode])
    whole = corpus(c).batch(c, 3)
    each = 8 // ranks
    parts = [corpus(c).batch(c, 3).rows(slice(rank * each, (rank + 1) * each)) for rank in range(ranks)]
    assert {len(p.ids) for p in parts} == {each}

    def joined(name: str) -> Tensor | None:
        found = [getattr(p, name) for p in parts]
        return None if found[0] is None else torch.cat(found)

    same(whole, Batch(*(joined(n) for n in ("ids", "answer", "carried", "reset", "counted"))))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["windows", "previous"])
def test_rows_are_drawn_by_weight(tmp_path: Path, mode: str) -> None:
    """Of windows the shares hold over any stretch, to a few rows; of streams, which go on, on average."""
    weights = [5.0, 0.0, 1.0, 2.0]
    letters = ["ab", "cd", "ef", "gh"]
    sizes = [3, 40, 40, 3]  # documents: sizes do not matter
    text: Texts = [
        MixedText(jsonl(tmp_path / f"{x}.jsonl", [*documents(n, x), x.encode() * 200]), w)
        for x, n, w in zip(letters, sizes, weights)
    ]
    (tmp_path / "held.txt").write_bytes(b"\0".join([*documents(sizes[2], "ef"), b"ef" * 100]))
    text[2] = MixedText(str(tmp_path / "held.txt"), weights[2])
    c = config(text, passing=PASSING[mode])
    data = corpus(c)
    assert data.mapped == {0, 1, 3}
    raw = [bytes(tokens.tolist()) for tokens in data.sources]
    first, steps = random.randrange(1000), 200
    counts, starts = np.zeros(4), set()
    for step in range(first, first + steps):
        batch = data.batch(c, step)
        assert batch.ids.shape == (8, 151)
        for row in batch.ids[:, :]:
            line = bytes(row.tolist())
            of = [i for i in range(4) if line in raw[i] * 2]
            assert len(of) == 1, "a row is a stretch of one text"
            counts[of[0]] += 1
            starts.add((of[0], (raw[of[0]] * 2).find(line)))
    tolerance = 5 if mode == "windows" else 350  # a stream goes on for three or four steps: 5 sigma is 280
    assert (abs(counts - steps * 8 * np.array(weights) / sum(weights)) <= tolerance).all() and counts[1] == 0
    assert len(starts) > 300


@pytest.mark.parametrize("carry", [0.0, 0.8, 1.0])
def test_a_row_that_goes_on_reads_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carry: float) -> None:
    monkeypatch.setattr(corpus_module, "LEGS", 16)
    corpus_module._goes_on.cache_clear()
    text: Texts = [MixedText(jsonl(tmp_path / f"{i}.jsonl", documents(30)), 1.0) for i in range(3)]
    c = config(text, passing=PassingConfig(50, "all", "previous", carry))
    data = corpus(c)
    batches = [data.batch(c, step) for step in range(40)]
    carried = torch.stack([b.carried for b in batches])  # type: ignore[misc]
    raw, chance = [bytes(tokens.tolist()) * 2 for tokens in data.sources], 0
    for one, two in zip(batches, batches[1:]):
        assert two.carried is not None
        for a, b, on in zip(one.ids, two.ids, two.carried.tolist()):
            both = bytes(a.tolist()) + bytes(b[1:].tolist())
            assert any(both in text for text in raw) >= on, "the next stretch of the same text"
            chance += any(both in text for text in raw) and not on
    assert chance <= 3, "or elsewhere"
    legs = torch.arange(40) % 16 == 0
    assert not carried[legs].any()
    inside = carried[~legs].float().mean()
    assert inside == carry if carry in (0.0, 1.0) else abs(float(inside) - carry) < 5 * (0.16 / 296) ** 0.5


def test_batches_do_not_depend_on_who_asks_when(tmp_path: Path) -> None:
    text: Texts = [MixedText(jsonl(tmp_path / f"{i}.jsonl", documents(30)), 1.0) for i in range(2)]
    for mode in PASSING:
        c = config(text, 0.3, {"reset": True}, passing=PASSING[mode])
        one, two = corpus(c), corpus(c)
        for step in (700, 3, 511, 512, 2):
            a, b = one.batch(c, step), two.batch(c, step)
            same(a, b)
        assert not torch.equal(one.batch(c, 3).ids, one.batch(c, 4).ids)
        other = replace(c, seed=c.seed + 1)
        assert not torch.equal(one.batch(c, 3).ids, one.batch(other, 3).ids)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("carry", [0.7, 1.0])
def test_with_reset_a_document_is_read_as_if_alone(tmp_path: Path, carry: float, fraction: float) -> None:
    """States passed on from step to step: what is read of each document, and its loss, is that of one call for it."""
    text: Texts = [jsonl(tmp_path / "a.jsonl", [*documents(40, most=120), *documents(4, most=900)])]
    passing = PassingConfig(47, "all", "previous", carry)
    c = config(text, fraction, {"reset": True, "mask_first": True}, passing=passing)
    data = corpus(c)
    model: Any = Mamba2LM(replace(TINY, A_init=(1e-3, 1e-2))).double()
    starts = Starts(model, passing, c.seed)
    read: list[list[int]] = [[] for _ in range(8)]  # of the document that each row is in
    across = 0
    for step in range(5):
        batch = data.batch(c, step)
        assert batch.carried is not None
        loss, _, final = accumulate(
            Learner(model), MicroBatch.of(batch), passing, starts.begin(step, batch), 0.0, nullcontext
        )
        starts.end(step, final)
        expected = 0.0
        for r, row in enumerate(batch.ids.tolist()):
            if not batch.carried[r]:
                read[r] = []
            across += bool(read[r])
            at = 0
            while at < 150:
                stop = row.index(0, at, 150) + 1 if 0 in row[at:150] else 150
                losses = alone(model, read[r], row[at:stop], row[at + 1 : stop + 1])
                ended = row[stop - 1] == 0
                expected += float(losses[:-1].sum() if ended else losses.sum())
                read[r] = [] if ended else read[r] + row[at:stop]
                at = stop
            if batch.answer[r].any():  # the text goes on, but not from the prompt
                read[r] = []
        assert loss.item() == pytest.approx(expected / (8 * 150), rel=1e-9)
    assert across > 5


def alone(model: Any, before: list[int], ids: list[int], goal: list[int]) -> Tensor:
    with torch.no_grad():
        hidden = model(torch.tensor([before + ids]))[:, len(before) :]
        return model.losses(hidden, torch.tensor([goal]))[0]


@pytest.mark.parametrize("mode", ["windows", "previous"])
def test_marks(tmp_path: Path, mode: str) -> None:
    text: Texts = [MixedText(jsonl(tmp_path / f"{i}.jsonl", documents(30, most=90)), i + 1.0) for i in range(2)]
    c = config(text, 0.5, passing=PASSING[mode])
    data = corpus(c)
    plain = data.batch(c, 4)
    assert plain.reset is None and plain.counted is None
    both = data.batch(replace(c, data=replace(c.data, reset=True, mask_first=True)), 4)
    assert torch.equal(both.ids, plain.ids) and both.reset is not None and both.counted is not None
    for row, reset, counted, answer in zip(both.ids.tolist(), both.reset, both.counted, both.answer):
        assert [not bool(x) for x in counted] == [token == 0 for token in row[:-1]]
        assert [bool(x) for x in reset[1:]] == [token == 0 for token in row[:-2]]
        assert answer[counted.logical_not()].sum() == 0
        if mode == "windows":
            assert not reset[0]
    assert both.reset.sum() > 8


def test_losses_that_do_not_count(tmp_path: Path) -> None:
    model: Any = Mamba2LM(TINY).double()
    batch = Batch(torch.randint(0, 256, (3, 61)), torch.rand(3, 60) < 0.2)
    reset, counted = torch.rand(3, 60) < 0.1, torch.rand(3, 60) < 0.8
    losses = model.losses(model(batch.ids[:, :-1], reset=reset), batch.ids[:, 1:])
    expected = losses[counted].sum() / 180
    marked = replace(batch, reset=reset, counted=counted)
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    for segment in (None, 60, 17, 1):
        model.zero_grad()
        passing = None if segment is None else PassingConfig(segment, "all", "zero")
        start = None if passing is None else Starts(model, passing, 0).begin(0, marked)
        loss, _, _ = accumulate(Learner(model), MicroBatch.of(marked), passing, start, 0.0, nullcontext)
        torch.testing.assert_close(loss, expected.detach())
        for p, g in zip(model.parameters(), gradient, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-9 * float(g.abs().max()))


@pytest.mark.parametrize("stored", [False, True])
def test_short_documents_are_left_out(tmp_path: Path, stored: bool) -> None:
    parts = documents(60)
    (tmp_path / "a.txt").write_bytes(b"\0".join(parts))
    text: Texts = [jsonl(tmp_path / "a.jsonl", parts) if stored else str(tmp_path / "a.txt")]
    c = config(text, data={"min_document": 150, "held_out": 0.2})
    data = corpus(c)
    kept = [d for d in parts if len(d) >= 150]
    whole = bytes(data.train.tolist()) + bytes(data.held_out.tolist())
    assert whole == b"".join(d + b"\0" for d in kept) and 0 < len(kept) < 60
    assert data.train[-1] == 0 and 0.2 * len(whole) <= len(data.held_out) <= 0.2 * len(whole) + 401
    assert data.texts[0]["bytes"] == sum(map(len, kept))


def test_held_out_documents_of_a_stored_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = documents(40)
    text: Texts = [jsonl(tmp_path / "a.jsonl", parts)]
    for most in (2**24, 700):
        monkeypatch.setattr(corpus_module, "HELD_OUT", most)
        data = corpus(config(text, data={"held_out": 0.25}))
        trained, held = bytes(data.train.tolist()), bytes(data.held_out.tolist())
        assert trained + held == b"".join(d + b"\0" for d in parts) and trained.endswith(b"\0")
        wanted = min(most, int(0.25 * len(trained + held)))
        assert wanted <= len(held) <= wanted + 401
    one = corpus(config([jsonl(tmp_path / "b.jsonl", [b"x" * 1000])], data={"held_out": 0.25}))
    assert len(one.train) == 1001 - 250, "one document is cut"


def test_a_part_of_a_text(tmp_path: Path) -> None:
    parts = documents(60)
    source = jsonl(tmp_path / "a.jsonl", parts)
    data = corpus(config([MixedText(source, tokens=2000)]))
    whole = b"".join(d + b"\0" for d in parts)
    assert 2000 <= len(data) <= 2401 and whole.startswith(bytes(data.train.tolist()))


def test_texts_without_weights_are_drawn_by_size(tmp_path: Path) -> None:
    text: Texts = [jsonl(tmp_path / "a.jsonl", documents(20)), jsonl(tmp_path / "b.jsonl", documents(60))]
    data = corpus(config(text))
    assert data.shares == [len(tokens) for tokens in data.sources] and len(data.sources) == 2
    for name, path in zip("cd", ("a", "b")):
        (tmp_path / f"{name}.txt").write_bytes(bytes(data.sources["ab".index(path)].tolist()))
    held = corpus(config([str(tmp_path / "c.txt"), str(tmp_path / "d.txt")]))
    assert len(held.sources) == 1, "held ones are one array"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"text": [{"source": "a", "weight": -1}]}, r"text\[0\]\.weight: expected 0 or more, got -1"),
        ({"text": [{"source": "a", "weight": "nan"}]}, r"text\[0\]\.weight"),
        ({"text": [{"source": "a", "weight": 0}]}, "text: every weight is 0"),
        ({"text": ["b", {"source": "a", "weight": 1}]}, "text: b has no weight, but another text has"),
        ({"text": [{"source": "a", "tokens": 0}]}, r"text\[0\]\.tokens: expected a positive number"),
        ({"text": [{"weight": 1}]}, r'missing key "text\[0\]\.source"'),
        ({"text": [{"source": "a", "wieght": 1}]}, 'did you mean "weight"'),
        ({"text": []}, "text: expected at least one text"),
        ({"min_document": -1}, "min_document: expected a number of tokens, got -1"),
    ],
)
def test_config_mistakes(data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        from_dict(DataConfig, data)
    assert "\n" not in str(error.value)


def test_the_evaluation_text_is_not_trained_on() -> None:
    with pytest.raises(InputError, match="never trained on"):
        config([MixedText("stdlib", 1.0)])


def test_too_little_of_one_text(tmp_path: Path) -> None:
    long, short = jsonl(tmp_path / "a.jsonl", documents(20)), jsonl(tmp_path / "b.jsonl", [b"short"])
    with pytest.raises(InputError, match=r"b\.jsonl gives 6 tokens to train on, and train_length 150 needs more"):
        corpus(config([MixedText(long, 1.0), MixedText(short, 1.0)]))
    assert len(corpus(config([MixedText(long, 1.0), MixedText(short, 0.0)]))) > 150, "not drawn from"


def test_boundaries_without_an_end_of_document(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    toy = HFTokenizer(Fast(models.WordLevel({"?": 0}, unk_token="?")), "toy")
    for option in ("reset", "mask_first"):
        c = config([jsonl(tmp_path / "a.jsonl", documents(5))], data={option: True})
        with pytest.raises(InputError, match=rf"data\.{option}: tokenizer toy .* has no end-of-document token"):
            load_corpus(c.data, toy, 10)
