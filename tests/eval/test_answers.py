"""How an answer is judged, with tokenizers of every kind: the right one is right however it is cut, any other wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluated import make_model
from made_tokenizers import KINDS, NAMES, as_read, made_tokenizer

from rnn_longctx import evaluate
from rnn_longctx.data import HFTokenizer
from rnn_longctx.data.pieces import encode_after
from rnn_longctx.errors import InputError
from rnn_longctx.eval import Measuring, parse_task
from rnn_longctx.eval.jobs import recall
from rnn_longctx.probes.held import key_digits
from rnn_longctx.probes.probe import prompt_ids
from rnn_longctx.tasks.passkey import Passkey

TASKS = ("passkey:n=4", "multikey:n=4", "words:n=4")


def measuring(tokenizer):
    model = SimpleNamespace(tokenizer=tokenizer, restart=None, vocab_size=999)
    return SimpleNamespace(model=model, seed=0, segment=99, progress=lambda n: None)


def prompts_of(task, tokenizer):
    return [task.prompt(420, i, 4, task.generator(0, 420, i), tokenizer) for i in range(4)]


def judge(monkeypatch, task, prompts, replies, tokenizer):
    """What each prompt scores if a model says these tokens, over and over."""
    said = torch.from_numpy(np.stack([np.resize(ids, 30) for ids in replies]))
    monkeypatch.setattr(recall, "prefill", lambda model, ids, segment: (torch.zeros(len(ids), 2), None))
    monkeypatch.setattr(recall, "continuation", lambda *_: iter(said.T))
    examples = [prompt.example() for prompt in prompts]
    replies, _ = recall.generated(measuring(tokenizer), task, examples)
    return [task.right(reply, example, tokenizer) for reply, example in zip(replies, examples)]


@pytest.mark.parametrize("spec", TASKS)
@pytest.mark.parametrize("kind", NAMES)
def test_right_and_wrong_answers(kind, spec, monkeypatch):
    tokenizer, task = made_tokenizer(kind), parse_task(spec).task
    prompts = prompts_of(task, tokenizer)
    joined = "s" if spec.startswith("words") else "7"
    after = lambda text: encode_after(tokenizer, "x", text)[0]  # noqa: E731  (as it stands inside a word)
    score = lambda *ends: judge(  # noqa: E731
        monkeypatch, task, prompts, [np.concatenate([p.reply, *map(after, ends)]) for p in prompts], tokenizer
    )
    assert score(".") == score(" and more.") == score(" 12") == [True] * 4
    assert score(joined, ".") == [False] * 4, "a sixth digit, or another word, must be seen"
    others = [p.reply for p in prompts[1:] + prompts[:1]]
    assert judge(monkeypatch, task, prompts, [np.append(ids, after(".")) for ids in others], tokenizer) == [
        p.answer == q.answer for p, q in zip(prompts, prompts[1:] + prompts[:1])
    ]
    spelled = [[after(" " + p.answer[0]), *map(after, p.answer[1:]), after(".")] for p in prompts]
    assert judge(monkeypatch, task, prompts, list(map(np.concatenate, spelled)), tokenizer) == [True] * 4
    short = [[after(" " + p.answer[0]), *map(after, p.answer[1:-1]), after(".")] for p in prompts]
    assert judge(monkeypatch, task, prompts, list(map(np.concatenate, short)), tokenizer) == [False] * 4


@pytest.mark.parametrize("kind", NAMES)
def test_where_a_probe_finds_the_key(kind):
    tokenizer = made_tokenizer(kind)
    for prompt in prompts_of(Passkey(), tokenizer):
        places = key_digits(tokenizer, prompt)
        first, second = (places[: len(places) // 2], places[len(places) // 2 :])
        for span in (first, second):
            assert tokenizer.decode(prompt.ids[span]).strip() == prompt.answer
            assert span == list(range(span[0], span[-1] + 1))
        question = tokenizer.decode(prompt.ids[prompt.question :]).strip().lower()
        assert question == "what is the passkey? the passkey is"


@pytest.mark.parametrize("kind", NAMES)
def test_a_prompt_of_newlines(kind):
    tokenizer, model = made_tokenizer(kind), SimpleNamespace(tokenizer=made_tokenizer(kind))
    if as_read(kind, "\n"):
        ids = prompt_ids(model, None, 50, "newline", 2, 0)
        assert ids.shape == (2, 51) and set(tokenizer.decode(ids[0])) == {"\n"} and len(set(ids[0, 1:].tolist())) == 1
    else:
        with pytest.raises(InputError, match="cannot say a newline"):
            prompt_ids(model, None, 50, "newline", 2, 0)


def test_a_tokenizer_that_cannot_say_the_answer_is_refused_before_anything_is_read(monkeypatch):
    model, made = make_model(), KINDS["word-piece"]()
    made.normalizer, made.pre_tokenizer = None, None  # a sentence is one word, and that is not known
    model.tokenizer = HFTokenizer(made, "silent")
    monkeypatch.setattr(type(model), "stream", None)
    with pytest.raises(InputError, match=r"tokenizer silent \w+ cannot say the answer"):
        evaluate(model, [300], ["passkey:n=1"])


def test_answers_of_more_tokens_are_seen_before_a_run():
    """The shortest length must hold every prompt: not the first alone, whose answer may take fewer tokens."""
    tokenizer, task = made_tokenizer("byte-level"), parse_task("passkey:n=60")
    model = SimpleNamespace(tokenizer=tokenizer, restart=None, vocab_size=999)
    for length in range(60, 160):
        about = Measuring(model, seed=0)
        try:
            task.check(about, [length])
        except InputError as error:
            assert "takes at least" in str(error)
        else:
            task.examples(about, length, 60)
            break
    assert length < 159


@pytest.mark.parametrize("kind", NAMES)
def test_passkeys_of_lm_eval(kind, tmp_path):
    """Text in the place of tokens: the answer is in it, and its question ends it; read again it is about as long."""
    pytest.importorskip("lm_eval")
    from rnn_longctx.eval.harness.lm_eval_tasks import utils
    from rnn_longctx.eval.harness.run import save_tokenizer

    tokenizer = made_tokenizer(kind)
    save_tokenizer(tokenizer, tmp_path)
    for doc in utils.passkey(tokenizer=str(tmp_path), max_seq_lengths=[420], limit=4, seed=1)["test"]:
        assert doc["input"].count(doc["answer"]) == 2
        assert as_read(kind, doc["input"]).endswith(as_read(kind, "What is the passkey? The passkey is"))
        ids = tokenizer.encode(doc["input"])
        # only where words are no borders of tokens do joins of a prompt go far
        assert abs(len(ids) - 420) <= (60 if kind.endswith("whole") else 6)
        whole = tokenizer.encode(f"{doc['input']} {doc['answer']}.")
        said = tokenizer.decode(whole[len(ids) :])
        if (whole[: len(ids)] == ids).all():  # no token holds the end of the question and the answer
            assert utils.passkey_results(doc, [said]) == {"exact_match": 1.0}
