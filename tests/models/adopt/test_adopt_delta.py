"""Gated DeltaNet and KDA mixers of transformers: held to the delta rule's definition, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from adopted_families import COMMON, DELTA_FAMILIES, KIMI, NEAR, VOCAB, own_logits, put, random_ids, streamed
from torch import Tensor

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, fold, mitigate
from rnn_longctx.models.adopt.adopting import adopt, load_any
from rnn_longctx.recurrence.delta import reference
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

EXACT = {
    "rri": ScanPolicy(add=-0.05, gain=0.75),
    "delta-scale": ScanPolicy(mul=0.6),
    "capped every token": ScanPolicy(caps=(Cap((0.6, 0.9, 1.2, 50.0)),)),
    "capped every 64": ScanPolicy(caps=(Cap(0.5, 64),)),
    "reset": ScanPolicy(reset=50),
}
TEXT = Text("made", bytes(torch.randint(32, VOCAB, (4000,)).tolist()))


@pytest.fixture(params=DELTA_FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def read_by_first(model, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What the first mixer hands to the library's function, and the outputs (B, T, H, V) that its norm reads."""
    mixer, given, outputs = adopt(model).mixers[0], {}, []
    name = next(iter(mixer.functions()))
    function, first = mixer.names[name], mixer.module

    def spy(query, key, value, **named):
        if not given:
            given.update(query=query, key=key, value=value, g=named["g"], beta=named["beta"])
        return function(query, key, value, **named)

    norm = getattr(first, "norm", None) or first.o_norm
    hook = norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    mixer.names[name] = spy
    try:
        model(ids, use_cache=False)
    finally:
        hook.remove()
        mixer.names[name] = function
    return given, outputs[0].reshape(*ids.shape, mixer.heads, mixer.headdim)


@torch.no_grad()
@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
def test_a_layer_under_a_policy_is_the_definition(model, policy):
    """On what the library's own forward gives the layer, in float64; outputs, states and sums of log-decays."""
    adopted, ids = adopt(model), random_ids(2, 140)
    given, plain = read_by_first(model, ids)
    q, k, v = (given[name].double() for name in ("query", "key", "value"))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    inputs = ScanInputs(v, k, q * k.shape[-1] ** -0.5)
    gates = DeltaGates(given["g"].double(), given["beta"].double())
    torch.testing.assert_close(reference.scan(inputs, gates)[0].float(), plain, rtol=1e-4, atol=1e-5)
    y, state, total = reference.scan(inputs, gates, policy=policy)
    assert (y.float() - plain).abs().max() > 1e-3
    put(adopted, policy)
    found = read_by_first(model, ids)[1]
    torch.testing.assert_close(found, y.float(), rtol=1e-4, atol=1e-5)
    cache = adopted.new_cache()
    for part in ids.split([70, 1, 64, 5], 1):
        adopted(part, cache)
    scan = cache.layers[0].scan
    torch.testing.assert_close(scan.state, state.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scan.log_decay, total, rtol=1e-4, atol=1e-4)


def test_what_does_not_apply_is_one_line(model, family):
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=16, name="small")
    refused = {
        "window:tokens=8": "no sliding window",
        "a-floor:tokens=9": "reads one step a head",
        "a-winsor:share=0.3": "needs one A a head",
        "token-filter": "reads one step a head",
        "decimate": "one step a head|drops tokens between layers",
    }
    if adopted.mixers[0].bounded:
        refused["a-scale:scale=1.5"] = "sigmoid with a lower bound, so that a factor on A is none on a log-decay"
    for remedy, why in refused.items():
        with pytest.raises(NotApplicable, match=why) as error:
            mitigate(adopted, remedy, target_length=64, text=TEXT)
        assert "\n" not in str(error.value)
    why = "bounds its log-decays by a sigmoid, so" if adopted.mixers[0].bounded else "are another library's"
    for each in (model, adopted):
        with pytest.raises(InputError, match=f"a-scale:.* cannot be folded into weights: .*{why}") as error:
            fold(each, "a-scale:scale=1.5")
        assert "\n" not in str(error.value)
    assert all(mixer.policy == ScanPolicy() for mixer in adopted.mixers)


def test_what_remedies_scale(model):
    """A step makes the decay alone: beta, by which a delta rule writes and erases, hangs on no step."""
    adopted = adopt(model)
    with mitigate(model, "delta-scale:scale=0.7"):
        assert [mixer.policy for mixer in adopted.mixers] == [ScanPolicy(mul=0.7)] * 2
    if not adopted.mixers[0].bounded:
        with mitigate(model, "a-scale:scale=1.5"):
            assert [mixer.policy for mixer in adopted.mixers] == [ScanPolicy(mul=1.5)] * 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_documents_packed_into_a_row(model, monkeypatch):
    """With a convolution that keeps them apart, as causal-conv1d's does, each is read as a row of its own."""
    adopted, ids, lengths = adopt(model), random_ids(1, 30), [9, 1, 20]
    mixer = adopted.mixers[0]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    edges = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    convolve = mixer.names["causal_conv1d_fn"]

    def apart(hidden_states, *args, seq_idx=None, **named):
        if seq_idx is None:
            return convolve(hidden_states, *args, **named)
        pieces = hidden_states.split(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist(), -1)
        return torch.cat([convolve(piece, *args, **named) for piece in pieces], -1)

    monkeypatch.setitem(mixer.names, "causal_conv1d_fn", apart)
    put(adopted, ScanPolicy(gain=0.8, caps=(Cap(0.7, 4),)))
    u = torch.randn(1, 30, COMMON["hidden_size"])
    whole = mixer.module(u, cu_seq_lens_q=edges, seq_idx=seq_idx)
    torch.testing.assert_close(whole, torch.cat([mixer.module(d) for d in u.split(lengths, 1)], 1), **NEAR)
    with pytest.raises(InputError, match="packed sequences need seq_idx"):
        mixer.module(u, cu_seq_lens_q=edges)
    reset = torch.zeros(1, 30, dtype=torch.bool)
    reset[0, [0, 9, 10]] = True
    apart_again = torch.cat([adopted(d) for d in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(adopted(ids, reset=reset), apart_again, **NEAR)


@pytest.mark.parametrize("config", ["Qwen3NextConfig", "Qwen3_5TextConfig", "OlmoHybridConfig", "KimiLinearConfig"])
def test_published_shapes_are_worked_out_without_memory(config):
    if not hasattr(hf, config):
        pytest.skip(f"this transformers has no {config}")
    with torch.device("meta"):
        adopted = adopt(hf.AutoModelForCausalLM.from_config(getattr(hf, config)()))
    c, size = adopted.config, adopted.state_size()
    layers = c.layer_types.count("linear_attention")
    if config == "KimiLinearConfig":
        heads, values, keys, attention = c.linear_num_heads, c.linear_head_dim, c.linear_head_dim, 512 + 64
    else:
        heads, values, keys = c.linear_num_value_heads, c.linear_value_head_dim, c.linear_key_head_dim
        attention = 2 * c.num_key_value_heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    assert len(adopted.mixers) == layers and {m.shape for m in adopted.mixers} == {(heads, values, keys)}
    assert size.fixed["scan"] == layers * heads * values * keys
    assert size.per_token == (len(c.layer_types) - layers) * attention


def test_models_without_a_recurrence_and_broken_checkpoints(build, tmp_path):
    config = DELTA_FAMILIES["qwen3_next"]()
    config.layer_types = ["full_attention"] * 3
    with pytest.raises(InputError, match=r"^Qwen3NextForCausalLM has no recurrence .*; adopted .*qwen3_next, "):
        adopt(hf.AutoModelForCausalLM.from_config(config))
    model = build("qwen3_5", 256)
    lacking = {name: t for name, t in model.state_dict().items() if not name.endswith("0.linear_attn.A_log")}
    model.save_pretrained(tmp_path, state_dict=lacking)
    with pytest.raises(InputError, match=r"lacks 1 weight, .*linear_attn\.A_log"):
        load_any(tmp_path, tokenizer="bytes")
    fewer = dict(model.state_dict())
    for name in fewer:
        if name.endswith(("linear_attn.A_log", "linear_attn.dt_bias")):
            fewer[name] = fewer[name][:3].clone()
    model.save_pretrained(tmp_path, state_dict=fewer)
    fewer_heads = r"layers\.0\.linear_attn\.A_log has shape \(3,\), config\.json expects \(4,\)$"
    with pytest.raises(InputError, match=fewer_heads) as error:
        load_any(tmp_path, tokenizer="bytes")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["qwen3_5", "kimi_linear"])
def test_a_checkpoint_is_evaluated_probed_and_told_apart(build, family, tmp_path):
    """What fails beyond the training length, attention or the recurrence, is asked of these hybrids by itself."""
    build(family, 256).save_pretrained(tmp_path / "kept")
    model = load_any(tmp_path / "kept", tokenizer="bytes", train_length=32)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.data)
    given = {"tasks": ["lm:slices=2,tokens=0"], "text": str(path)}
    frame = rnn_longctx.evaluate(model, [32, 96], mitigations=["none", "state-norm"], **given)
    alone = {"attention-window:tokens=32", "reset-recurrence:every=32"}
    assert set(frame.mitigation) == {"none", "state-norm", *alone}
    assert frame.value.notna().all()
    beyond = frame[frame.length == 96].groupby("mitigation").value.mean()
    assert beyond[["none", *alone]].nunique() == 3


LATENT = {"q_lora_rank": 8, "qk_rope_head_dim": 0, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}  # GLM's


@torch.no_grad()
@pytest.mark.skipif(not hasattr(hf, "Glm5NextTextConfig"), reason="this transformers has no Glm5Next")
def test_glm_s_text_model():
    """Its attention keeps an indexer's keys beside its own: its cache is gone on from, and not taken apart."""
    model = hf.Glm5NextTextModel(hf.Glm5NextTextConfig(**COMMON, **KIMI | LATENT)).eval()
    adopted, ids = adopt(model), random_ids(2, 20)
    assert [m.shape for m in adopted.mixers] == [(4, 8, 8)] * 2 and all(m.bounded for m in adopted.mixers)
    before = own_logits(model, ids)
    with mitigate(model, "rri:alpha=0.7,beta=0.5"):
        whole = own_logits(model, ids)
        assert (whole - before).abs().max() > 1e-5
        cache = adopted.new_cache()
        parts = [adopted(part, cache) for part in ids.split([7, 1, 9, 1, 2], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)
        with pytest.raises(InputError, match="can be gone on from, not taken apart"):
            cache.crop_attention(4)
    assert torch.equal(own_logits(model, ids), before)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(hf, "Glm5NextConfig"), reason="this transformers has no Glm5Next")
def test_glm_s_checkpoint_is_read_as_text(tmp_path):
    text = hf.Glm5NextTextConfig(**COMMON | {"vocab_size": 256}, **KIMI | LATENT).to_dict()
    sees = {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 32}
    theirs = hf.Glm5NextForConditionalGeneration(hf.Glm5NextConfig(text_config=text, vision_config=sees)).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = load_any(tmp_path, tokenizer="bytes"), random_ids(2, 20)
    assert len(ours.mixers) == 2
    torch.testing.assert_close(streamed(ours, ids, [7, 1, 12])[0], theirs(input_ids=ids).logits, **NEAR)
