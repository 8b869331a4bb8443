"""The names of `rnn_longctx` as a newcomer calls them: what is read gladly, and one clear line for what is not."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf

import rnn_longctx
from rnn_longctx import CollapseMonitor, InputError, adopt, evaluate, generate, load, mitigate, record
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.retention import retention

LM = "lm:slices=2,tokens=0"


@pytest.fixture
def model():
    torch.set_num_threads(1)
    lm = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).eval()
    lm.train_length, lm.tokenizer, lm.name = 64, ByteTokenizer(), "tiny"
    torch.nn.init.zeros_(lm.backbone.embedding.weight[0])  # so that NUL, which ends an answer, is not said
    return lm


@pytest.fixture
def theirs():
    """A model of transformers that nobody has adopted."""
    torch.set_num_threads(1)
    config = hf.Mamba2Config(hidden_size=32, vocab_size=256, num_heads=4, head_dim=16, state_size=8, n_groups=1,
                             num_hidden_layers=2)  # fmt: skip
    lm = hf.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.zeros_(lm.get_output_embeddings().weight[:3])  # so that what ends an answer is not said
    return lm


@pytest.fixture
def text():
    return Text("made", bytes(torch.randint(32, 127, (9000,)).tolist()))


def test_prompts_of_every_kind(model, theirs):
    ids = torch.randint(32, 127, (1, 11))
    said = generate(model, ids, 5)
    assert said.shape == (1, 5)
    row = ids[0].tolist()
    for prompt in (row, [row], ids[0], ids.int(), np.array(row), bytes(row), bytes(row).decode()):
        assert torch.equal(generate(model, prompt, 5), said)
    assert torch.equal(generate(theirs, row, 5), generate(adopt(theirs), ids, 5))
    assert generate(model, ids, 0).shape == (1, 0)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "got NoneType None"),
        ([], "got shape (1, 0)"),
        ([None], "got NoneType None"),
        (["some", ""], "at least one of them; got shape (1, 0)"),
        ([[1, 2], []], "at least one of them; got shape (1, 0)"),
        ([[1, 2], [3, 256]], "lie in 0 to 255; got 3 to 256"),
        ([[[1, 2], [3, 4]], [1]], "each is one row; got one of shape (2, 2)"),
        (torch.rand(1, 3), "got float32 of shape (1, 3)"),
        (torch.ones(1, 3, dtype=torch.bool), "got bool"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "got shape (1, 2, 3)"),
        (torch.tensor(5), "got shape ()"),
        ("", "at least one of them; got shape (1, 0)"),
        ([3, 256], "lie in 0 to 255; got 3 to 256"),
        ([-1, 3], "got -1 to 3"),
    ],
)
def test_what_is_no_prompt(model, prompt, words):
    with pytest.raises(InputError) as error:
        generate(model, prompt, 3)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_text_needs_a_tokenizer(model, theirs):
    with pytest.raises(InputError, match="comes with no tokenizer; name one"):
        generate(theirs, "some words", 3)
    adopt(theirs, tokenizer="bytes")
    assert generate(theirs, "some words", 3).shape == (1, 3)
    model.tokenizer = None
    with pytest.raises(InputError, match="tiny has no tokenizer"):
        generate(model, "some words", 3)
    for wrong in (-3, "3", 3.0, None):
        with pytest.raises(InputError, match="max_new_tokens"):
            generate(model, [1], wrong)
    for wrong in (float("nan"), "1", None):
        with pytest.raises(InputError, match="temperature"):
            generate(model, [1], 3, temperature=wrong)
    with pytest.raises(InputError, match="seed"):
        generate(model, [1], 3, seed="x")


def test_evaluate_takes_one_thing_or_several(model, theirs, text, tmp_path):
    (tmp_path / "t.txt").write_bytes(text.data)
    one = evaluate(model, 100, LM, "none", text=text).set_index(["metric", "length"])["value"]
    several = evaluate(model, ["64", 100], [LM], ["none"], text=str(tmp_path / "t.txt"))
    assert one.to_dict() == several.set_index(["metric", "length"])["value"].to_dict() and len(one)
    with pytest.raises(InputError, match="comes with no tokenizer"):
        evaluate(theirs, 64, LM, text=text)
    adopt(theirs, tokenizer="bytes")
    assert len(evaluate(theirs, 64, LM, text=text)) and adopt(theirs).train_length is None
    with pytest.raises(InputError, match="lengths are whole numbers"):
        evaluate(model, None, LM, text=text)
    with pytest.raises(InputError, match=r"'lm,passkey': several tasks are a list"):
        evaluate(model, 64, "lm,passkey", text=text)
    with pytest.raises(InputError, match=r"expected a task such as lm .*got 3"):
        evaluate(model, 64, [3], text=text)


@pytest.mark.parametrize("call", [
    lambda name: generate(name, [1, 2]), lambda name: evaluate(name, 64), lambda name: mitigate(name, "none"),
    lambda name: record(name).__enter__(), lambda name: calibrate(name, "rri", 99, "x"), CollapseMonitor.calibrated,
    adopt,
])  # fmt: skip
def test_a_name_is_no_model(call):
    with pytest.raises(InputError, match=r"got the name 'demo': load one first, as in rnn_longctx.load"):
        call("demo")


def test_what_is_no_model_no_remedy_and_no_action(model, text):
    with pytest.raises(InputError, match="expected a model, got NoneType"):
        generate(None, [1])
    with pytest.raises(InputError, match="tiny is this library's own"):
        adopt(model)
    with pytest.raises(InputError, match=r'"demo", a directory or a hub id, got LM'):
        load(model)
    for remedy in (None, 3, ["state-norm"]):
        with pytest.raises(InputError, match=r"a remedy is a string .* composed with \+, .*got ") as error:
            mitigate(model, remedy)
        assert str(error.value).endswith(f"got {remedy}")
    with pytest.raises(InputError, match=r"cannot read remedy file nope\.yaml: No such file"):
        mitigate(model, "nope.yaml")
    with pytest.raises(InputError, match=r"a tokenizer is named by .*; got int 3"):
        load("demo", tokenizer=3)
    monitor = CollapseMonitor.calibrated(model, text)
    for action in (None, 3):
        with pytest.raises(InputError, match=rf"got {action} \(choices: warn"), monitor.on(model, action=action):
            pass
    assert all(mixer.observer is None for mixer in model.mixers)


def test_a_stream_is_read_from_ids_alone(model, theirs):
    ids = torch.randint(32, 127, (1, 11))
    for lm in (model, adopt(theirs)):
        with torch.no_grad():
            (expected,) = lm.stream(ids)
            for row in (ids[0], ids[0].tolist(), ids.int().numpy()):
                (hidden,) = lm.stream(row)
                assert torch.equal(hidden, expected)
        for bad in ("hello", ids[None], ids.float()):
            with pytest.raises(InputError, match="a stream is read from token ids"):
                next(lm.stream(bad))


def test_sizes_are_read_as_on_the_command_line(model, theirs, text, tmp_path):
    assert adopt(theirs, train_length="2k").train_length == 2048
    checkpoint.save(model, tmp_path / "m")
    assert load(tmp_path / "m", train_length="1m").train_length == 2**20
    with mitigate(model, "token-filter", target_length="1k", text=text) as handle:
        policies = handle.plan.policies
    with mitigate(model, "token-filter", target_length=1024, text=text) as handle:
        assert handle.plan.policies == policies
    for bad in ("2q", 0, -4, 2.5, "", True):
        with pytest.raises(InputError, match="train_length is a positive whole number such as 256"):
            adopt(theirs, train_length=bad)
        with pytest.raises(InputError, match="train_length is a positive whole number such as 256"):
            load(tmp_path / "m", train_length=bad)
    with pytest.raises(InputError, match="target_length is a positive"):
        mitigate(model, "token-filter", target_length="long")
    assert CollapseMonitor.calibrated(model, Text("made", text.data * 2), every="1k").every == 1024
    with record(model, every="1k") as trace, torch.no_grad():
        model(torch.randint(256, (1, 1024)))
    assert trace.table().position.unique().tolist() == [1024]
    assert retention(trace.table().assign(position=2048), "2k").head(1)["end"].item() == 2048


def test_all_names_are_listed_before_they_are_loaded():
    code = ("import sys, rnn_longctx as r; print(set(r.__all__) <= set(dir(r)), 'torch' in sys.modules, "
            "all(hasattr(r, n) for n in dir(r)))")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True", "False", "True"], run.stderr
    assert not hasattr(rnn_longctx, "nothing")
