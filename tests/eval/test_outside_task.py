"""A task that is registered from outside is evaluated as any other, by its answers."""

from dataclasses import dataclass

import pytest
import torch
from echo_task import Echo

from rnn_longctx import evaluate
from rnn_longctx.errors import InputError
from rnn_longctx.eval import Measuring, parse_task
from rnn_longctx.eval.jobs.recall import Recall, likeliest
from rnn_longctx.eval.tables.sheets import sheets
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.tasks import TASKS
from rnn_longctx.testing.tasks import check_task


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setattr(TASKS, "_known", dict(TASKS._known))
    return TASKS.register(Echo)


def test_a_task_from_outside_is_evaluated(echo, model, text, tmp_path, seed):
    """It is parsed, measured by its answers under remedies, stored, taken up again, and stands in the tables."""
    check_task(Echo(), model.tokenizer, seed)
    tasks, remedies = ["echo:n=20,copied=2", "lm:slices=2,tokens=0"], ["none", "reset:every=16"]
    settings = {"text": text, "out": str(tmp_path), "batch": 8, "seed": seed % 1000}
    frame = evaluate(model, [24, 100], tasks, remedies, **settings)
    rows = frame[(frame.task == "echo") & (frame.length == 24) & (frame.mitigation == "none")]
    assert set(frame.task) == {"echo", "lm"} and len(rows) == 1 and rows.n.iloc[0] == 20
    assert [sheet.kind for sheet in sheets(frame)] == ["loss", "accuracy"]
    again = evaluate(model, [24, 100], tasks, remedies, **settings)
    assert again.value.tolist() == frame.value.tolist()
    job = parse_task("echo:n=20,copied=2,max=64")
    assert (job.label, job.counts.n, job.task, job.lengths([24, 100], None)) == ("echo", 20, Echo(copied=2), [24])
    with pytest.raises(InputError, match='did you mean "copied"'):
        parse_task("echo:copid=3")
    with pytest.raises(InputError, match="takes at least 6 tokens; 4 were asked for"):
        evaluate(model, [4], "echo")


def test_answers_are_the_likeliest_tokens_after_true_ones(model, seed):
    """Whatever the batch and the segment, as the logits of one pass have it."""
    task = Echo(copied=5)
    for segment in (7, 4096):
        measuring = Measuring(model, seed=seed % 1000, segment=segment)
        examples = Recall(task).examples(measuring, 50, 4)
        replies, _ = likeliest(measuring, task, examples)
        for example, reply in zip(examples, replies):
            with torch.no_grad():
                logits = model.logits(model(torch.from_numpy(example.ids)[None, :-1]))[0]
            assert reply.tolist() == logits.argmax(-1)[example.answers[1:]].tolist()


def test_a_vocabulary_that_is_too_small_is_refused(model):
    with pytest.raises(InputError, match=f"mqar has 512 ids, more than the vocabulary of {model.name}, 256"):
        evaluate(model, [64], "mqar")
    large = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8, vocab_size=512)).eval()
    large.tokenizer = model.tokenizer
    frame = evaluate(large, [64], "mqar:n=4")
    assert set(frame.task) == {"mqar8"} and 0 <= frame.value.iloc[0] <= 1


def test_a_parameter_that_says_how_many_is_refused(echo):
    @dataclass(frozen=True)
    class Clash(Echo):
        name = "clash"
        tokens: int = 5

    TASKS.register(Clash)
    with pytest.raises(InputError, match="clash: tokens says how many examples are asked"):
        parse_task("clash")
