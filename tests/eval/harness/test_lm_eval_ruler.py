"""RULER through lm-eval: prompts as long as they say, the same for everybody, with the right answers in them."""

import json
import random
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytest.importorskip("nltk")

import lm_eval
import nltk
import wonderwords
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness.model import HarnessLM
from rnn_longctx.eval.harness.ruler import TooShort, maker
from rnn_longctx.eval.harness.run import HarnessConfig, lm_eval_table
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

OFFLINE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_cwe", "ruler_fwe", "ruler_vt"]
RULER = str(Path(lm_eval.__file__).parent / "tasks" / "ruler")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """lm-eval's files join six million pairs of words when they are imported, and fetch the ends of sentences."""
    few = wonderwords.RandomWord()
    few._categories = {kind: words[:400] for kind, words in few._categories.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", lambda: few)
        patch.setattr(nltk, "download", lambda *_, **__: False)
        yield


@pytest.fixture
def silent(monkeypatch):
    """Models that are asked, and say nothing."""
    monkeypatch.setattr(HarnessLM, "_continue", lambda self, prompts, *_: [""] * len(prompts))


def words():
    """A byte-level BPE of some English words, with BOS."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = [
        *(str(n) for n in range(1000)),
        "The grass is green. The sky is blue. Here we go. There and back again.",
    ] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=made.pre_tokenizer.alphabet()
    )
    made.train_from_iterator(text, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>"))


def tiny(tokenizer):
    torch.manual_seed(0)
    made = Mamba2LM(Mamba2Config(d_model=16, n_layer=1, headdim=16, d_state=4, vocab_size=tokenizer.vocab_size)).eval()
    made.tokenizer, made.name, made.train_length = tokenizer, "tiny", 64
    return made


@pytest.fixture(scope="module", params=[ByteTokenizer, words])
def model(request):
    return tiny(request.param())


def docs(task, length, count=len, limit=3, seed=0):
    return list(maker(task, length, count, limit, seed)()["test"])


@pytest.mark.parametrize("length", [1500, 4096, 5120])
@pytest.mark.parametrize("task", OFFLINE)
def test_what_is_read_is_as_long_as_it_says(model, task, length):
    """ruler_cwe ended in a ZeroDivisionError at 5120 bytes, niah_single_1 at 4096 read 2,610 of them."""
    lm = HarnessLM(model)
    for doc in docs(task, length, lambda text: len(lm.tok_encode(text))):
        delimiter = "\n\n" if task == "ruler_cwe" else " "  # as in lm-eval's task files
        assert doc["length"] == len(lm.tok_encode(doc["input"] + delimiter + doc["gen_prefix"]))
        assert 0.93 * length <= doc["length"] <= length
        assert doc["max_length"] == length


def test_rows_have_the_tokens_that_were_read(model, silent, tmp_path):
    lm, seen = HarnessLM(model), []
    generate = HarnessLM.generate_until

    def spy(self, requests, **_):
        seen.extend((r.task_name, len(lm.tok_encode(r.args[0]))) for r in requests)
        return generate(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HarnessLM, "generate_until", spy)
        frame = lm_eval_table(
            model, HarnessConfig(OFFLINE[2:4], "1500,2000", limit=2, include_path=RULER, out=str(tmp_path), seed=3)
        )
    assert len(frame) == 4 and set(frame["seed"]) == {3}
    for row in frame.itertuples():
        read = [n for task, n in seen if task == row.task and n <= row.length and n > row.length - 500]
        assert (row.tokens_read, row.tokens_read_min, row.tokens_read_max) == (np.mean(read), min(read), max(read))
    (run, _) = json.loads((tmp_path / "lm_eval.json").read_text())
    assert run["seed"] == 3 and run["begin"] == lm.text.begin and set(run["tokens_read"]) == set(OFFLINE[2:4])


@pytest.mark.parametrize("task", OFFLINE)
def test_the_same_prompts_whoever_asks_and_others_for_another_seed(task):
    before = docs(task, 2000)
    random.seed(1)
    np.random.seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist()
    assert docs(task, 2000, limit=5)[:3] == before
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    other = docs(task, 2000, seed=1)
    assert len({doc["input"] for doc in before + other}) == 6


def test_a_command_given_twice_asks_the_same(silent, tmp_path):
    asked = []
    for out in ("a", "b"):
        random.seed(out)
        lm_eval_table(
            tiny(ByteTokenizer()),
            HarnessConfig(OFFLINE[2:4], "1500", limit=1, include_path=RULER, out=str(tmp_path / out)),
        )
        (run,) = json.loads((tmp_path / out / "lm_eval.json").read_text())
        asked.append({task: [s["prompt_hash"] for s in samples] for task, samples in run["samples"].items()})
    assert asked[0] == asked[1] and set(asked[0]) == set(OFFLINE[2:4])


def test_answers_are_right():
    for doc in docs("ruler_cwe", 6000) + docs("ruler_cwe", 2000):
        counts = Counter(re.findall(r"\d+\. (\S+)", doc["input"]))
        assert {word for word, _ in counts.most_common(10)} == set(doc["outputs"])
        assert len(set(counts.values())) == 2
    for length in (900, 4096):
        for doc in docs("ruler_fwe", length):
            coded = doc["input"].split("coded words. ")[1].split("\nQuestion")[0].split()
            first = Counter(word for word in coded if word != "...").most_common(4)
            assert [word for word, _ in first[:3]] == doc["outputs"] and first[2][1] > first[3][1]
    for doc in docs("ruler_vt", 2000):
        number = re.findall(r"assigned the value (\d+)", doc["input"])[-1]
        known, before = {number}, -1
        while len(known) != before:
            before = len(known)
            pairs = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", doc["input"])
            known |= {name for name, value in pairs if value in known}
        assert known - {number} == set(doc["outputs"])
    for task in ("niah_single_1", "niah_multikey_2", "niah_multikey_3"):
        for doc in docs(task, 2000):
            key = re.search(r"for (\S+) mentioned in the provided text\?", doc["input"])[1]
            values = re.findall(rf"for {re.escape(key)} is: (\S+)\.", doc["input"])
            assert values == doc["outputs"] and f"for {key} mentioned" in doc["gen_prefix"]


def test_only_what_is_asked_is_made(monkeypatch):
    prepare_niah = import_module("lm_eval.tasks.ruler.prepare_niah")
    made = []
    generate = prepare_niah.generate_input_output
    monkeypatch.setattr(prepare_niah, "generate_input_output", lambda *a, **k: made.append(1) or generate(*a, **k))
    assert len(docs("niah_multikey_2", 4096, limit=2)) == 2 and len(made) < 40
    assert len(docs("niah_multikey_2", 600, limit=None)) == 500


def test_what_does_not_fit_is_named_and_the_others_run(silent, caplog):
    model = tiny(ByteTokenizer())
    given = {"limit": 1, "include_path": RULER}
    frame = lm_eval_table(model, HarnessConfig(["niah_multikey_2", "ruler_cwe"], "600,1500", **given))
    assert set(zip(frame["task"], frame["length"])) == {
        ("niah_multikey_2", 600), ("niah_multikey_2", 1500), ("ruler_cwe", 1500),
    }  # fmt: skip
    assert re.search(r"ruler_cwe takes at least \d+ tokens of this tokenizer; 600 were asked for", caplog.text)
    with pytest.raises(InputError, match=r"ruler_cwe takes at least \d+ tokens"):
        lm_eval_table(model, HarnessConfig(["ruler_cwe"], "300,600", **given))


def test_a_length_that_a_task_cannot_fill_is_said(silent, caplog, monkeypatch):
    """The words of ruler_cwe are of a list that ends."""
    given = {"limit": 1, "include_path": RULER}
    frame = lm_eval_table(tiny(ByteTokenizer()), HarnessConfig(["ruler_cwe"], "64k", **given))
    (read,) = frame["tokens_read"]
    assert read < 60_000
    assert f"ruler_cwe at 64K reads {read:.0f} tokens: its scores are of that length" in caplog.text


def test_questions_keep_their_documents(monkeypatch):
    """lm-eval shuffles the list that its questions point into once a prompt takes all of it."""
    qa_utils = import_module("lm_eval.tasks.ruler.qa_utils")
    texts = [f"Fact {i}: the colour of thing {i} is c{i}." for i in range(30)]
    questions = [{"query": f"thing {i}?", "outputs": [f"c{i}"], "context": [i]} for i in range(30)]
    monkeypatch.setattr(qa_utils, "read_squad", lambda: (questions, texts))
    for length in (500, 1000, 100_000):
        made = docs("ruler_qa_squad", length, limit=10)
        assert len(made) == 10 and all(texts[i] in doc["input"] for i, doc in enumerate(made))
        assert all(doc["length"] <= length for doc in made)
    assert texts[3].startswith("Fact 3:")
    with pytest.raises(TooShort, match="ruler_qa_squad takes at least"):
        docs("ruler_qa_squad", 100)
