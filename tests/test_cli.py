"""The command line in this process: what it prints, and one line and exit code 2 for whatever is wrong."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from rnn_longctx import cli
from rnn_longctx.config import parse_lengths
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.eval import EvalConfig
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

SHAPE = {"d_model": 32, "n_layer": 1, "headdim": 16, "d_state": 8}
OFFICIAL = {
    "d_model": 32,
    "n_layer": 1,
    "vocab_size": 256,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Checkpoints, one good and the others not, and texts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("store")
    model = Mamba2LM(Mamba2Config(**SHAPE)).eval()
    model.train_length, model.tokenizer, model.name = 128, ByteTokenizer(), "tiny"
    checkpoint.save(model, root / "ok", dtype=torch.float32)
    (root / "empty").mkdir()
    for name in ("noweights", "cut", "mismatch"):
        shutil.copytree(root / "ok", root / name)
    (root / "noweights" / "model.safetensors").unlink()
    whole = (root / "ok" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "ok" / "config.json").read_text())
    config["model"]["d_state"] = 16
    (root / "mismatch" / "config.json").write_text(json.dumps(config))
    for name in ("official", "evil", "evilzip"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(OFFICIAL))
    torch.save(model.state_dict(), root / "official" / "pytorch_model.bin")
    (root / "evil" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, root / "evilzip" / "pytorch_model.bin")
    with torch.no_grad():
        model.mixers[0].in_proj.weight[0, 0] = torch.nan
    checkpoint.save(model, root / "nan", dtype=torch.float32)

    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (root / "words").mkdir()
    words.save(str(root / "words" / "tokenizer.json"))
    (root / "text.py").write_bytes(bytes(torch.randint(32, 120, (4000,)).tolist()))
    (root / "latin.txt").write_bytes("é à ü ".encode("latin1") * 300)
    (root / "file").touch()
    return root


@pytest.fixture
def run(store, monkeypatch, capsys):
    """run(words...) -> exit code, stdout, stderr, in the store's folder and with no hub in reach."""
    monkeypatch.chdir(store)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return code, *capsys.readouterr()

    return call


EVAL = ("--lengths", "128,200", "--task", "lm:slices=2,tokens=0", "--text", "text.py")


def test_eval_and_plot(run, tmp_path):
    out = tmp_path / "r"
    remedies = ("none", "rri:alpha=0.99,beta=1", "recompute:last=64")
    words = ("eval", "ok", *EVAL, "--task", "passkey:n=4", *(w for r in remedies for w in ("--mitigation", r)))
    code, printed, said = run(*words, "--out", str(out))
    assert code == 0, said
    # once in each table at the least; the verdict may say it, too
    assert printed.count("without a remedy") >= 2 and "ok, 15.5K parameters" in printed
    assert "trained at  128 tokens" in printed and "n = 4 prompts" in printed
    frame = pd.read_parquet(out / "results.parquet")
    assert set(frame.mitigation) == {"none", "rri:alpha=0.99,beta=1", "recompute:last=64"}
    assert set(frame.length) == {128, 200} and set(frame.task) == {"lm", "passkey"}
    assert len(pd.read_csv(out / "results.csv")) == len(frame)
    drawn = sorted(p.name for p in out.glob("*.png"))
    assert "loss_over_length.png" in drawn and all(name in printed for name in drawn)
    for path in out.glob("*.png"):
        path.unlink()
    code, printed, _ = run("plot", str(out))
    assert code == 0 and sorted(Path(line).name for line in printed.split()) == drawn


def test_a_second_command_into_a_folder_prints_what_it_asked_for(run, store, tmp_path):
    out, words = str(tmp_path / "k"), ("--text", "text.py", "--task")
    lm = (*words, "lm:slices=2,tokens=0", "--out", out)
    first = ("eval", "ok", "--lengths", "128,200", *lm, "--mitigation", "rri", "--mitigation", "recompute:last=64")
    code, printed, said = run(*first)
    assert code == 0 and "before" not in printed and "not shown" not in printed, said
    one = (*words, "lm:slices=1,tokens=0", "--out", out)
    code, printed, said = run("eval", "ok", "--lengths", "64,128", *one, "--mitigation", "none")
    assert code == 0, said
    assert "none" in printed and "recompute:last=64" in printed and "rri" not in printed
    assert "with 2 other settings measured here before; 5 rows of other models" in " ".join(printed.split())
    code, printed, said = run("eval", "ok", "--lengths", "128", *words, "passkey:n=2,least=2", "--out", out)
    assert code == 0 and "passkey accuracy" in printed and "loss in nats" not in printed, said
    frame = pd.read_parquet(tmp_path / "k" / "results.parquet")
    assert set(frame.task) == {"lm", "passkey"} and set(frame[frame.mitigation == "recompute:last=64"].n) == {2}


def test_options_win_over_the_config(run, store, tmp_path):
    (tmp_path / "c.yaml").write_text(f"model: nowhere\nlengths: [64, 1k]\ntasks: [lm]\ntext: {store / 'text.py'}\n")
    out = str(tmp_path / "r")
    code, *_ = run("eval", "ok", "--config", str(tmp_path / "c.yaml"), "--lengths", "64", "--out", out)
    assert code == 0
    assert set(pd.read_csv(tmp_path / "r" / "results.csv").length) == {64}


def test_the_precision_of_states_is_named(run, tmp_path):
    out = str(tmp_path / "r")
    for more in ((), ("--state-dtype", "bfloat16"), ("--state-dtype", "float32")):
        code, printed, said = run("eval", "ok", *EVAL, "--out", out, *more)
        assert code == 0, said
    frame = pd.read_csv(tmp_path / "r" / "results.csv")
    assert set(frame.state_dtype.fillna("-")) == {"-", "bfloat16"}
    code, printed, _ = run("eval", "ok", *EVAL, "--out", str(tmp_path / "s"), "--state-dtype", "bfloat16")
    assert "float32 with states in bfloat16" in printed
    assert run("generate", "ok", "--prompt", "import os", "--max-new-tokens", "4", "--state-dtype", "bfloat16")[0] == 0
    words = ("--text", "text.py", "--slices", "1", "--state-dtype", "bfloat16", "--out")
    header = printed[: printed.index("runs on")]
    code, printed, said = run("probe", "ok", "--length", "512", *words, str(tmp_path / "p"))
    assert code == 0, said
    assert printed.startswith(header) and "float32 with states in bfloat16" in printed, "the header of eval"
    assert json.loads((tmp_path / "p" / "probe.json").read_text())["state_dtype"] == "bfloat16"
    found = str(tmp_path / "found.yaml")
    code, _, said = run("calibrate", "ok", "--mitigation", "a-winsor:share=0.1", "--target", "300", *words, found)
    assert code == 0, said
    assert yaml.safe_load(Path(found).read_text())["scores"]["state_dtype"] == "bfloat16"


def shown(run, monkeypatch, command: str) -> str:
    monkeypatch.setattr("rich.console.Console.width", 400)
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)  # read as it is imported, which another test may have done
    code, printed, _ = run(command, "--help")
    assert code == 0
    return printed


def test_a_key_is_traced(run, tmp_path):
    code, printed, said = run("trace-key", "ok", "--gaps", "100,200", "--n", "2", "--out", str(tmp_path / "t"))
    assert code == 0, said
    assert "share of the keys found" in printed and "keys are not even found" in printed  # (nothing was learned)
    answers = pd.read_csv(tmp_path / "t" / "answers.csv")
    assert len(answers["gap"].unique()) == 3 and {"read", "restored", "undecayed"} <= set(answers["state"])
    assert len(pd.read_csv(tmp_path / "t" / "signals.csv")) == 3 * 4
    code, _, said = run("trace-key", "ok", "--reading", "helt")
    assert code == 2 and "unknown reading 'helt'" in said and "held" in said


def test_help_shows_the_defaults(run, monkeypatch):
    printed = shown(run, monkeypatch, "eval")
    config, also = EvalConfig(), {"tasks": "task", "mitigations": "mitigation"}
    for name, value in vars(config).items():
        option = f"--{also.get(name, name).replace('_', '-')} "
        (line,) = [line for line in printed.splitlines() if f"│ {option}" in line] or [""]
        if name == "model":
            continue
        assert "[default: " in line, option
        default = line.partition("[default: ")[2].partition("]")[0].strip("()")
        if name == "lengths":
            assert parse_lengths(default) == value
        elif value is not None:
            assert default == (" and ".join(value) if isinstance(value, list) else str(value)), option
    for command, options in {
        "probe": ("train-length", "tokenizer", "state-dtype", "log", "device"),
        "calibrate": ("train-length", "tokenizer", "state-dtype", "text"),
        "generate": ("train-length", "tokenizer", "state-dtype", "monitor", "mitigation"),
        "lm-eval": ("train-length", "tokenizer", "state-dtype", "mitigation", "limit", "max-length"),
    }.items():
        lines = shown(run, monkeypatch, command).splitlines()
        for option in options:
            assert any(f"--{option} " in line and "[default: " in line for line in lines), (command, option)


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


MISTAKES = {
    "eval missing": "'missing' is neither a directory nor a hub id",
    "eval ./missing/x": "neither a directory nor a hub id",
    "eval empty": "empty is an empty directory",
    "eval noweights": "no weights",
    "eval cut": "damaged or cut short",
    "eval mismatch": "config.json expects",
    "eval evil": "refused, nothing in it was run",
    "eval evilzip": "refused, nothing in it was run",
    "eval nan": "is not finite",
    "eval official": "--tokenizer",
    "eval ok --text latin.txt --task lm": "latin.txt is not UTF-8 text at byte 0 (0xe9); if it is text",
    "eval ok --text ok --task lm": "ok is a model (config.json, model.safetensors), not text",
    "eval ok --text words/tokenizer.json --task lm": "looks like a tokenizer.json; that goes to --tokenizer",
    "eval ok --mitigation state-nrom": 'did you mean "state-norm"',
    "eval ok --task passkey:m=3": "has no parameter 'm' (choices",
    "eval ok --task pasky": 'did you mean "passkey"',
    "eval ok --mitigation rri:alpha=2": "alpha must lie in",
    "eval ok --mitigation rri:gamma=2": "no parameter 'gamma'",
    "eval ok --mitigation state-norm+window:tokens=8": "cannot be combined with a window",
    "eval official --tokenizer bytes --mitigation state-norm": "give --train-length",
    "eval ok --lengths 0": "positive whole number",
    "eval ok --lengths=-5": "positive whole number",
    "eval ok --lengths 1.5k": "positive whole number",
    "eval ok --lengths 64k --text text.py --task lm": "has 4000 bytes",
    "eval ok --train-length 0": "positive whole number",
    "eval ok --batch 0": "batch must be at least 1",
    "eval ok --device cuda": "is not available here",
    "eval ok --dtype int8": "unknown dtype 'int8'",
    "eval ok --state-dtype int8": "a state is kept in float32",
    "generate ok --prompt a --state-dtype bf16": "a state is kept in float32",
    "eval ok --backend nothing": "unknown backend 'nothing'",
    "eval ok --out file/x": "cannot write results to file/x",
    "eval ok --text nowhere.txt": "no text at nowhere.txt",
    "eval --config nowhere.yaml": "cannot read config nowhere.yaml",
    "eval": "name a model",
    "calibrate ok --mitigation rri --target 2k --out nowhere/x.yaml": "there is no folder nowhere",
    "calibrate ok --mitigation rri --target 2k --out empty": "it is a folder",
    "generate missing --prompt a --load-state no.state": ": no.state: no such file\n",
    "generate ok --prompt a --load-state text.py": "text.py is not a state that generate --save-state",
    "generate ok --prompt=x --monitor rollbak:state-norm": 'did you mean "rollback:NAME"',
    "eval ok --task lm,passkey": "several tasks are a list",
    "eval ok --mitigation none.yaml": "cannot read remedy file none.yaml",
    "plot nowhere": "there is no folder nowhere",
    "generate ok --prompt=": "the prompt is empty",
    "generate ok --prompt=x --monitor wran": 'did you mean "warn"',
    "plot empty": "evaluate first",
    "train nowhere.yaml": "cannot read config",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(run, store, tmp_path, words):
    if words.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("CUDA is available here")
    asked = words.split()
    if asked[0] == "eval" and "--lengths" not in words and len(asked) > 1 and "--config" not in words:
        asked += ["--lengths", "200"]
    if asked[0] == "eval" and "--out" not in asked:
        asked += ["--out", str(tmp_path / "r")]
    code, _, said = run(*asked)
    assert code == 2 and MISTAKES[words] in said
    assert said.count("\n") == 1 and said.startswith("rnn-longctx: ")
    assert not (store / "owned").exists()


def test_a_mistake_loses_nothing(run, tmp_path):
    out = tmp_path / "r"
    assert run("eval", "ok", *EVAL, "--out", str(out))[0] == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run("eval", "ok", "--lengths", "64k", "--text", "text.py", "--task", "lm", "--out", str(out))[0] == 2
    assert run("eval", "ok", *EVAL, "--mitigation", "rri:alpha=3", "--out", str(out))[0] == 2
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_full_gpu_is_one_line_and_another_fault_is_not(run, monkeypatch):
    def fail(error):
        def read(*args, **kwargs):
            raise error

        monkeypatch.setattr(Mamba2LM, "read", read)

    fail(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."))
    code, _, said = run("generate", "ok", "--prompt", "x")
    assert code == 2 and said == "rnn-longctx: CUDA out of memory. Tried to allocate 2 GiB.\n"
    fail(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="of ours"):
        run("generate", "ok", "--prompt", "x")
