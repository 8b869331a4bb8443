"""Models whose weights accelerate keeps on a CPU or disk and brings in for a forward alone: as if they were there."""

import copy
import random

import pytest
import torch
import transformers as hf
from adopted_families import FAMILIES, random_ids

import rnn_longctx
from rnn_longctx import CollapseMonitor, adopt, fold, mitigate
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.saved_state import load_state, save_state

accelerate = pytest.importorskip("accelerate")
TEXT = Text("made", bytes(torch.randint(32, 120, (9000,), generator=torch.Generator().manual_seed(3)).tolist()))
CPU = torch.device("cpu")


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def on_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def dispatched(model, folder):
    """Every second layer on disk, the head and the embedding too; as of `from_pretrained(device_map=...)`."""
    base = getattr(model, model.base_model_prefix)
    where = {f"{model.base_model_prefix}.{name}": "cpu" for name, _ in base.named_children() if name != "layers"}
    where |= {f"{model.base_model_prefix}.layers.{i}": ("disk", "cpu")[i % 2] for i in range(len(base.layers))}
    embedding = next(name for name in where if "embed" in name)
    return accelerate.dispatch_model(
        model, where | {embedding: "disk", "lm_head": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True
    )


WAYS = [on_disk, on_cpu, dispatched]


@pytest.fixture(
    params=[("mamba2", way) for way in WAYS] + [(family, None) for family in FAMILIES if family != "mamba2"]
)
def pair(request, tmp_path):
    """A model that is there, and the same one offloaded: one family in every way, the others each in one."""
    family, way = request.param
    config = FAMILIES[family]()
    config.vocab_size = 256
    config.tie_word_embeddings = family in ("mamba2", "bamba")
    whole = hf.AutoModelForCausalLM.from_config(config).eval()
    away = (way or random.choice(WAYS))(copy.deepcopy(whole), str(tmp_path / "away"))
    given = {"name": "it", "tokenizer": ByteTokenizer(), "train_length": 32}
    assert any(t.is_meta for t in away.state_dict().values())
    return adopt(whole, **given), adopt(away, **given)


@torch.no_grad()
def test_offloaded_is_as_it_is_whole(pair, tmp_path):
    (whole, away), ids = pair, random_ids(1, 40)
    assert away.device == CPU and away.dtype == torch.float32
    assert away.weights_hash == whole.weights_hash
    for mixer, there in zip(away.mixers, whole.mixers, strict=True):
        for name in ("A", "D"):
            torch.testing.assert_close(getattr(mixer, name, None), getattr(there, name, None), rtol=0, atol=0)
    values = [rnn_longctx.evaluate(m, [64], ["lm:slices=2,tokens=0"], text=TEXT).value.tolist() for m in pair]
    assert values[0] == values[1]
    stepped = whole.mixers[0].one_step_a_head
    remedies = ["state-norm", "delta-scale:scale=1.5"]
    remedies += ["a-winsor:share=0.3", "a-floor:tokens=9", "token-filter"] * stepped
    for remedy in remedies:
        logits = []
        for model in pair:
            with mitigate(model, remedy, target_length=64, text=TEXT):
                logits.append(model.logits(model(ids)))
        assert torch.equal(*logits), remedy
    if stepped:
        assert all(map(torch.equal, *(measure_steps(m, ids) for m in pair)))
    save_state(tmp_path / "s", prefill(away, ids)[1], away)
    assert load_state(tmp_path / "s", whole).position.tolist() == [40]
    monitor = CollapseMonitor.calibrated(whole, TEXT, every=8)
    reports = []
    for model in pair:
        with monitor.on(model, lambda report: None) as watch:
            prefill(model, ids)
        reports.append(watch.reports)
    assert reports[0] == reports[1] and len(reports[0]) == 5


@torch.no_grad()
def test_offloaded_numbers_that_change_are_told(tmp_path):
    model = hf.AutoModelForCausalLM.from_config(FAMILIES["mamba2"]()).eval()
    away = adopt(on_cpu(model, None))
    first, held = away.weights_hash, away.mixers[0].module._hf_hook.weights_map["A_log"]
    held.mul_(2)
    assert away.weights_hash != first and torch.equal(away.mixers[0].A, -held.exp())


@torch.no_grad()
def test_what_cannot_be_read_is_refused_in_a_line():
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(FAMILIES["mamba2"]())
    for ask in (lambda: adopt(empty).weights_hash, lambda: mitigate(empty, "a-winsor")):
        with pytest.raises(InputError, match=r"is nowhere \(device meta\)"):
            ask()
    demo = rnn_longctx.load("demo")
    accelerate.cpu_offload(demo, execution_device=CPU)
    for ask in (lambda: rnn_longctx.evaluate(demo, [512]), lambda: rnn_longctx.generate(demo, "a", 2),
                lambda: mitigate(demo, "a-winsor"), lambda: fold(demo, "a-winsor"),
                lambda: fold(demo, "a-scale:scale=2")):  # fmt: skip
        with pytest.raises(InputError, match="are offloaded"):
            ask()
