"""Adapters of peft: in the layers they are read as their own forward, before the text they are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from adopted_families import NEAR, RRI, own_logits, random_ids, read_as_its_own, streamed
from torch import nn

from rnn_longctx import CollapseMonitor, evaluate
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.mitigations import handles_on, mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.generate import generate, prefill

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("eager")


@torch.no_grad()
def tuned(model):
    """Adapters that do something."""
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
            p.normal_(0, 0.2)
        elif "ia3_" in name:
            p.normal_(1, 0.3)
    return model.eval()


def lora(model, **settings):
    settings = {"target_modules": ["in_proj"]} | settings
    return tuned(peft.get_peft_model(model, peft.LoraConfig(**settings)))


IN_LAYERS = {
    "LoRA": lora,
    "LoRA, a task": lambda m: lora(m, task_type="CAUSAL_LM"),
    "LoRA, more layers": lambda m: lora(m, target_modules=["in_proj", "x_proj", "q_proj", "lm_head"]),
    "LoRA, embedding": lambda m: lora(m, target_modules=["in_proj", "embeddings", "embed_tokens"]),
    "LoRA, tokens": lambda m: lora(m, trainable_token_indices=[3, 4, 5, 6, 7]),
    "LoRA, kept modules": lambda m: lora(m, modules_to_save=["lm_head", "embeddings", "embed_tokens", "norm"]),
    "DoRA": lambda m: lora(m, use_dora=True),
    "IA3": lambda m: tuned(peft.get_peft_model(m, peft.IA3Config(target_modules=["in_proj"], feedforward_modules=[]))),
    "AdaLoRA": lambda m: tuned(peft.get_peft_model(m, peft.AdaLoraConfig(target_modules=["in_proj"], total_step=9))),
    "mixed": lambda m: tuned(peft.get_peft_model(m, peft.LoraConfig(target_modules=["in_proj"]), mixed=True)),
    "injected": lambda m: tuned(peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["in_proj"]), m)),
    "tuner": lambda m: lora(m).base_model,
    "compiled": lambda m: torch.compile(lora(m), backend="eager"),
}


@pytest.mark.parametrize("adapt", IN_LAYERS.values(), ids=IN_LAYERS.keys())
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_adapters_in_the_layers_are_read_as_their_own_forward(build, family, adapt):
    model, ids = build(family), random_ids(2, 14)
    before = own_logits(model, ids)
    adapter = adapt(model)
    assert (own_logits(adapter, ids) - before).abs().max() > 1e-4
    read_as_its_own(adapter)


@torch.no_grad()
def test_switched_off_and_over(build):
    model, ids = build("mamba2"), random_ids(2, 14)
    ours, before = adopt(model), own_logits(model, ids)  # adopted first
    adapter = lora(model)
    assert adopt(adapter) is ours
    on = own_logits(adapter, ids)
    torch.testing.assert_close(streamed(ours, ids, [5, 9])[0], on, **NEAR)
    with adapter.disable_adapter():
        torch.testing.assert_close(streamed(ours, ids, [5, 9])[0], before, **NEAR)
    adapter.add_adapter("other", peft.LoraConfig(target_modules=["in_proj"]))
    adapter.set_adapter("other")
    tuned(adapter)
    other = own_logits(adapter, ids)
    assert (other - on).abs().max() > 1e-4
    torch.testing.assert_close(streamed(ours, ids, [5, 9])[0], other, **NEAR)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(streamed(adopt(merged), ids, [5, 9])[0], other, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_all_that_reads_sees_the_adapter(build, family):
    """Everything equals the model into whose weights the adapter was merged."""
    text = Text("made", bytes(np.random.default_rng().integers(97, 123, 6000, dtype=np.uint8)))
    adapter = lora(build(family, 256))
    merged, ids = copy.deepcopy(adapter).merge_and_unload(), random_ids(2, 40)
    for model in (adapter, merged):
        adopt(model, tokenizer=ByteTokenizer(), train_length=24, name="tiny")
    values = [evaluate(m, [24, 48], ["lm:slices=3"], ["none", RRI, "a-floor:tokens=20"], text=text)
              for m in (adapter, merged)]  # fmt: skip
    np.testing.assert_allclose(*(v["value"].to_numpy(float) for v in values), rtol=0, atol=1e-4)
    assert len(values[0]) and values[0]["value"].std() > 0

    caps = []
    for model in (adapter, merged):
        with mitigate(model, "state-norm", text=text):
            caps.append(torch.tensor([mixer.policy.caps[0].norm for mixer in adopt(model).mixers]))
            ends = {"eos_token_id": ByteTokenizer.eos_id, "pad_token_id": ByteTokenizer.eos_id}
            own = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **ends)[:, 40:]
            assert torch.equal(generate(model, ids, 5), own)
    torch.testing.assert_close(*caps, rtol=1e-3, atol=1e-5)
    for one, other in zip(*(measure_steps(adopt(m), ids) for m in (adapter, merged))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    monitors = [CollapseMonitor.calibrated(m, text, every=8) for m in (adapter, merged)]
    for name in ("norms", "gate_mean"):
        torch.testing.assert_close(*(torch.tensor(getattr(m, name)) for m in monitors), rtol=1e-3, atol=1e-4)
    with monitors[0].on(adapter, lambda report: None) as watch:
        adapter.generate(input_ids=ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert [r.position for r in watch.reports] == [8, 16, 24, 32, 40, 48]
    if family == "mamba2":
        first, second = [], []
        for found, model in ((first, adapter), (second, merged)):
            with mitigate(adopt(model), "decimate:base=9"):
                found.append(prefill(adopt(model), ids)[0])
        torch.testing.assert_close(first[0], second[0], **NEAR)


def _prompts(kind, **settings):
    return lambda m: peft.get_peft_model(
        m, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32, **settings)
    )


LAYERS = {"num_layers": 2, "num_attention_heads": 4}
BEFORE_THE_TEXT = {
    "PROMPT_TUNING": _prompts("PromptTuningConfig"),
    "P_TUNING": _prompts("PromptEncoderConfig", **LAYERS),
    "PREFIX_TUNING": _prompts("PrefixTuningConfig", **LAYERS),
}


@pytest.mark.parametrize("kind", BEFORE_THE_TEXT)
def test_virtual_tokens_are_refused(build, kind):
    model = build("mamba2")
    ours, adapter = adopt(model), BEFORE_THE_TEXT[kind](model)  # also where it was adopted before
    for call in (lambda: adopt(adapter), lambda: mitigate(adapter, RRI), lambda: generate(adapter, random_ids(), 2)):
        with pytest.raises(InputError, match=rf"virtual tokens before the text \({kind}\).* MODEL.get_base_model\(\)"):
            call()
    assert not handles_on(model) and adopt(adapter.get_base_model()) is ours


def test_other_adapters_that_do_more_are_refused(build):
    with pytest.raises(InputError, match="aLoRA"):
        adopt(lora(build("mamba2"), task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]))
    with pytest.raises(InputError, match="more than once"):
        adopt(lora(build("mamba2"), target_modules=["lm_head"], modules_to_save=["mixer"]))


@torch.no_grad()
def test_adapters_in_our_own_model(make):
    """What reads weights directly goes through the adapter, or refuses."""
    own, ids = make(tie_embeddings=False), torch.randint(61, (2, 30))
    plain = own.logits(own(ids))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["in_proj", "lm_head"]), own)
    tuned(own)
    merged = make(tie_embeddings=False)
    state = {}
    for name, m in own.named_modules():
        if hasattr(m, "get_delta_weight"):
            state[f"{name}.weight"] = m.base_layer.weight + m.get_delta_weight("default")
    for name, p in own.state_dict().items():
        if "lora_" not in name:
            state.setdefault(name.replace(".base_layer", ""), p)
    merged.load_state_dict(state)
    expected = merged.logits(merged(ids))
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(own.logits(own(ids)), expected, **NEAR)
    with torch.enable_grad():
        torch.testing.assert_close(
            own.losses(own(ids[:, :-1]), ids[:, 1:]), merged.losses(merged(ids[:, :-1]), ids[:, 1:]), **NEAR
        )
    _, cache = prefill(own, ids)
    if not (reason := Decoder.refuses(own, cache)).startswith("needs a CUDA"):
        assert "adapter" in reason
    own.backbone.layers[0].mixer.conv1d = Around(own.backbone.layers[0].mixer.conv1d)
    with pytest.raises(InputError, match="adapter around a convolution"):
        own(ids)


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.weight, self.bias, self.kernel_size = layer, layer.weight, layer.bias, layer.kernel_size


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_an_adapter_that_does_nothing_is_said(build, family):
    """transformers 5.24 multiplies with dt_proj's weight past the adapter on it (findings/)."""
    model = lora(build(family), target_modules=["dt_proj"])
    with pytest.warns(RuntimeWarning, match=r"dt_proj does nothing, .* until it is merged"):
        adopt(model)
    read_as_its_own(model)
