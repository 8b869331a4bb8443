"""A person's own questions, from a file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluated import make_model, value

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval import evaluate
from rnn_longctx.eval.jobs.parsing import parse_task
from rnn_longctx.tasks.base import TooShort
from rnn_longctx.tasks.prompts import FILLER
from rnn_longctx.tasks.qa import QuestionAnswering

BYTES = ByteTokenizer()
THREE = [
    {"document": "one.txt", "question": "Who?", "answer": "Ann"},
    {"document": "folder/two.txt", "question": "When?", "answer": "in  May", "answers": ["May"]},
    {"document": "The text itself.", "question": "What?", "answers": ["itself"]},
]


def written(tmp_path, records=THREE) -> str:
    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "one.txt").write_text("Long ago " * 50 + "there was Ann.")
    (tmp_path / "folder/two.txt").write_bytes("It was in May\ufeff.".encode("utf-16"))
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(tmp_path / "q.jsonl")


def asked(task, length, i, seed):
    example = task.example(length, i, 3, task.generator(seed, length, i), BYTES)
    text = BYTES.decode(example.prompt.tolist())
    assert len(example.prompt) == length
    return example, task.questions.asked[int(example.about["question"])], text


def test_a_document_fills_the_context_and_its_front_is_cut(tmp_path, seed):
    task = QuestionAnswering(written(tmp_path))
    seen = []
    for i in range(3):
        example, question, text = asked(task, 100, i, seed)
        ending = f"\n\nQuestion: {question.question}\nAnswer:"
        assert text.endswith(ending) and BYTES.decode(example.ids[100:]) == f" {question.answers[0]}"
        body = text.removesuffix(ending)
        tail = question.document[-len(body) :]
        assert body.endswith(tail) and (len(tail) == len(body) or body.removesuffix(tail).endswith("\n\n"))
        seen.append(question.question)
        for other in ("Ann.", "May", "itself"):  # short documents stand behind others
            assert (other in asked(task, 1000, i, seed)[2]) or other == "Ann."
    assert sorted(seen) == ["What?", "When?", "Who?"]  # each once before one is asked again
    with pytest.raises(TooShort, match="a question and a token before it takes at least"):
        task.example(5, 0, 1, task.generator(seed, 5, 0), BYTES)
    with pytest.raises(TooShort):
        task.check(20, 3, seed, BYTES)


def test_the_control_asks_the_same_without_the_document(tmp_path, seed):
    file = written(tmp_path)
    task, control = QuestionAnswering(file), QuestionAnswering(file, document=False)
    for i in range(6):
        example, question, text = asked(task, 300, i, seed)
        other, same, without = asked(control, 300, i, seed)
        assert question == same and (example.ids[300:] == other.ids[300:]).all()
        ending = f"\n\nQuestion: {question.question}\nAnswer:"
        assert without.removesuffix(ending) in FILLER * 10 and text != without
    assert control.label == "qa-q-without-document" and task.label == "qa-q" and control.text == task.text


@pytest.mark.parametrize(
    ("said", "score"),
    [(" Ann", 1), (" ann. And", 1), ("\n ANN\nQ", 1), (" Anna", 0), (" It was Ann", 0), ("", 0), (" An", 0)],
)
def test_an_answer_is_right_where_it_ends_with_a_word(tmp_path, seed, said, score):
    task = QuestionAnswering(written(tmp_path, THREE[:1]))
    example, _, _ = asked(task, 60, 0, seed)
    assert task.right(BYTES.encode(said), example, BYTES) == score


@pytest.mark.parametrize(
    ("said", "score"), [(" 12", 1), (" 12.", 1), (" 12, and", 1), (" 12,000", 0), (" 12.5", 0), (" 12-14", 0)]
)
def test_a_number_is_right_where_it_ends(tmp_path, seed, said, score):
    task = QuestionAnswering(
        written(tmp_path, [{"document": "Twelve of them.", "question": "How many?", "answer": "12"}])
    )
    example, _, _ = asked(task, 60, 0, seed)
    assert task.right(BYTES.encode(said), example, BYTES) == score


def test_a_document_may_be_one_word_of_any_script(tmp_path):
    for document in ("東京は日本の首都です。", "a" * 300, "word"):
        task = QuestionAnswering(written(tmp_path, [{"document": document, "question": "?", "answer": "a"}]))
        assert task.questions.asked[0].document == document


def test_any_of_the_answers_is_right(tmp_path, seed):
    task = QuestionAnswering(written(tmp_path, THREE[1:2]))
    example, question, _ = asked(task, 60, 0, seed)
    assert question.answers == ("in  May", "May") and question.document.startswith("It was in May")
    assert [task.right(BYTES.encode(text), example, BYTES) for text in (" May", " in may", " June")] == [1, 1, 0]


SECRET = "secret contents"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"document": "' + SECRET, r"q\.jsonl:2: not JSON \(Unterminated string"),
        (f'["{SECRET}"]', r":2: expected an object with document, question, answer, got list"),
        ({"question": SECRET, "answer": SECRET}, ":2: document is a text that is not empty, got none"),
        ({"document": SECRET, "question": 3, "answer": SECRET}, ":2: question is a text that is not empty, got int"),
        ({"document": SECRET, "question": SECRET}, ":2: answer is a text that is not empty, got none"),
        ({"document": SECRET, "question": SECRET, "answer": " \0"}, ":2: answer is a text that is not empty"),
        ({"document": SECRET, "question": SECRET, "answers": "yes"}, ":2: answers is a list of texts"),
        ({"document": SECRET, "question": SECRET, "answers": [""]}, ":2: answers holds no text"),
        ({"document": "gone.txt", "question": SECRET, "answer": "a"}, r":2: there is no document gone\.txt"),
        ({"document": "picture", "question": SECRET, "answer": "a"}, ":2: .*picture"),
        ({"document": "empty", "question": SECRET, "answer": "a"}, ":2: the document empty is empty"),
        ("[" * 100_000, ":2: not a question: it is nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_nothing_of_it_is_shown(tmp_path, line, message):
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(InputError, match=message) as error:
        QuestionAnswering(written(tmp_path, [THREE[0], line]))
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_no_questions_and_no_file(tmp_path):
    with pytest.raises(InputError, match="holds no questions"):
        QuestionAnswering(written(tmp_path, []))
    with pytest.raises(InputError, match=r"qa: cannot read .*: No such file"):
        QuestionAnswering(str(tmp_path / "none.jsonl"))


def test_hostile_text_is_read_as_text(tmp_path, seed):
    """Half surrogates, NUL, placeholders of the wording, and a name like a path that leads nowhere."""
    hostile = {"document": "a \ud800 b\0 {0} c", "question": "{0} \ud800?", "answer": "{0}"}
    task = QuestionAnswering(written(tmp_path, [hostile, {**hostile, "document": "../" * 500 + "x y"}]))
    for i in range(2):
        _, question, text = asked(task, 80, i, seed)
        assert "\0" not in text and "Question: {0} ??" in text and question.answers == ("{0}",)


def test_the_loss_of_the_answer_is_measured_beside_its_score(tmp_path, seed):
    """It is that of one pass over prompt and answer, under remedies that read otherwise too."""
    model, file = make_model(seed), written(tmp_path)
    job = parse_task(f"qa:file={file},n=3")
    frame = evaluate(model, [100], [job], ["none", "reset:every=64"], seed=seed)
    losses = []
    for i in range(3):
        ids = torch.from_numpy(job.task.example(100, i, 3, job.task.generator(seed, 100, i), BYTES).ids)[None]
        with torch.inference_mode():
            losses.append(model.losses(model(ids[:, :-1]), ids[:, 1:])[0, 99:].mean().item())
    row = value(frame, 100, "answer_nats_per_token")
    assert np.allclose(row.samples, losses, rtol=1e-4) and row.n == 3
    assert value(frame, 100, "answer_nats_per_token", "reset:every=64").value != pytest.approx(row.value)
    assert value(frame, 100, "accuracy").n == 3
