"""One line and exit code 2 for whatever is wrong."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.models.lm import Mamba2LM

EVAL = ("--lengths", "128,200", "--task", "lm:slices=2,tokens=0", "--text", "text.py")
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
