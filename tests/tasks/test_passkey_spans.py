"""Of every task's prompts with tokenizers of every kind: exact lengths, and the tokens that hold the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from made_prompts import multikey_batch, training_sequence, words_batch
from made_tokenizers import NAMES, as_read, byte_level, lines, made_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rnn_longctx.data import ByteTokenizer, HFTokenizer, Text
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.multikey import LABELLED, LABELS
from rnn_longctx.tasks.passkey import HEADERLESS, PAPER, passkey_batch
from rnn_longctx.tasks.prompts import FILLER, Prompt, Style
from rnn_longctx.tasks.words import WORDED

N, LENGTH = 6, 420
HAY = Text("hay", " ".join(lines()).encode() * 3)
ODD = Style("Look!\n", "<{0} {x} {0}>", "Which {x}? ")  # no space before an answer, one after the question
SEVERAL = Style("", "\n{1}: ({0})\n", "\n{1}: (")
TASKS: dict[str, tuple[Style, Callable[..., list[Prompt]]]] = {
    "paper": (PAPER, lambda t, seed: passkey_batch(t, LENGTH, N, seed, "paper")),
    "headerless": (HEADERLESS, lambda t, seed: passkey_batch(t, LENGTH, N, seed)),
    "template": (ODD, lambda t, seed: passkey_batch(t, LENGTH, N, seed, ODD)),
    "haystack": (HEADERLESS, lambda t, seed: passkey_batch(t, LENGTH, N, seed, haystack=HAY)),
    "multikey": (
        Style("", LABELLED.key, LABELLED.question), lambda t, seed: multikey_batch(t, LENGTH, N, seed)),
    "multikey template": (SEVERAL, lambda t, seed: multikey_batch(t, LENGTH, N, seed, 3, SEVERAL)),
    "words": (Style("", WORDED.key, WORDED.question), lambda t, seed: words_batch(t, LENGTH, N, seed)),
    "words in a haystack": (ODD, lambda t, seed: words_batch(t, LENGTH, N, seed, ODD, HAY)),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", NAMES)
def test_prompts(kind: str, task: str, seed: int) -> None:
    tokenizer, (style, make) = made_tokenizer(kind), TASKS[task]
    read = lambda ids: as_read(kind, tokenizer.decode(ids))  # noqa: E731
    prompts = make(tokenizer, seed)
    assert [p.answer for p in prompts] == [p.answer for p in make(ByteTokenizer(), seed)]
    for prompt in prompts:
        assert len(prompt.ids) == LENGTH and prompt.ids.dtype == prompt.reply.dtype == np.int64
        text, label = read(prompt.ids).lstrip(), ""
        if task.startswith("multikey"):
            bound = style.key.strip().replace("{0}", prompt.answer).partition("\n")[0]
            (label,) = (w for w in LABELS if as_read(kind, bound.replace("{1}", w)) in text)
        sentence, question = (
            as_read(kind, piece.replace("{0}", prompt.answer).replace("{1}", label))
            for piece in (style.key, style.question)
        )
        # the question ends the prompt, and begins where it says
        assert text.endswith(question) and read(prompt.ids[prompt.question :]).lstrip() == question.lstrip()
        # the answer is where it says, and nowhere else in its sentence
        assert len(prompt.spans) == style.key.count("{0}")
        for start, stop in prompt.spans:
            assert tokenizer.decode(prompt.ids[start:stop]).strip() == prompt.answer
            assert not any(tokenizer.decode(prompt.ids[i : i + 1]).isspace() for i in range(start, stop))
        before = read(prompt.ids[: prompt.position])
        stop = next(n for n in range(prompt.position, LENGTH) if before + sentence.rstrip() in read(prompt.ids[:n]))
        assert prompt.position <= prompt.spans[0][0] and prompt.spans[-1][1] <= stop
        # the reply is the answer, and prompt and reply are the text
        assert tokenizer.decode(prompt.reply).strip() == prompt.answer
        space = "" if style.question.endswith(" ") else " "
        assert read(np.concatenate([prompt.ids, prompt.reply])).endswith(
            question + as_read(kind, space + prompt.answer)
        )
        assert text.startswith(as_read(kind, style.header)[:3])
        if task in ("paper", "headerless", "template"):
            before, after = text.split(sentence)
            after = after.removesuffix(question)
            for filler in (before.removeprefix(as_read(kind, style.header)), after):
                assert as_read(kind, FILLER * 20).endswith(filler.lstrip()), "only its left end may be cut"


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_trained_on(kind: str) -> None:
    tokenizer, rng = made_tokenizer(kind), np.random.default_rng()
    for _ in range(20):
        length, style = int(rng.integers(300, 700)), str(rng.choice(["paper", "headerless"]))
        ids, mask = training_sequence(tokenizer, length, rng, style, said_again=True)
        assert len(ids) == len(mask) == length
        again, answer = np.split(np.flatnonzero(mask), np.flatnonzero(np.diff(np.flatnonzero(mask)) > 1) + 1)
        key = tokenizer.decode(ids[again]).strip()
        assert key.isdigit() and len(key) == 5
        assert tokenizer.decode(ids[answer]).strip() == f"{key}." and answer[-1] == length - 1
        assert not any(tokenizer.decode(ids[i : i + 1]).isspace() for i in again)
        before = tokenizer.decode(ids[: again[-1] + 1])
        assert before.lower().replace(" ", "").endswith(f"rememberit.{key}"), "the second time that it is said"
        # what is asked at evaluation is what was trained on: the question of a prompt, and the same reply
        (prompt,) = passkey_batch(tokenizer, length, 1, 0, style)
        question = prompt.ids[prompt.question :]
        assert (ids[answer[0] - len(question) : answer[0]] == question).all()
        reply = encode_after(tokenizer, PAPER.question, f" {key}")[0]
        assert (ids[answer[: len(reply)]] == reply).all()


def test_the_key_of_the_issue() -> None:
    """'556 is' was marked for the key 86556: in 50 of 50 prompts the mark was wrong."""
    tokenizer, rng = HFTokenizer(byte_level(), "gpt-2"), np.random.default_rng()
    for _ in range(50):
        ids, mask = training_sequence(tokenizer, 200, rng, said_again=True)
        key = tokenizer.decode(ids).split()[-1].rstrip(".")
        assert tokenizer.decode(ids[mask]) == f" {key} {key}."


def test_a_tokenizer_that_cannot_say_the_answer_is_refused() -> None:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    made.train_from_iterator(["The passkey is said again. Remember it."], trainer)
    silent = byte_level()
    silent.decoder = decoders.WordPiece()  # which says its tokens, not its text
    for tokenizer, reads in ((made, "[UNK]"), (silent, "Ġ")):
        for make in (passkey_batch, multikey_batch):
            with pytest.raises(InputError, match=r"cannot say the answer: \d{5} reads back as") as error:
                make(HFTokenizer(tokenizer, "t"), 300, 2, 0)
            assert reads in str(error.value)
        with pytest.raises(InputError, match="cannot say the answer"):
            training_sequence(HFTokenizer(tokenizer, "t"), 300, np.random.default_rng())


def _hash(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(p.ids.tobytes())
        digest.update(f"{p.answer} {p.depth} {p.position}".encode())
    return digest.hexdigest()[:16]


def _training(style: str, said_again: bool) -> str:
    digest, rng = hashlib.sha256(), np.random.default_rng(5)
    for n in range(300, 3000, 97):
        ids, mask = training_sequence(ByteTokenizer(), n, rng, style, said_again)
        digest.update(ids.tobytes())
        digest.update(mask.tobytes())
    return digest.hexdigest()[:16]


def test_prompts_of_bytes_are_what_they_were() -> None:
    """The demo was trained on them and all published figures are made with them: hashes of the code before pieces."""
    t, lengths = ByteTokenizer(), (300, 1023, 1024, 5000)
    hay = Text("hay", bytes(np.random.default_rng(7).integers(97, 123, 9000, dtype=np.uint8)))
    one, several = Style("Look! ", "<{0} {x} {0}>", "Which {x}? "), Style("", "<{1}: {0}>", "{1}?")
    assert _hash(p for n in lengths for p in passkey_batch(t, n, 12, 3)) == "c9d29ceb96abba74"
    assert _hash(passkey_batch(t, 600, 12, 3, "paper")) == "5273de0fcae9e740"
    assert _hash(p for n in lengths for p in passkey_batch(t, n, 12, 3, one)) == "0807b589318cdd8d"
    assert _hash(p for n in lengths for p in passkey_batch(t, n, 12, 3, haystack=hay)) == "4d66d901a2109eac"
    assert _hash(p for n in lengths for p in multikey_batch(t, n + 400, 12, 3, 5)) == "0e2b9f4e9e06bf26"
    made = (p for n in lengths for p in multikey_batch(t, n, 12, 3, 3, several, hay))
    assert _hash(made) == "78f43fa8332440ba"
    assert _hash(p for n in lengths for p in words_batch(t, n, 12, 3)) == "9bca7a0900c47067"
    assert _training("headerless", False) == "9d372ea0ba925053"
    assert _training("headerless", True) == "8943dbe7f71ab2b6"
    assert _training("paper", True) == "2a9367db41b91d1e"
