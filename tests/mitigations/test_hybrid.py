"""The controls of hybrids against attention under a banded mask, and against states dropped by hand."""

import logging

import pytest
import torch
import transformers as hf
from torch import nn

from rnn_longctx import adopt, evaluate, mitigate
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, diagnostics, parse_remedy
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.saved_state import load_state, save_state

SHAPE = {
    "hidden_size": 32,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "eos_token_id": None,
}
CONFIGS = {
    "bamba": lambda: hf.BambaConfig(**SHAPE, num_hidden_layers=3, attn_layer_indices=[1]),
    "falcon_h1": lambda: hf.FalconH1Config(**SHAPE, mamba_d_ssm=64, num_hidden_layers=2, mamba_rms_norm=False),
}
NEAR = {"rtol": 0, "atol": 1e-4}


def build(config):
    theirs = hf.AutoModelForCausalLM.from_config(config).eval()
    for module in theirs.modules():
        if isinstance(module, nn.Linear):  # so that every layer matters
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    model = adopt(theirs, tokenizer=ByteTokenizer(), train_length=12, name="small")
    model.tokenizer.eos_id = None  # so that answers go on
    for mixer in model.mixers:
        mixer.module.A_log.data.uniform_(-4, 0)
        mixer.module.dt_bias.data.uniform_(-2, 1)
    theirs.get_input_embeddings().weight.data.normal_()
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return build(CONFIGS[request.param]())


@torch.no_grad()
def logits(model, ids, cuts=None):
    cache = model.new_cache()
    return torch.cat([model.logits(model(piece, cache)) for piece in ids.split(cuts or ids.shape[1], 1)], 1)


@torch.no_grad()
def test_attention_sees_a_band(model, tmp_path):
    """Of the keys, those from half a window before the query's half window on; the recurrence sees all."""
    ids, at = torch.randint(1, 256, (2, 41)), torch.arange(41)
    seen = (at <= at[:, None]) & (at >= at[:, None] // 4 * 4 - 4)
    assert seen.sum(1).max() == 8 and seen.sum(1)[4:].min() == 5
    band = torch.zeros(2, 1, 41, 41).masked_fill(~seen, torch.finfo(torch.float32).min)
    masks = {"full_attention": band, "linear_attention": None}
    expected = model.model(ids, attention_mask=masks, use_cache=False).logits
    plain = logits(model, ids)
    assert (expected - plain)[:, 8:].abs().max() > 1e-3 and torch.allclose(expected[:, :8], plain[:, :8], atol=1e-4)
    with mitigate(model, "attention-window:tokens=8"):
        for cuts in (None, 9, [3, 1, 20, 1, 1, 15]):
            torch.testing.assert_close(logits(model, ids, cuts), expected, **NEAR)
        answer, (_, cache) = generate(model, ids[:, :30], 4), prefill(model, ids[:, :30])
        kept = [layer.keys.shape[2] for layer in cache.library.layers if hasattr(layer, "keys")]
        assert kept and set(kept) == {6}  # 24 to 29
        save_state(tmp_path / "s", prefill(model, ids[:, :17])[1], model, "attention-window")
        assert torch.equal(generate(model, ids[:, 17:30], 4, cache=load_state(tmp_path / "s", model)), answer)
        with pytest.raises(InputError, match="attention cropped every 4 tokens"):
            model(ids, mask=at >= torch.tensor([[3], [0]]))
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)


@torch.no_grad()
def test_padding_stays_hidden_where_columns_were_dropped(model):
    ids, padding, outputs = torch.randint(1, 256, (2, 40)), torch.zeros(2, 3, dtype=torch.int64), []
    for before in (padding, padding[:, :0]):
        cache, mask = model.new_cache(), torch.arange(before.shape[1] + 10).expand(2, -1) >= before.shape[1]
        model(torch.cat([before, ids[:, :10]], 1), cache, mask)
        with mitigate(model, "attention-window:tokens=8"):
            outputs.append(
                torch.cat([model.logits(model(piece, cache)) for piece in ids[:, 10:].split([9, 1, 20], 1)], 1)
            )
        assert (cache.seen, cache.dropped) == (40 + before.shape[1], 32 + before.shape[1])
    torch.testing.assert_close(*outputs, **NEAR)


@torch.no_grad()
def test_the_recurrence_begins_again(model):
    ids = torch.randint(1, 256, (2, 41))
    cache, outputs = model.new_cache(), []
    for piece in ids.split(8, 1):
        for mixer in model.mixers if cache.seen else ():
            cache.library.layers[mixer.module.layer_idx].recurrent_states[0].zero_()
        outputs.append(model.logits(model(piece, cache)))
    expected, plain = torch.cat(outputs, 1), logits(model, ids)
    assert (expected - plain)[:, 8:].abs().max() > 1e-3
    with mitigate(model, "reset-recurrence:every=8"):
        for cuts in (None, 9, [3, 1, 20, 1, 1, 15]):
            torch.testing.assert_close(logits(model, ids, cuts), expected, **NEAR)


def test_hybrids_only_and_one_at_a_time(model):
    config = hf.Mamba2Config(
        hidden_size=32, vocab_size=256, num_heads=8, head_dim=8, state_size=16, n_groups=1, num_hidden_layers=1
    )
    pure = adopt(hf.AutoModelForCausalLM.from_config(config), name="pure")
    for remedy in diagnostics(12):
        with pytest.raises(NotApplicable, match="is for hybrids, and pure has no attention"):
            mitigate(pure, remedy)
    with pytest.raises(InputError, match="cannot be combined"):
        parse_remedy("+".join(diagnostics(12)))
    for bad in ("attention-window:tokens=7", "attention-window:tokens=0", "reset-recurrence:every=0"):
        with pytest.raises(InputError, match="must be"):
            parse_remedy(bad)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(NotApplicable, match="scaled by length"):
        mitigate(model, "attention-window:tokens=8")


def test_evaluate_adds_them_where_a_hybrid_is_read_beyond_its_training(tmp_path, caplog):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (4000,)).tolist()))
    model, both = build(CONFIGS["bamba"]()), {"attention-window:tokens=12", "reset-recurrence:every=12"}
    given = {"tasks": ["lm:slices=2,tokens=0"], "text": str(path)}
    assert set(evaluate(model, [12, 48], **given).mitigation) == {"none", *both}
    assert set(evaluate(model, [12], **given).mitigation) == {"none"}
    assert set(evaluate(model, [12, 48], mitigations=["window:tokens=9"], **given).mitigation) == {"window:tokens=9"}
    frame = evaluate(model, [12, 48], mitigations=["none", "reset-recurrence:every=12"], **given)
    assert frame.groupby("mitigation").length.max().to_dict() == {"none": 48} | dict.fromkeys(both, 48)

    given |= {"tasks": ["lm:slices=1,tokens=0", "passkey:n=1"], "mitigations": ["all"]}
    adopt(model, train_length=96)
    with caplog.at_level(logging.WARNING):
        frame = evaluate(model, [96, 160], **given)
    assert set(diagnostics(96)) < set(frame.mitigation) and "chunk-select:chunk=2000" in set(frame.mitigation)
    messages = [record.getMessage() for record in caplog.records if "not applicable" in record.getMessage()]
    assert {message.split()[0].partition(":")[0] for message in messages} == {"decimate", "erase", "lamb", "yarn"}
    assert any(" is not applicable: decimate drops tokens" in message for message in messages)
    with pytest.raises(NotApplicable, match="decimate"):
        evaluate(model, [96, 160], **given | {"mitigations": ["all", "decimate"]})


def test_all_goes_on_without_what_mamba1_has_not(tmp_path, caplog):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (4000,)).tolist()))
    config = hf.MambaConfig(hidden_size=32, vocab_size=256, state_size=4, num_hidden_layers=1, time_step_rank=4)
    model = adopt(hf.AutoModelForCausalLM.from_config(config).eval(), tokenizer=ByteTokenizer(), train_length=96)
    with caplog.at_level(logging.WARNING):
        frame = evaluate(model, [96], ["lm:slices=1,tokens=0", "passkey:n=1"], ["all"], text=str(path))
    lines = [record.getMessage() for record in caplog.records]
    refused = {line.split()[0].partition(":")[0] for line in lines if "is not applicable: " in line}
    assert refused == {
        "a-winsor",
        "a-floor",
        "token-filter",
        "decimate",
        "lamb",
        "erase",
        "yarn",
        "attention-window",
        "reset-recurrence",
    }
    assert {"none", "rri:alpha=0.999,beta=1", "delta-scale:scale=0.7", "state-norm"} < set(frame.mitigation)
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # where no task asks anything, nor has what reads prompts a place
        frame = evaluate(model, [96], ["lm:slices=1,tokens=0"], ["all"], text=str(path))
    assert "state-norm" in set(frame.mitigation) and "chunk-select:chunk=2000" not in set(frame.mitigation)
    assert any("chunk-select:chunk=2000 reads prompts, and has no loss" in line for line in caplog.messages)
    with pytest.raises(NotApplicable, match="chunk-select:chunk=2000 reads prompts"):
        evaluate(model, [96], ["lm:slices=1,tokens=0"], ["chunk-select"], text=str(path))
