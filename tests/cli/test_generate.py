"""`generate` on the command line: prompts, conversations, a monitor beside it."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

SHAPE = {"d_model": 32, "n_layer": 1, "headdim": 16, "d_state": 8}


def test_generate(run):
    words = ("generate", "ok", "--prompt", "import os", "--max-new-tokens", "4", "--mitigation", "window:tokens=3")
    code, printed, _ = run(*words)
    assert code == 0 and printed == run(*words)[1]


def test_a_prompt_from_standard_input(run, monkeypatch):
    words = ("generate", "ok", "--max-new-tokens", "4", "--prompt")
    expected = run(*words, "import os")[1]
    for raw in (b"import os", gzip.compress(b"import os"), "import os".encode("utf-16")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        assert run(*words, "-")[:2] == (0, expected)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"%PDF-1.5\n")))
    code, _, said = run(*words, "-")
    assert code == 2 and "standard input looks like a PDF; pdftotext" in said
    code, _, said = run(*words, "ab\udcff")  # as the shell's bytes come
    assert code == 2 and "--prompt is not UTF-8 text at byte 2" in said


@pytest.fixture
def talker(tmp_path):
    """A folder with a model that says other letters for other prompts."""
    model = Mamba2LM(Mamba2Config(**SHAPE, tie_embeddings=False)).eval()
    with torch.no_grad():
        model.lm_head.weight[97:123] *= 3000
    model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "talker"
    checkpoint.save(model, tmp_path / "talker", dtype=torch.float32)
    return str(tmp_path / "talker")


def test_generate_ends(run, talker, tmp_path):
    how = ("generate", talker, "--prompt", "import os", "--temperature", "20", "--seed", "3", "--max-new-tokens", "30")
    whole = run(*how)[1]
    assert re.fullmatch("[a-z]{30}\n", whole)
    ends = [whole.index(stop) + 2 for stop in (whole[9:11], whole[4:6])]
    assert run(*how, "--stop", whole[9:11])[1] == whole[: ends[0]] + "\n"
    assert run(*how, "--stop", whole[9:11], "--stop", whole[4:6])[1] == whole[: min(ends)] + "\n"
    code, _, said = run(*how, "--stop", "")
    assert code == 2 and "stop: expected a string" in said
    file = Path(talker, "config.json")
    config = json.loads(file.read_text()) | {"eos_token_id": [7, ord(whole[6])]}
    file.write_text(json.dumps(config))
    text = whole[: whole.index(whole[6])]
    assert run(*how)[1] == text + "\n" * bool(text)  # the end is read, not printed


def test_several_prompts(run, talker, tmp_path):
    """Of any lengths, answered in turn as each alone; after a document, each from where it ended."""
    how, asked = ("generate", talker, "--max-new-tokens", "6"), ("ab", "import os", "c")
    several = [word for text in asked for word in ("--prompt", text)]
    assert run(*how, *several)[1] == "".join(run(*how, "--prompt", text)[1] for text in asked)
    state = str(tmp_path / "state")
    run("generate", talker, "--prompt", "a document", "--save-state", state)
    alone = [run(*how, "--load-state", state, "--prompt", text)[1] for text in asked]
    assert run(*how, "--load-state", state, *several)[1] == "".join(alone)
    assert alone == [run(*how, "--prompt", f"a document{text}")[1] for text in asked]
    for one in (("--save-state", state), ("--monitor", "warn")):
        code, _, said = run(*how, *several, *one)
        assert code == 2 and "are of one stream: give them one --prompt" in said
    code, _, said = run(*how, "--prompt", "ab", "--prompt", "")
    assert code == 2 and "the prompt is empty" in said


def test_generate_prints_as_it_goes(run, talker, monkeypatch):
    printed, read = [], []
    own = Mamba2LM.read
    monkeypatch.setattr("rnn_longctx.cli.commands.generate.text", lambda piece="": printed.append(len(read)))
    monkeypatch.setattr(Mamba2LM, "read", lambda *given: read.append(0) or own(*given))
    run("generate", talker, "--prompt", "import os", "--max-new-tokens", "5")
    assert printed == [1, 2, 3, 4, 5, 5]


def test_a_conversation_on_the_command_line(run, talker, tmp_path):
    """What is saved is what was read and printed; without a number of tokens, what was read."""
    one, two, three = (str(tmp_path / name) for name in "123")
    how = ("generate", talker, "--max-new-tokens")
    first = run(*how, "7", "--prompt", "ab", "--save-state", one)[1].rstrip()
    second = run(*how, "3", "--prompt", "cd", "--load-state", one, "--save-state", two)[1].rstrip()
    assert len(first) == 7 and second == run(*how, "3", "--prompt", f"ab{first}cd")[1].rstrip()
    code, printed, said = run("generate", talker, "--prompt", f"ab{first}cd{second}", "--save-state", three)
    assert code == 0 and not printed and said.startswith(f"wrote {three}, ")
    a, b = (Cache.load(path) for path in (two, three))
    assert a.position.tolist() == b.position.tolist() == [14]
    torch.testing.assert_close(a.layers[0].scan.state, b.layers[0].scan.state)
    torch.testing.assert_close(a.layers[0].conv, b.layers[0].conv)


def test_generate_with_a_monitor(run, store, tmp_path):
    model = Mamba2LM(Mamba2Config(**SHAPE, A_init=(1e-6, 1e-5), dt_init=(0.05, 0.2))).eval()
    torch.nn.init.constant_(model.mixers[0].conv1d.bias, 0.5)  # so that its states grow with what is read
    torch.nn.init.zeros_(model.backbone.embedding.weight[0])  # so that NUL, which ends an answer, is not said
    model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "lost"
    checkpoint.save(model, tmp_path / "lost", dtype=torch.float32)
    prompt = (store / "text.py").read_text()
    words = ("generate", str(tmp_path / "lost"), "--prompt", prompt, "--max-new-tokens", "100")
    code, printed, said = run(*words, "--monitor", "mitigate:rri:alpha=0.5,beta=1")
    assert code == 0 and printed and said.startswith("monitor: position 4096: ") and said.count("\n") == 1
    assert re.search(r"; mitigate:rri:alpha=0.5,beta=1 at \d+\n$", said)
    code, printed, said = run(*words, "--monitor", "raise")
    assert code == 1 and not printed and "rnn-longctx: lost at position" in said and "collapsed" in said
    code, printed, said = run("generate", "ok", "--prompt", "import os", "--max-new-tokens", "4", "--monitor", "warn")
    assert code == 0 and said == "monitor: nothing yet: a look is taken every 256 tokens\n"
