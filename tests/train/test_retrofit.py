"""A decoder is retrofitted, taught and written; what is asked for wrongly is one line, and nothing is written."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from decoders import COMMON, SPARSE, as_stream, decoder, retrofitted
from safetensors.torch import load_file, save_file

import rnn_longctx
from rnn_longctx import cli
from rnn_longctx.errors import InputError
from rnn_longctx.measure.heads import Lens, reach_of_heads
from rnn_longctx.models.adopt.adopting import load_any
from rnn_longctx.models.retrofit.files import load_retrofitted, save_retrofitted
from rnn_longctx.models.retrofit.plan import plan_of
from rnn_longctx.models.retrofit.pooled import in_blocks, pooled, softmax_weights, watched
from rnn_longctx.train.distill import gate_loss, hidden_loss, losses_of
from rnn_longctx.train.retrofit import RetrofitConfig, retrofit, spared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder on disk, as transformers writes it."""
    path = tmp_path_factory.mktemp("decoders") / "small"
    decoder("qwen3").float().save_pretrained(path)
    return path


def tokens(rows=2, length=45):
    return torch.randint(0, 256, (rows, length))


def rng():
    return np.random.default_rng(0)


# --- what is learned


def test_the_gate_learns_the_teacher_s_weights_block_by_block():
    model, ids = decoder("llama"), tokens()
    lm, teacher = retrofitted(model, SPARSE, "1", "0,2"), as_stream(model)
    with torch.no_grad(), watched([teacher.attentions[1]]) as seen:
        teacher(ids)
    ours, theirs, inputs, queries = lm.attentions[1], teacher.attentions[1], seen[0], slice(13, 41)
    part = ours.parts[0]
    loss = gate_loss(part, ours, theirs, inputs, queries)
    weights = in_blocks(softmax_weights(theirs, inputs, slice(0, 45)), 4)[:, [0, 2]]  # (B, H, T, M)
    q, k, _ = (x for x in _projected(ours, inputs.u))
    keys = k.unflatten(1, (-1, 4)) if k.shape[1] % 4 == 0 else k[:, :44].unflatten(1, (-1, 4))  # (B, M, 4, K, D)
    pool = torch.einsum("bmckd,kd->bmck", keys, part.pool) / math.sqrt(8)
    summary = torch.einsum("bmck,bmckd,kdg->bmkg", pool.softmax(2), keys, part.gate_key)
    scores = torch.einsum("bthd,hdg,bmhg->bhtm", q[:, :, [0, 2]], part.gate_query, summary[:, :, [0, 1]]) / 2
    total, weight = torch.zeros(()).double(), torch.zeros(()).double()
    for t in range(13, 41):
        choices = list(range(1, t // 4 - 1))  # no sink, and not in the window of two blocks
        if choices:
            target, mine = weights[:, :, t, choices], scores[:, :, t, choices].log_softmax(-1)
            share = target.sum(-1)
            p = target / share[..., None]
            total += (share * (p * (p.log() - mine)).sum(-1)).sum()
            weight += share.sum()
    torch.testing.assert_close(loss, total / weight)
    loss.backward()
    assert part.gate_query.grad.abs().sum() > 0 and part.pool.grad.abs().sum() > 0


def _projected(attention, u):
    from rnn_longctx.models.retrofit.attention import project

    return project(attention, u)


def test_losses_are_none_where_nothing_is_different_and_those_of_their_formulas_elsewhere():
    model, ids = decoder("llama"), tokens()
    teacher = as_stream(model)
    same = retrofitted(model, "longnet:segments=128,dilations=1")
    losses = losses_of(same, teacher, ids, ("gate", "hidden", "logits", "lm"), rng())
    assert list(losses) == ["hidden", "logits", "lm"] and losses["hidden"] < 1e-20 and losses["logits"].abs() < 1e-6
    other = retrofitted(model, "mamba2", "0,2")
    losses = losses_of(other, teacher, ids, ("hidden", "logits", "lm"), rng())
    with torch.no_grad(), watched(teacher.attentions) as seen:
        a, b = (lm.model(ids[:, :-1]).logits.float() for lm in (other, teacher))
        teacher(ids[:, :-1])
    expected = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True) / 88
    torch.testing.assert_close(losses["logits"].float(), expected, rtol=1e-4, atol=1e-6)
    expected = F.cross_entropy(a.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(losses["lm"].float(), expected, rtol=1e-4, atol=1e-6)
    own = [hidden_loss(other.attentions[i], seen[i]) for i in (0, 2)]
    torch.testing.assert_close(losses["hidden"], torch.stack(own).mean())
    assert own[0] > 0.01


@pytest.mark.parametrize("trains", ["new", "attention", "all"])
def test_what_is_not_trained_stays_bit_for_bit(trains, folder, tmp_path):
    config = RetrofitConfig(
        **{"model": str(folder), "mixer": SPARSE, "out": str(tmp_path / "out"), "layers": "1", "tokenizer": "bytes"},
        **{"distill": True, "text": ("builtin",), "stages": (32, 64), "steps": 2, "batch": 128, "trains": trains},
    )
    lines: list[str] = []
    retrofit(config, lines.append)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_layer = {name for name in before if ".layers.1.self_attn." in name}
    assert moved == {"new": set(), "attention": of_layer, "all": set(before)}[trains] or (
        trains == "all" and moved > of_layer
    )
    new = retrofitted(hf.AutoModelForCausalLM.from_pretrained(folder), SPARSE, "1")
    fresh = {n for n, _ in new.model.named_parameters() if ".parts." in n}
    assert set(load_file(tmp_path / "out" / "retrofit.safetensors")) == fresh
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    assert [row["length"] for row in rows] == ["32", "32", "64", "64"] and all(float(row["hidden"]) > 0 for row in rows)
    reach = list(csv.DictReader((tmp_path / "out" / "reach.csv").open()))
    assert len(reach) == 2 * 3 * 4 and {row["when"] for row in reach} == {"before", "after"}
    assert any("held-out loss" in line and line.startswith("at 64") for line in lines)


def test_it_is_the_same_for_the_same_seed_and_learns(folder, tmp_path):
    def made(name, steps):
        config = RetrofitConfig(
            **{"model": str(folder), "mixer": SPARSE, "out": str(tmp_path / name), "tokenizer": "bytes"},
            **{"distill": True, "text": ("builtin",), "stages": (64,), "steps": steps, "batch": 192, "lr": 3e-2},
        )
        return retrofit(config, lambda line: None)

    first, again = made("a", 6), made("b", 6)
    assert first.model.weights_hash == again.model.weights_hash
    gates = [float(row["gate"]) for row in csv.DictReader((tmp_path / "a" / "log.csv").open())]
    assert np.mean(gates[-2:]) < np.mean(gates[:2])


TAUGHT = {"distill": True, "text": ("builtin",), "stages": (32,), "steps": 1, "batch": 64, "tokenizer": "bytes"}
LONGNET = "longnet:segments=8/128,dilations=1/4"


@pytest.mark.parametrize(
    ("mixer", "arguments", "words"),
    [
        (LONGNET, {"losses": ("gate",)}, "--losses gate moves no weight"),
        ("mamba2", {"losses": ("gate",)}, "--losses gate moves no weight"),
        (SPARSE, {"losses": ("gate",), "stages": (8, 32)}, "at 8 tokens"),
        (SPARSE, {"losses": ("logits", "hidden"), "trains": "new"}, "--losses logits,hidden moves no weight"),
        (SPARSE, {"distill": False, "trains": "new"}, "--losses lm moves no weight of --trains new"),
        (LONGNET, {"trains": "new"}, "has no new weights"),
        (SPARSE, {"full_above": 0.0}, "--full-above 0: nothing is left to replace"),
    ],
)
def test_what_teaches_nothing_is_refused_before_it_is_trained(mixer, arguments, words, folder, tmp_path):
    config = RetrofitConfig(str(folder), mixer, str(tmp_path / "out"), **(TAUGHT | arguments))
    lines: list[str] = []
    with pytest.raises(InputError, match=words) as error:
        retrofit(config, lines.append)
    assert "\n" not in str(error.value) and not lines and not any(tmp_path.iterdir())


def test_a_gate_alone_learns_wherever_some_queries_have_blocks_to_choose_from(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rnn_longctx.train.distill.GATE_QUERIES", 4)  # of 13, of which the last alone may choose
    config = RetrofitConfig(
        str(folder), SPARSE, str(tmp_path / "out"), **TAUGHT | {"losses": ("gate",), "stages": (13,), "steps": 40}
    )
    done = retrofit(config, lambda line: None)
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    assert 0 < sum(bool(row.get("gate")) for row in rows) < len(rows) == 40 and done.model.train_length == 13


def test_what_is_said_to_be_trained_was(folder, tmp_path, monkeypatch):
    def written(name, **arguments):
        lines: list[str] = []
        retrofit(RetrofitConfig(str(folder), SPARSE, str(tmp_path / name), **TAUGHT | arguments), lines.append)
        about = json.loads((tmp_path / name / "retrofit.json").read_text())
        return about["train_length"], about["provenance"]["distilled"], "nothing is trained" in lines

    assert written("taught") == (32, True, False)
    assert written("none", steps=0) == (None, False, True)
    assert written("unread", text=(), distill=False) == (None, False, True)
    assert written("by-text", distill=False) == (32, False, False)
    assert written("by-text-beside-a-teacher", losses=("lm",)) == (32, False, False)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(math.nan))
    assert written("broken") == (None, False, True)


def test_what_the_original_says_and_what_another_teacher_says_are_told_apart(folder, tmp_path):
    decoder("qwen3").float().save_pretrained(tmp_path / "other")

    def measured(name, model=folder, **arguments):
        lines: list[str] = []
        config = RetrofitConfig(str(model), SPARSE, str(tmp_path / name), **TAUGHT | arguments)
        return retrofit(config, lines.append).measured[32], lines[-1]

    row, line = measured("alone", distill=False)
    assert row.keys() == {"loss", "loss_of_original"} and "the original's" in line and "teacher" not in line
    row, line = measured("taught", teacher=str(tmp_path / "other"))
    assert f"the original's {row['loss_of_original']:.4f}" in line
    assert f"the teacher's {row['loss_of_teacher']:.4f}" in line
    turned, _ = measured("turned", model=tmp_path / "other", teacher=str(folder))
    assert (turned["loss_of_original"], turned["loss_of_teacher"]) == (row["loss_of_teacher"], row["loss_of_original"])


# --- how far heads read


def test_block_by_block_what_reads_everything_reads_as_the_teacher_does():
    model, ids = decoder("qwen3"), tokens(2, 42)
    lm = retrofitted(model, "block-sparse:block=4,window=8,top=100", "0", "0,2,3")
    with torch.no_grad(), watched(lm.attentions[:1]) as seen:
        lm(ids)
        ours = torch.cat([weights for _, weights in pooled(lm.attentions[0], seen[0], 4)], 2)
        theirs = torch.cat([weights for _, weights in pooled(model.model.layers[0].self_attn, seen[0], 4)], 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_reach_is_counted_token_by_token():
    model, ids = decoder("llama"), tokens(1, 40)
    lm, lens = as_stream(model), Lens(block=4, window=8, sinks=1, top=2)
    found = reach_of_heads(lm, [ids], lens)
    with torch.no_grad(), watched(lm.attentions) as seen:
        lm(ids)
        weights = in_blocks(softmax_weights(lm.attentions[2], seen[2], slice(20, 40)), 4)[0, 3]  # (20, 10)
    sink = beyond = missed = distance = 0.0
    for t in range(20, 40):
        w, own = weights[t - 20], t // 4
        far = w[1 : own - 1]
        sink += float(w[0]) / 20
        beyond += float(far.sum()) / 20
        missed += float(far.sort().values[:-2].sum()) / 20
        back = (own - torch.arange(own + 1)) * 4
        distance += float((w[1 : own + 1] * back[1:]).sum() / w[1 : own + 1].sum()) / 20
    last = found[-1]
    assert (last.layer, last.head) == (2, 3)
    expected = (sink, beyond, missed, distance)
    assert (last.sink, last.beyond, last.missed, last.distance) == pytest.approx(expected, rel=1e-6)
    plan = plan_of(model, SPARSE, "1,2")
    stays = max(r.missed for r in found if r.layer == 1)
    left = spared(plan, found, stays * 0.999)  # (another head may lie as near)
    assert set(left.layers[1][0][1]) == {r.head for r in found if r.layer == 1 and r.missed <= stays * 0.999}
    assert spared(plan, found, -1.0).layers == {}


# --- folders


def test_it_is_saved_and_loaded_and_the_command_evaluates_it(folder, tmp_path, capsys, run):
    out = tmp_path / "sparse"
    model = str(folder)
    assert run(["retrofit", model, "--tokenizer", "bytes", "--mixer", SPARSE, "--heads", "0,1", "--out", str(out)]) == 0
    lm, ids = rnn_longctx.load(out), tokens()
    assert [a.mixers[0] for a in lm.retrofitted] == [(SPARSE, (0, 1))] * 3
    expected = retrofitted(hf.AutoModelForCausalLM.from_pretrained(folder), SPARSE, "all", "0,1")
    expected.model.load_state_dict(lm.model.state_dict())
    assert torch.equal(lm(ids), expected(ids)) and lm.weights_hash == load_any(out).weights_hash
    assert run(["generate", str(out), "--prompt", "abc", "--max-new-tokens", "3"]) == 0
    arguments = ["--lengths", "64", "--task", "lm:tokens=256", "--out", str(tmp_path / "eval")]
    assert run(["eval", str(out), *arguments]) == 0
    assert run(["eval", model, "--tokenizer", "bytes", *arguments[:-1], str(tmp_path / "eval2")]) == 0
    capsys.readouterr()


def test_tables_are_in_the_folder_before_it_is_there(folder, tmp_path, monkeypatch):
    seen = {}

    def replace(aside, path):
        seen.update({file.name: file.read_bytes() for file in aside.iterdir()})
        raise OSError("the disk is gone")

    monkeypatch.setattr("rnn_longctx.models.retrofit.files.os.replace", replace)
    with pytest.raises(InputError, match=r"cannot write .*: the disk is gone"):
        retrofit(RetrofitConfig(str(folder), SPARSE, str(tmp_path / "runs/out"), **TAUGHT), lambda line: None)
    assert {"reach.csv", "log.csv", "retrofit.json"} < seen.keys() and seen["log.csv"].startswith(b"step,length,gate")
    assert not any((tmp_path / "runs").iterdir())


def test_where_no_folder_can_be_made_is_found_before_anything_is_read(folder, tmp_path, monkeypatch):
    (tmp_path / "tiny.txt").write_text("no folder")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("rnn_longctx.train.retrofit.load_retrofitted", None)
    for out, words in (
        (tmp_path / "tiny.txt" / "x", "cannot write .*x: Not a directory"),
        (tmp_path / "tiny.txt" / "x" / "y", "cannot write .*y: Not a directory"),
        (tmp_path / ("x" * 250), "cannot write .*: File name too long"),
        (tmp_path / "broken", "exists already"),
        (tmp_path / "nowhere" / "..", "exists already"),
    ):
        with pytest.raises(InputError, match=words):
            retrofit(RetrofitConfig(str(folder), SPARSE, str(out), **TAUGHT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "tiny.txt"]


def test_a_folder_that_is_damaged_is_one_line(folder, tmp_path):
    lm = as_stream(hf.AutoModelForCausalLM.from_pretrained(folder))
    plan = plan_of(lm.model, SPARSE, "0")
    out = tmp_path / "kept"
    save_retrofitted(retrofitted(lm.model, SPARSE, "0"), plan, out)
    with pytest.raises(InputError, match="exists already"):
        save_retrofitted(lm, plan, out)
    stored = load_file(out / "retrofit.safetensors")
    name = min(stored)
    for change, words in (
        ({k: v for k, v in stored.items() if k != name}, f"1 weight, {name}"),
        (stored | {name: stored[name][:1].clone()}, "has shape"),
        (stored | {name: stored[name] * math.nan}, "not finite"),
    ):
        save_file(change, out / "retrofit.safetensors")
        with pytest.raises(InputError, match=words):
            load_retrofitted(out)
    about = json.loads((out / "retrofit.json").read_text())
    for layers, words in (
        ({"9": about["layers"]["0"]}, "no layer 9"),
        ({"0": [{"mixer": SPARSE, "heads": [4]}]}, "no head 4"),
        ({"0": [{"mixer": "block-sprase", "heads": [0]}]}, "did you mean"),
        ({"0": [{"mixer": SPARSE, "heads": [0, 0]}]}, "each head"),
        ([1], "expected the mixers"),
    ):
        (out / "retrofit.json").write_text(json.dumps(about | {"layers": layers}))
        with pytest.raises(InputError, match=words) as error:
            load_retrofitted(out)
        assert "\n" not in str(error.value)


@pytest.fixture
def run(monkeypatch):
    """Run the command line, and return its exit code."""

    def run(arguments):
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "0,7"], "--layers: there is no layer 7: the model has 3 layers"),
        (["--layers", "2-0"], "--layers: expected numbers as in 0,2-5"),
        (["--heads", "4"], "--heads: there is no head 4: the model has 4 heads"),
        (["--heads", "1,1"], "--heads: a head is named twice"),
        (["--mixer", "block-sprase"], 'did you mean "block-sparse"'),
        (["--mixer", "block-sparse:heads=2"], "has no parameter 'heads'"),
        (["--mixer", "block-sparse:window=33"], "a window of a multiple of the block"),
        (["--stages", "2k,1k"], "--stages: each stage is longer than the one before, as in 2k,8k,32k, got 2K,1K"),
        (["--stages", "64,64"], "--stages: each stage is longer"),
        (["--stages", "long"], "--stages: expected lengths"),
        (["--distill"], "--distill: what is the teacher to read"),
        (["--full-above", "0.1"], "--full-above: the reach of heads is measured on a text"),
        (["--text", "builtin", "--losses", "gate"], "--losses: gate compares with a teacher"),
        (["--text", "builtin", "--distill", "--losses", "gates"], "--losses: unknown loss 'gates'"),
        (["--text", "builtin", "--losses", ""], "--losses: unknown loss ''"),
        (["--teacher", "x"], "--teacher: goes with --distill"),
        (["--teacher", "", "--text", "builtin", "--distill"], "--teacher: expected a name, got ''"),
        (["--text", ""], "--text: expected a name, got ''"),
        (["--out", ""], "--out: expected a name, got ''"),
        (["--text", "nowhere.txt", "--distill"], "nowhere.txt"),
        (["--text", "stdlib", "--distill"], "stdlib is the evaluation text"),
        (["--trains", "some"], "trains"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(arguments, words, folder, tmp_path, capsys, run):
    out = tmp_path / "out"
    base = ["retrofit", str(folder), "--tokenizer", "bytes", "--out", str(out)]
    mixer = [] if "--mixer" in arguments else ["--mixer", SPARSE]
    assert run([*base, *mixer, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and not out.exists()


def test_models_that_do_not_fit_are_one_line(folder, tmp_path, capsys, run):
    sizes = COMMON | {"vocab_size": 300}
    hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).save_pretrained(tmp_path / "wide")
    hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON | {"num_hidden_layers": 2})).save_pretrained(tmp_path / "low")
    gpt = hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=256)
    hf.GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "there").mkdir()
    out = tmp_path / "out"
    taught = ["--mixer", SPARSE, "--tokenizer", "bytes", "--distill", "--text", "builtin", "--stages", "64"]
    cases = [
        ([str(folder), "--teacher", str(tmp_path / "wide")], out, "a vocabulary of 300 tokens, and small one of 256"),
        ([str(folder), "--teacher", str(tmp_path / "low")], out, "of another shape than small"),
        ([str(tmp_path / "gpt2")], out, "gpt2 (gpt2) is no decoder whose attention can be replaced (llama,"),
        ([str(folder)], tmp_path / "there", "exists already"),
        ([str(tmp_path / "nowhere")], out, "nowhere"),
    ]
    for arguments, to, words in cases:
        assert run(["retrofit", *arguments, *taught, "--out", str(to)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error
        assert not out.exists() and not any((tmp_path / "there").iterdir())
