"""This library's models under lm-eval: the figures of its own HFLM, requests of any shape, and the command."""

import csv
import json
import re
import sys

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, MambaConfig

from rnn_longctx import cli, load
from rnn_longctx.data import ByteTokenizer, HFTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness.lm_eval_tasks import utils
from rnn_longctx.eval.harness.model import HarnessLM
from rnn_longctx.eval.harness.run import COLUMNS, TASKS, HarnessConfig, lm_eval_table, save_tokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.tasks.passkey import passkey_batch

DOCS = [
    {"text": "The grass is green and the", "choices": [" sky is blue", " sun", " grass"], "answer": 0},
    {"text": "Here we go. There and back again, over the green grass ", "choices": ["we go", " sky"], "answer": 1},
    {"text": "", "choices": ["The sky is blue", "sun"], "answer": 0},
]
CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}}}, cache_dir: {1}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}}}, cache_dir: {1}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}} The sun is yellow."
metric_list: [{{metric: bits_per_byte}}]
"""
SAYING = """
task: tiny_saying
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}}}, cache_dir: {1}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}} Here"
doc_to_target: "we"
generation_kwargs: {{do_sample: false, max_gen_toks: 12, until: ["w"]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with gates that do something, in transformers' layout, with a tokenizer; tasks and documents."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("lm_eval")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    words.train_from_iterator([doc["text"] + str(doc["choices"]) for doc in DOCS], trainer)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, vocab_size=304, headdim=16, d_state=8)).eval()
    with torch.no_grad():
        model.backbone.embedding.weight.normal_()
    model.tokenizer, model.name = HFTokenizer(words, "words", eos_id=0), "tiny"
    checkpoint.save(model, root / "model", layout="transformers")
    (root / "docs.json").write_text("\n".join(json.dumps(doc) for doc in DOCS))
    (root / "tasks").mkdir()
    for task in (CHOICES, ROLLING, SAYING):
        name = task.split()[1]
        (root / "tasks" / f"{name}.yaml").write_text(task.format(root / "docs.json", root / "cache"))
    return root


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "model")


@pytest.fixture(scope="module")
def bytes_model():
    torch.manual_seed(1)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).eval()
    model.tokenizer, model.name, model.train_length = ByteTokenizer(), "tiny-bytes", 64
    return model


def ask(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def run(lm, folder, tasks):
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=10)


@pytest.mark.parametrize("max_length", [2048, 7])
def test_every_request_has_the_figure_of_hflm(folder, model, max_length):
    """Stock lm-eval on transformers' Mamba2ForCausalLM with the same weights, request by request."""
    HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="it needs accelerate", exc_type=ImportError).HFLM

    tasks = ["tiny_choices", "tiny_rolling", "tiny_saying"] if max_length > 100 else ["tiny_rolling"]
    theirs = HFLM(str(folder / "model"), device="cpu", dtype="float32", max_length=max_length, batch_size=1)
    expected = run(theirs, folder, tasks)["samples"]
    ours = run(HarnessLM(model, max_length=max_length, batch_size=2, segment=8), folder, tasks)["samples"]
    compared = 0
    for task in tasks:
        for mine, reference in zip(ours[task], expected[task], strict=True):
            assert mine["prompt_hash"] == reference["prompt_hash"]
            for (a,), (b,) in zip(mine["resps"], reference["resps"], strict=True):
                if task == "tiny_saying":
                    assert a == b
                elif task == "tiny_choices":
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3) and str(a[1]) == str(b[1])
                else:
                    assert float(a) == pytest.approx(float(b), abs=1e-3)
                compared += 1
    assert compared == (13 if len(tasks) == 3 else 3)


def test_neither_batches_nor_cuts_nor_neighbours_change_a_figure(model):
    long = "The grass is green. The sky is blue. " * 5
    pairs = [(long, " we go"), (long, " sun"), (long, " and back again"), ("a", " b"), ("grass is", " g"), ("", "sky")]
    alone = [HarnessLM(model).loglikelihood(ask("loglikelihood", pair))[0] for pair in pairs]
    for batch, segment in ((1, 5), (3, 16), (8, 4096)):
        together = HarnessLM(model, batch_size=batch, segment=segment).loglikelihood(ask("loglikelihood", *pairs))
        assert [v for v, _ in together] == pytest.approx([v for v, _ in alone], abs=1e-4)
        assert [g for _, g in together] == [g for _, g in alone]


def test_what_is_scored_is_the_continuation_alone(bytes_model):
    ids = torch.from_numpy(ByteTokenizer().encode("\0ab cde"))[None]
    with torch.no_grad():
        losses = bytes_model.losses(bytes_model(ids[:, :-1]), ids[:, 1:])[0]
    lm = HarnessLM(bytes_model)
    assert lm.loglikelihood(ask("loglikelihood", ("", "ab cde")))[0][0] == pytest.approx(-losses.sum().item(), abs=1e-4)
    assert lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("ab cde",), ("",))) == pytest.approx(
        [-losses.sum().item(), 0], abs=1e-4
    )
    with torch.no_grad():
        losses = bytes_model.losses(bytes_model(ids[:, 1:-1]), ids[:, 2:])[0]
    # a space that ends the context belongs to what is scored
    for pair in (("ab", " cde"), ("ab ", "cde")):
        (value, _) = lm.loglikelihood(ask("loglikelihood", pair))[0]
        assert value == pytest.approx(-losses[1:].sum().item(), abs=1e-4)


def test_generation_stops_where_it_is_told_to(model):
    lm = HarnessLM(model, batch_size=4)
    greedy = {"max_gen_toks": 20, "until": [], "do_sample": False}
    contexts = ["The sky is", "The sun is", "Here", ""]
    whole = lm.generate_until(ask("generate_until", *((c, greedy) for c in contexts)))
    assert whole == [lm.generate_until(ask("generate_until", (c, greedy)))[0] for c in contexts]
    assert any(whole)
    stop = max(whole, key=len)[3:5]
    cut = lm.generate_until(ask("generate_until", *((c, greedy | {"until": ["", stop]}) for c in contexts)))
    assert cut == [text.split(stop)[0] for text in whole]
    (short,) = lm.generate_until(ask("generate_until", (contexts[0], {"max_new_tokens": 2})))
    assert whole[0].startswith(short) and len(model.tokenizer.encode(short)) <= 2
    warm = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0}
    asked = ask("generate_until", *[(contexts[0], warm)] * 3)
    drawn = lm.generate_until(asked)
    assert drawn == HarnessLM(model, batch_size=1).generate_until(asked) and len(set(drawn)) > 1
    with pytest.raises(InputError, match="top_p"):
        lm.generate_until(ask("generate_until", ("a", warm | {"top_p": 0.5})))


def test_what_is_too_long_is_refused_and_never_cut(bytes_model):
    lm = HarnessLM(bytes_model, max_length=10)
    assert lm.loglikelihood(ask("loglikelihood", ("123456789", "01")))
    with pytest.raises(InputError, match="reads 11 tokens, more than max_length = 10"):
        lm.loglikelihood(ask("loglikelihood", ("123456789", "012")))
    with pytest.raises(InputError, match="max_length"):
        lm.generate_until(ask("generate_until", ("1234", {"max_gen_toks": 7})))
    assert HarnessLM(bytes_model, max_length="4k").max_length == 4096
    for wrong in ({"max_length": 0}, {"max_length": "long"}, {"batch_size": "auto"}, {"segment": 0}, {"segment": -5},
                  {"mitigation": "rri"}, {"train_length": 64}, {"dtype": "bfloat16"}):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(wrong))):
            HarnessLM(bytes_model, **wrong)


def test_a_long_context_never_makes_all_logits(bytes_model, monkeypatch):
    sizes = []
    logits = bytes_model.logits
    monkeypatch.setattr(bytes_model, "logits", lambda hidden: sizes.append(hidden.shape[:-1].numel()) or logits(hidden))
    HarnessLM(bytes_model, segment=100).loglikelihood(ask("loglikelihood", ("x" * 1000, "yz")))
    assert sum(sizes) == 2


def test_passkey_prompts_come_through_as_they_are(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    for spec in ("bytes", str(tmp_path)):
        docs = utils.passkey(tokenizer=spec, max_seq_lengths=[200, 1100], limit=3, seed=5)["test"]
        prompts = [p for n in (200, 1100) for p in passkey_batch(ByteTokenizer(), n, 3, 5)]
        assert [d["input"].encode() for d in docs] == [bytes(p.ids.tolist()) for p in prompts]
        assert [d["answer"] for d in docs] == [p.answer for p in prompts]
    doc = {"answer": "12345"}
    said = {" 12345.": 1, "12345": 1, "123456": 0, "": 0, " x12345": 0}
    assert {s: utils.passkey_results(doc, [s])["exact_match"] for s in said} == said


def test_scores_of_answers_and_summaries():
    score = utils.question_results
    assert score({"answers": ["Paris", "the city of Paris"]}, [" The Paris."]) == {"f1": 1.0, "exact_match": 1.0}
    assert score({"answers": ["blue sky"]}, ["green sky now"])["f1"] == pytest.approx(2 * 1 / 5)
    assert score({"answers": ["blue"]}, [""]) == {"f1": 0.0, "exact_match": 0.0}
    assert utils.rouge_l("The cat sat on a mat", "the cat lay on the mat") == pytest.approx(2 * 4 / 12)
    assert utils.rouge_l("", "x") == 0.0


def test_one_row_a_task_length_and_remedy(bytes_model, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # which is in no git repository
    (tmp_path / "qa.jsonl").write_text(json.dumps({"context": "abc", "question": "d?", "answers": "e"}) + "\n\n")
    frame = lm_eval_table(
        bytes_model,
        HarnessConfig(
            ["tiny_choices", "rnn_longctx_passkey", "rnn_longctx_qa"],
            "256,200",
            ["none", "window:tokens=50"],
            limit=2,
            include_path=str(folder / "tasks"),
            data=str(tmp_path / "qa.jsonl"),
            out=str(tmp_path / "out"),
        ),
    )
    assert tuple(frame.columns) == COLUMNS
    key = frame[["task", "length", "metric", "mitigation"]].astype(object).where(frame.notna(), None)
    fixed = {
        (t, None, m) for t, m in (("tiny_choices", "acc"), ("rnn_longctx_qa", "f1"), ("rnn_longctx_qa", "exact_match"))
    }
    kinds = fixed | {("rnn_longctx_passkey", n, "exact_match") for n in (200, 256)}
    assert set(key.itertuples(index=False, name=None)) == {
        (*kind, remedy) for kind in kinds for remedy in ("none", "window:tokens=50")
    }
    rows = frame.set_index("task")
    by_length = rows.loc["rnn_longctx_passkey"]
    assert (by_length["tokens_read"] == by_length["length"]).all() and set(frame["seed"]) == {0}
    read = [len(doc["text"].rstrip()) for doc in DOCS[:2] for _ in doc["choices"]]  # a context a choice
    assert set(rows.loc["tiny_choices"]["tokens_read"]) == {sum(read) / len(read)}
    assert (rows.loc["rnn_longctx_qa"]["tokens_read_min"] == len("abc\n\nQuestion: d?\nAnswer:")).all()
    assert set(frame.n) == {1, 2} and set(frame.weights_hash) == {bytes_model.weights_hash}
    with (tmp_path / "out" / "lm_eval.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(frame)
    runs = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert len(runs) == 6 and "arguments" not in json.dumps(runs)
    assert all(mixer.policy.window is None for mixer in bytes_model.mixers)
    assert "git" not in capfd.readouterr().err


def test_lengths_are_in_the_model_s_own_tokens(folder):
    """They were bytes where the tokenizer had not been used before."""
    frame = lm_eval_table(load(folder / "model"), HarnessConfig(["rnn_longctx_passkey"], "400", limit=2))
    assert frame["tokens_read"].item() == pytest.approx(400, rel=0.05)


def test_the_command(folder, bytes_model, tmp_path, capsys, monkeypatch):
    checkpoint.save(bytes_model, tmp_path / "m", dtype="float32")

    def said(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", "lm-eval", "--model", str(tmp_path / "m"), *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert stopped.value.code == code, err
        return out if code == 0 else err

    where = ("--out", str(tmp_path / "out"), "--limit", "1")
    out = said("--tasks", "rnn_longctx_passkey", "--lengths", "200", *where)
    assert "rnn_longctx_passkey" in out and "exact_match" in out and "lm_eval.csv" in out and "state_dtype" not in out
    assert re.search(r"tokens_read .*\n *rnn_longctx_passkey +200 +200 ", out) and "seed 0" in out
    out = said("--tasks", "rnn_longctx_passkey", "--lengths", "200", "--state-dtype", "bfloat16", *where)
    assert (
        "state_dtype" in out
        and json.loads((tmp_path / "out" / "lm_eval.json").read_text())[0]["state_dtype"] == "bfloat16"
    )
    assert (TASKS / "rnn_longctx_passkey.yaml").is_file()

    def line(*words):
        err = said(*words, *where, code=2).strip().splitlines()[-1]
        assert err.startswith("rnn-longctx: ")
        return err

    assert "name it with --data" in line("--tasks", "rnn_longctx_qa")
    assert "add_bos_token: tokenizer bytes has no BOS token" in line("--tasks", "x", "--add-bos-token")
    assert "at least" in line("--tasks", "rnn_longctx_passkey", "--lengths", "64")
    assert 'did you mean "state-norm"' in line("--tasks", "x", "--mitigation", "state-nrm")
    assert "more than max_length" in line("--tasks", "rnn_longctx_passkey", "--lengths", "200", "--max-length", "100")
    small = TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **k: small(**(k | {"include_defaults": False})))
    assert "the nearest: rnn_longctx_passkey" in line("--tasks", "rnn_longctx_passkeys")
    assert line("--tasks", "passkey").endswith("no task 'passkey'; this library's is called rnn_longctx_passkey")


def test_a_task_of_another_that_is_called_as_ours_elsewhere(bytes_model, folder, tmp_path, caplog):
    text = (folder / "tasks" / "tiny_choices.yaml").read_text()
    (tmp_path / "passkey.yaml").write_text(text.replace("task: tiny_choices", "task: passkey"))
    given = {"limit": 1, "include_path": str(tmp_path)}
    assert set(lm_eval_table(bytes_model, HarnessConfig(["passkey"], **given)).task) == {"passkey"}
    assert "lm-eval's own; this library's is called rnn_longctx_passkey" in caplog.text
    (tmp_path / "passkey.yaml").write_text(
        text.replace("task: tiny_choices", "task: passkey").replace("docs.json", "no.json")
    )
    with pytest.raises(InputError, match=r"cannot be had here: .*; this library's is called rnn_longctx_passkey"):
        lm_eval_table(bytes_model, HarnessConfig(["passkey"], **given))


def test_a_group_goes_without_what_cannot_be_had(bytes_model, folder, tmp_path, caplog):
    text = (folder / "tasks" / "tiny_choices.yaml").read_text()
    (tmp_path / "good.yaml").write_text(text.replace("task: tiny_choices", "task: tiny_good"))
    (tmp_path / "bad.yaml").write_text(text.replace("task: tiny_choices", "task: tiny_bad").replace("docs.json", "no"))
    (tmp_path / "group.yaml").write_text("group: tiny_group\ntask: [tiny_bad, tiny_good]\n")
    (tmp_path / "none.yaml").write_text("group: tiny_none\ntask: [tiny_bad]\n")
    given = {"limit": 1, "include_path": str(tmp_path)}
    assert set(lm_eval_table(bytes_model, HarnessConfig(["tiny_group"], **given)).task) == {"tiny_good"}
    assert "tiny_group goes without one of its tasks: task tiny_bad cannot be had here" in caplog.text
    for name in ("tiny_none", "tiny_bad"):
        with pytest.raises(InputError, match="task tiny_bad cannot be had here"):
            lm_eval_table(bytes_model, HarnessConfig([name], **given))


def test_tasks_that_cannot_be_had_are_named_with_what_helps(bytes_model, folder, tmp_path, monkeypatch):
    """All of them at once, before anything is read; and which of the others would run."""

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/books' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    monkeypatch.setattr(HarnessLM, "loglikelihood", None)
    text = (folder / "tasks" / "tiny_choices.yaml").read_text()
    hub = re.sub("dataset_path: .*", "dataset_path: owner/books", text)
    (tmp_path / "hub.yaml").write_text(hub.replace("task: tiny_choices", "task: tiny_hub"))
    (tmp_path / "package.yaml").write_text("task: tiny_package\ncustom_dataset: !function no_package.make\n")
    (tmp_path / "no_package.py").write_text("import no_such_package.inside\n")
    tasks = ["tiny_hub", "rnn_longctx_passkey", "tiny_package"]
    with pytest.raises(InputError) as stopped:
        lm_eval_table(bytes_model, HarnessConfig(tasks, lengths=[300], limit=1, include_path=str(tmp_path)))
    said = str(stopped.value)
    assert "task tiny_hub cannot be had here: Couldn't" in said and "; it reads owner/books of the Hugging" in said
    assert "task tiny_package cannot be had here: " in said and "pip install no_such_package;" in said
    assert said.endswith("; the others run with --tasks rnn_longctx_passkey")


def test_without_lm_eval_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    for name in ("rnn_longctx.eval.harness.model", "rnn_longctx.eval.harness.run"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["rnn-longctx", "lm-eval", "--model", "demo", "--tasks", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "pip install 'rnn-longctx[eval]'" in capsys.readouterr().err


def test_lm_eval_finds_the_model_by_its_name(bytes_model, tmp_path):
    from lm_eval.api.registry import get_model

    checkpoint.save(bytes_model, tmp_path / "m", dtype="float32")
    made = get_model("rnn-longctx").create_from_arg_string(
        f"model={tmp_path / 'm'},mitigation=window:tokens=50,max_length=99", {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(made, HarnessLM) and (made.max_length, made.batch_size) == (99, 2)
    assert made.model.mixers[0].policy.window == 50
    config = MambaConfig(hidden_size=32, vocab_size=256, state_size=4, num_hidden_layers=1, time_step_rank=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    made = get_model("rnn-longctx").create_from_arg_string(
        f"model={tmp_path / 'theirs'},tokenizer=bytes,train_length=64,mitigation=rri", {"device": "cpu"}
    )
    assert made.model.train_length == 64 and made.model.mixers[0].policy.gain == 0.75


@torch.no_grad()
def test_log_likelihoods_that_are_no_numbers_are_said(caplog):
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).eval()
    model.tokenizer = ByteTokenizer()
    pairs = [("a", " b"), ("a", " c"), ("a longer one", " d")]
    HarnessLM(model).loglikelihood(ask("loglikelihood", *pairs))
    assert "not numbers" not in caplog.text
    model.mixers[0].D.fill_(torch.inf)
    HarnessLM(model).loglikelihood(ask("loglikelihood", *pairs))
    assert "3 of 3 log-likelihoods are not numbers" in caplog.text
