"""What users of other tools reported in public, tried here on the library's own models; each test names the report."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import numpy as np
import pytest
import torch

from rnn_longctx import CollapseMonitor, InputError, evaluate, fold, generate, load, load_text, mitigate
from rnn_longctx.data import ByteTokenizer, Text, load_tokenizer
from rnn_longctx.eval.results import Results
from rnn_longctx.mitigations import active, handles_on
from rnn_longctx.models import checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.ssd import fused

LM = "lm:slices=2,tokens=0"
REMEDIES = ["none", "state-norm:every=16", "window:tokens=24", "rri", "reset:every=32", "recompute:last=32", "a-winsor",
            "a-floor", "delta-scale:scale=0.7", "token-filter:theta=0.05", "noise-start:std=0.1", "decimate",
            "chunk-select:chunk=40"]  # fmt: skip


def make():
    torch.set_num_threads(1)
    lm = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).eval()
    lm.train_length, lm.tokenizer, lm.name = 64, ByteTokenizer(), "tiny"
    return lm


@pytest.fixture
def model():
    return make()


@pytest.fixture
def text():
    return Text("made", bytes(torch.randint(32, 127, (9000,)).tolist()))


@pytest.fixture
def ids():
    return torch.randint(32, 127, (1, 150))


def read_by_every_remedy(model, ids, text):
    """What the model says under every remedy, and the tables, states and monitors made of it."""
    found = []
    for name in REMEDIES:
        with mitigate(model, name, target_length=150, text=text):
            found.append(generate(model, ids, 4))
            if model.reader is None:
                found.append(model(ids).detach())
    table = evaluate(model, [128], [LM, "passkey:n=2"], ["none", "reset:every=32"], text=text)
    found.append(table.value.to_numpy())
    monitor = CollapseMonitor.calibrated(model, text)
    with monitor.on(model, action="rollback:state-norm:every=64"):
        found.append(generate(model, ids.repeat(1, 4), 4))
    cache = model.new_cache()
    model(ids[:, :100], cache)
    found += [
        model(ids[:, 100:].expand(2, -1), cache.rows([0, 0])),
        generate(model, [65, 66, 67], 4, temperature=1.0, seed=1),
    ]
    mask = torch.ones(2, 75, dtype=torch.bool, device="cpu")
    mask[0, :4] = False
    found.append(model(ids.view(2, 75), None, mask))
    losses = model.losses(model(ids[:, :-1]), ids[:, 1:])
    found += [losses, *torch.autograd.grad(losses.sum(), model.mixers[0].A_log)]
    return [f.detach() if isinstance(f, torch.Tensor) else torch.tensor(f, device="cpu") for f in found]


def test_another_default_device_changes_nothing(model, ids, text):
    """pytorch/pytorch#62152, huggingface/accelerate#1627: `torch.set_default_device` puts what says no device of its
    own elsewhere. (On "meta" nothing that is read can lie there unnoticed.)"""
    expected = read_by_every_remedy(model, ids, text)
    torch.set_default_device("meta")
    try:
        found = read_by_every_remedy(model, ids, text)
    finally:
        torch.set_default_device(None)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_type_changes_nothing(model, ids, text, dtype, tmp_path):
    """pytorch/ao#2286, rballester/tntorch#4: a table made of Python floats was bfloat16 where that is the default."""
    expected = read_by_every_remedy(model, ids, text)
    checkpoint.save(model, tmp_path / "model")
    torch.set_default_dtype(dtype)
    try:
        again = load(tmp_path / "model")
        assert again.dtype == torch.float32
        found = read_by_every_remedy(again, ids, text)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_for_the_kernels_are_float32_whatever_the_default_is(dtype):
    """The same of what a GPU is given: 0.9999 is 1 in bfloat16, and a head that is to forget would not."""
    mul = tuple(torch.rand(3, dtype=torch.float64).tolist())
    policy = ScanPolicy(
        mul=mul, add=-random.random(), gain=0.9999, min_dt=random.random(), caps=(Cap(random.random()),)
    )
    torch.set_default_dtype(dtype)
    try:
        gates, caps = fused.gate_table(policy, 3, torch.device("cpu")), fused.cap_table(policy, 3, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    rows = [mul, (policy.add,) * 3, (policy.gain,) * 3, (policy.min_dt,) * 3]
    assert torch.equal(gates, torch.tensor(rows, dtype=torch.float32))
    assert torch.equal(caps, torch.tensor([(policy.caps[0].norm,) * 3], dtype=torch.float32))


def test_memory_that_nothing_was_written_to_is_not_read(model, ids, text):
    """Under deterministic algorithms PyTorch fills what `torch.empty` gives with NaN."""
    expected = read_by_every_remedy(model, ids, text)
    torch.use_deterministic_algorithms(True)
    try:
        found = read_by_every_remedy(model, ids, text)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_global_draws_are_the_callers_own(model, text, tmp_path):
    """EleutherAI/lm-evaluation-harness#1412, openai/evals#1809: measuring seeded the process."""

    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (kind, keys.tolist(), *rest)

    checkpoint.save(model, tmp_path / "model")
    before = states()
    model = load(tmp_path / "model")
    evaluate(model, [512], [LM, "passkey:n=2", "words:n=2"], ["none", "noise-start:std=0.1"], text=text)
    generate(model, "abc", 5, temperature=1.0, seed=3)
    with mitigate(model, "state-norm", text=text):
        generate(model, "abc", 5)
    fold(model, "a-winsor")
    assert states() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_evaluation_that_breaks_off_leaves_the_model_as_it_was(model, ids, text, error):
    """NVIDIA/kvpress#244, thu-nics/C2C#20: a patched forward stayed after Ctrl-C, and later results were wrong."""
    expected, calls = model(ids), []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error

    hook = model.backbone.layers[1].mixer.in_proj.register_forward_pre_hook(breaks)
    with pytest.raises(error):
        evaluate(model, [64, 128], [LM], ["rri:alpha=0.5,beta=0.5", "state-norm"], text=text)
    hook.remove()
    assert active(model) == ("none", None) and torch.equal(model(ids), expected)


def test_a_cache_is_whole_after_a_call_that_broke_off(model, ids):
    """sgl-project/sglang#30986: a state that an aborted call had half moved on was read by the next."""
    cache = model.new_cache()
    model(ids[:, :50], cache)
    expected = model(ids[:, 50:], cache.clone())

    def breaks(*_):
        raise MemoryError

    hook = model.backbone.layers[1].mixer.in_proj.register_forward_pre_hook(breaks)
    with pytest.raises(MemoryError):
        model(ids[:, 50:], cache)
    hook.remove()
    assert torch.equal(model(ids[:, 50:], cache), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_remedies(model, ids, copied):
    """huggingface/accelerate#1835: a copy went on calling the model it was copied from."""
    plain = model(ids)
    with mitigate(model, "rri:alpha=0.5,beta=0.5"):
        inside, twin = model(ids), copied(model)
    assert not torch.equal(inside, plain) and torch.equal(model(ids), plain)
    assert torch.equal(twin(ids), inside) and active(twin)[0].startswith("rri")
    twin.backbone.norm_f.weight.data.mul_(2)
    for handle in handles_on(twin):
        handle.remove()
    assert torch.equal(twin(ids), 2 * plain) and torch.equal(model(ids), plain)


def test_threads_share_nothing(model, ids):
    """huggingface/transformers#32217: two threads generated with one model. And two models, one of them mitigated."""
    other, wrong = make(), []
    jobs = [(model, "none"), (model, "none"), (other, "rri:alpha=0.5,beta=0.5")]
    expected = []
    for lm, name in jobs:
        with mitigate(lm, name):
            expected.append(generate(lm, ids, 8))

    def run(lm, name, right):
        with mitigate(lm, name):
            wrong.extend(None for _ in range(4) if not torch.equal(generate(lm, ids, 8), right))

    threads = [threading.Thread(target=run, args=(*job, right)) for job, right in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_arrays_in_any_order(model, ids):
    """modelscope/modelscope#525, facebookresearch/InferSent#100: PyTorch takes no negative strides, nor other byte
    orders; a document read from its end has the one, a file of another machine the other."""
    row, said = ids[0].numpy(), generate(model, ids, 5)
    backward = np.ascontiguousarray(row[::-1])[::-1]
    assert backward.strides[0] < 0
    for array in (backward, row.astype(">i4"), row.astype("<u2"), np.stack([row, row], 1)[:, 0]):
        assert torch.equal(generate(model, array, 5), said)
    with pytest.raises(InputError, match="got float64"):
        generate(model, backward.astype(float), 5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-300])
def test_as_cold_as_one_likes(model, ids, temperature):
    """vllm-project/vllm#1623: a tiny temperature took logits to infinity and ended in "probability tensor contains
    inf". Where one logit leads clearly, it is greedy."""
    model.lm_head.weight.data.mul_(1e4)
    assert torch.equal(generate(model, ids, 5, temperature=temperature), generate(model, ids, 5))


def test_a_path_may_begin_at_home(model, ids, text, tmp_path, monkeypatch):
    """OPM/opm-simulators#5063, choosehappy/HistoQC#198: `--out=~/x` reaches a program as it is, as does a config's, and
    made a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    checkpoint.save(model, "~/model")
    again = load("~/model")
    evaluate(again, [64], [LM], text=text, out="~/runs/one")
    assert len(Results.read("~/runs/one")) == len(Results("~/runs/one").rows()) > 0
    cache = again.new_cache()
    hidden = again(ids, cache)
    save_state("~/kept/doc.state", cache, again, "none", 150)
    assert torch.equal(again(ids, load_state("~/kept/doc.state", again)), again(ids, cache))
    monitor = CollapseMonitor.calibrated(again, text)
    monitor.save("~/monitor.json")
    assert CollapseMonitor.load("~/monitor.json", again) == monitor
    with monitor.on(again, log="~/monitor.jsonl"):
        assert torch.equal(again(ids), hidden)
    (tmp_path / "home" / "t.txt").write_bytes(text.data)
    assert load_text("~/t.txt").data == text.data and load_tokenizer("bytes").name == "bytes"
    assert Cache.load("~/kept/doc.state").position.tolist() == [150]
    assert not list((tmp_path / "here").iterdir())
    assert {p.name for p in (tmp_path / "home").iterdir()} >= {"model", "runs", "kept", "monitor.json", "monitor.jsonl"}
