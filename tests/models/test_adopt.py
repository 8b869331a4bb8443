"""Small random checkpoints of every family, built from its config: under our policies as its own code reads them."""

from __future__ import annotations

import copy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import rnn_longctx
from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, active, mitigate
from rnn_longctx.models import Cache, Mamba2LM, checkpoint
from rnn_longctx.models.adopt import adopt, load_adopted, load_any
from rnn_longctx.models.adopt_transformers import _Call, _scan
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.state import load_state, save_state
from rnn_longctx.probes.envelope import measure_envelope
from rnn_longctx.probes.gates import measure_steps
from rnn_longctx.ssd import PLAIN, Cap, ScanPolicy

VOCAB = 97
COMMON = {"hidden_size": 32, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def _mamba2():
    return hf.Mamba2Config(
        **COMMON, num_heads=8, head_dim=8, state_size=16, n_groups=1, num_hidden_layers=3, chunk_size=8
    )


def _bamba():
    return hf.BambaConfig(**COMMON, **ATTENTION, **MAMBA, num_hidden_layers=3, attn_layer_indices=[1])


def _falcon_h1():
    return hf.FalconH1Config(
        **COMMON, **ATTENTION, **MAMBA, mamba_d_ssm=64, num_hidden_layers=2, lm_head_multiplier=0.5,
        ssm_in_multiplier=1.5, ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 1.1], mamba_rms_norm=False,
    )  # fmt: skip


def _granite():
    return hf.GraniteMoeHybridConfig(
        **COMMON, **ATTENTION, **MAMBA, num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"],
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48, logits_scaling=2.0,
        position_embedding_type="rope",
    )  # fmt: skip


def _nemotron():
    return hf.NemotronHConfig(
        **COMMON, **ATTENTION, head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=1,
        chunk_size=8, layers_block_type=["mamba", "attention", "mlp", "mamba"], mlp_hidden_act="relu2",
    )  # fmt: skip


def _zamba2():
    return hf.Zamba2Config(
        **COMMON, **ATTENTION, num_hidden_layers=3, n_mamba_heads=8, mamba_headdim=8, mamba_d_state=16,
        mamba_ngroups=1, mamba_expand=2, chunk_size=8, hybrid_layer_ids=[1], use_mem_rope=True, time_step_min=1e-3,
        layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, adapter_rank=4,
        attention_head_dim=16,
    )  # fmt: skip


def _mamba():
    return hf.MambaConfig(**COMMON, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4)


def _falcon_mamba():
    return hf.FalconMambaConfig(**COMMON, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4)


def _jamba():
    return hf.JambaConfig(
        **COMMON, **ATTENTION, num_hidden_layers=3, attn_layer_period=3, attn_layer_offset=1, num_experts=1,
        expert_layer_period=9, expert_layer_offset=8, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


FAMILIES = {
    "mamba2": _mamba2, "bamba": _bamba, "falcon_h1": _falcon_h1, "granitemoehybrid": _granite,
    "nemotron_h": _nemotron, "zamba2": _zamba2, "mamba": _mamba, "falcon_mamba": _falcon_mamba, "jamba": _jamba,
}  # fmt: skip
RECURRENT = {
    "mamba2": 3,
    "bamba": 2,
    "falcon_h1": 2,
    "granitemoehybrid": 2,
    "nemotron_h": 2,
    "zamba2": 3,
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), 2),
}
MAMBA1 = ("mamba", "falcon_mamba", "jamba")
POLICIES = {
    "gates": ScanPolicy(mul=0.7, add=-0.1, gain=0.75),
    "filter": ScanPolicy(min_dt=0.5),
    "cap every token": ScanPolicy(caps=(Cap(0.5),)),
    "cap every 7": ScanPolicy(caps=(Cap(0.4, 7),)),
    "window": ScanPolicy(window=5),
    "reset": ScanPolicy(reset=6),
}
NEAR = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def build(randomise):
    def made(family, vocab=VOCAB):
        config = FAMILIES[family]()
        config.vocab_size = vocab
        model = randomise(hf.AutoModelForCausalLM.from_config(config)).eval()
        for m in model.modules():
            if isinstance(m, nn.Linear):  # so that every layer matters
                nn.init.normal_(m.weight, std=m.in_features**-0.5)
        randomise(model)
        model.generation_config.eos_token_id = None
        return model

    return made


@pytest.fixture
def model(family, build):
    return build(family)


def _ids(batch=2, length=20):
    return torch.randint(2, VOCAB, (batch, length))


def _set(adopted, policy):
    for mixer in adopted.mixers:
        mixer.policy = policy


@torch.no_grad()
def _logits(model, ids, **given):
    logits = model(ids, use_cache=False, **given).logits
    assert logits.std() > 0.01  # not a comparison of zeros
    return logits.float()


@torch.no_grad()
def _stream(adopted, ids, cuts):
    cache = adopted.new_cache()
    return torch.cat([adopted.logits(adopted(part, cache)) for part in ids.split(cuts, 1)], 1), cache


def test_plain_is_bit_for_bit_theirs(model, family):
    ids = _ids()
    before = _logits(model, ids)
    adopted = adopt(model, time_step_limit_in_decode=False)
    assert len(adopted.mixers) == RECURRENT[family] and adopt(model) is adopted
    assert torch.equal(_logits(model, ids), before)
    whole, cache = _stream(adopted, ids, [20])
    torch.testing.assert_close(whole, before, rtol=0, atol=1e-5)
    cut, _ = _stream(adopted, ids, [7, 1, 9, 1, 1, 1])
    torch.testing.assert_close(cut, before, **NEAR)
    assert cache.position.tolist() == [20, 20] and len(cache.layers) == RECURRENT[family]
    for mixer in adopted.mixers:
        assert (mixer.heads, mixer.headdim, mixer.d_state) == ((64, 1, 4) if family in MAMBA1 else (8, 8, 16))
        assert torch.equal(mixer.A, -mixer.module.A_log.detach().exp()) and mixer.backend is None


@torch.no_grad()
def test_a_policy_of_next_to_nothing_reads_as_theirs(model):
    """Our scan and step, with all that the library gives them, against the library's."""
    ids, mask = _ids(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    expected, padded = _logits(model, ids), _logits(model, ids, attention_mask=mask)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    _set(adopt(model), ScanPolicy(gain=1 + 1e-7))
    torch.testing.assert_close(_logits(model, ids), expected, **NEAR)
    torch.testing.assert_close(_logits(model, ids, attention_mask=mask)[mask > 0], padded[mask > 0], **NEAR)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


@torch.no_grad()
def test_bfloat16(model):
    ids = _ids()
    adopted = adopt(model)
    _set(adopted, POLICIES["window"])
    expected = _logits(model, ids)
    model.to(torch.bfloat16)
    found, cache = _stream(adopted, ids, [9, 1, 10])
    assert found.dtype == torch.float32 and cache.layers[0].scan.state.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_how_a_stream_is_cut_changes_nothing(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)  # (so that a step is what a prompt is)
    ids = _ids(2, 20)
    plain = _logits(model, ids)
    _set(adopted, policy)
    whole = _logits(model, ids)
    assert (whole - plain).abs().max() > 1e-3, "the policy does nothing here"
    steps, _ = _stream(adopted, ids, [1] * 20)
    torch.testing.assert_close(steps, whole, **NEAR)
    cut, _ = _stream(adopted, ids, [3, 1, 7, 1, 5, 3])
    torch.testing.assert_close(cut, whole, **NEAR)


@torch.no_grad()
def test_rows_that_start_from_noise(model):
    adopted, ids, mask = adopt(model, time_step_limit_in_decode=True), _ids(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    plain = _logits(model, ids)
    with mitigate(model, "noise-start:std=0.5"):
        whole = _logits(model, ids)
        assert (whole - plain).abs().max() > 1e-3
        for cuts in ([1] * 20, [3, 1, 7, 1, 5, 3]):
            torch.testing.assert_close(_stream(adopted, ids, cuts)[0], whole, **NEAR)
        padded = _logits(model, ids, attention_mask=mask.long())
        torch.testing.assert_close(padded[1, 7:], _logits(model, ids[1:, 7:])[0], **NEAR)
    assert torch.equal(_logits(model, ids), plain)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_mamba2_against_our_own_model(build, policy, tmp_path):
    theirs = build("mamba2")
    theirs.save_pretrained(tmp_path)
    ours, adopted = checkpoint.load(tmp_path), adopt(theirs)
    _set(ours, policy)
    _set(adopted, policy)
    ids = _ids(2, 37)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, :9] = False
    torch.testing.assert_close(_logits(theirs, ids), ours.logits(ours(ids)), **NEAR)
    padded = _logits(theirs, ids, attention_mask=mask.long())
    torch.testing.assert_close(padded[mask], ours.logits(ours(ids, mask=mask))[mask], **NEAR)
    cache, mine = adopted.new_cache(), ours.new_cache()
    for part in ids.split([11, 1, 20, 1, 4], 1):
        torch.testing.assert_close(adopted.logits(adopted(part, cache)), ours.logits(ours(part, mine)), **NEAR)
    for a, b in zip(cache.layers, mine.layers):
        if policy.window is None:
            torch.testing.assert_close(a.scan.state, b.scan.state, **NEAR)
        torch.testing.assert_close(a.scan.log_decay, b.scan.log_decay, **NEAR)


@torch.no_grad()
def test_on_and_off(model):
    ids = _ids()
    logits, tokens = _logits(model, ids), model.generate(ids, max_new_tokens=6, do_sample=False)
    names = dict(model.state_dict())
    forwards = [m.forward for m in model.modules()]
    with mitigate(model, "rri:alpha=0.9,beta=0.4"), mitigate(model, "window:tokens=4") as handle:
        assert active(model)[0] == "rri:alpha=0.9,beta=0.4+window:tokens=4"
        assert not torch.equal(_logits(model, ids), logits)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        handle.remove()
        assert not torch.equal(_logits(model, ids), logits)
    assert [m.forward for m in model.modules()] == forwards
    assert torch.equal(_logits(model, ids), logits)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    assert list(model.state_dict()) == list(names)
    assert active(model) == ("none", None)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["gates", "cap every 7", "window", "reset"])
def test_generate_greedy_is_recomputation(model, policy):
    _set(adopt(model, time_step_limit_in_decode=True), POLICIES[policy])
    ids = _ids(2, 9)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False),
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False),
    )


@torch.no_grad()
@pytest.mark.parametrize("policy", ["cap every 7", "window"])
def test_beam_search_is_recomputation(model, policy):
    _set(adopt(model, time_step_limit_in_decode=True), POLICIES[policy])
    ids = _ids(2, 9)
    given = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True,
             "output_scores": True, "num_return_sequences": 3}  # fmt: skip
    cached, again = model.generate(ids, **given), model.generate(ids, use_cache=False, **given)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(cached.sequences_scores, again.sequences_scores, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_left_padding_leaves_no_trace(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)
    _set(adopted, POLICIES[policy])
    ids, mask = _ids(2, 21), torch.ones(2, 21, dtype=torch.bool)
    mask[1, :8] = False
    tokens = model.generate(ids, attention_mask=mask.long(), max_new_tokens=5, do_sample=False)
    cache, parts = adopted.new_cache(), []
    for part, kept in zip(ids.split([5, 12, 4], 1), mask.split([5, 12, 4], 1)):
        parts.append(adopted.logits(adopted(part, cache, kept)))
    assert cache.position.tolist() == [21, 13]
    for row in range(2):
        alone = ids[row : row + 1, mask[row]]
        expected = _logits(model, alone)[0]
        torch.testing.assert_close(torch.cat(parts, 1)[row, mask[row]], expected, **NEAR)
        greedy = model.generate(alone, max_new_tokens=5, do_sample=False)
        assert torch.equal(greedy[0, -5:], tokens[row, -5:])


@torch.no_grad()
def test_a_cache_goes_where_its_rows_go(model):
    adopted = adopt(model)
    _set(adopted, POLICIES["cap every 7"])
    ids, more = _ids(3, 10), _ids(3, 9)
    cache = adopted.new_cache()
    adopted(ids, cache)
    rows = torch.tensor([2, 0, 0])
    moved, cloned = cache.rows(rows), cache.clone()
    expected = adopted.logits(adopted(more, cache))
    torch.testing.assert_close(adopted.logits(adopted(more, cloned)), expected, rtol=0, atol=0)
    torch.testing.assert_close(adopted.logits(adopted(more[rows], moved)), expected[rows], **NEAR)
    assert moved.position.tolist() == [19, 19, 19]

    cache = adopted.new_cache()
    adopted(ids, cache)
    library = cache.library
    if not all(hasattr(layer, "batch_select_indices") for layer in library.layers):
        return  # layers without a mixer that this transformers cannot move
    library.batch_select_indices(torch.tensor([1, 2]))
    library.batch_repeat_interleave(2)
    cache.position, cache.padding = cache.position[[1, 1, 2, 2]], cache.padding[[1, 1, 2, 2]]
    torch.testing.assert_close(adopted.logits(adopted(more[[1, 1, 2, 2]], cache)), expected[[1, 1, 2, 2]], **NEAR)


@torch.no_grad()
def test_a_cache_can_be_reset(build):
    model = build("mamba2")
    _set(adopt(model), POLICIES["cap every 7"])
    ids = _ids(2, 10)
    first = model(ids, use_cache=True)
    cache = first.cache_params
    cache.reset()
    again = model(ids, cache_params=cache, use_cache=True)
    torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)


@torch.no_grad()
def test_a_cache_from_before_the_remedy(build):
    model = build("mamba2")
    cache = model(_ids(), use_cache=True).cache_params
    with mitigate(model, "rri"):
        model(_ids(), cache_params=copy.deepcopy(cache), use_cache=True)  # needs no position
    with mitigate(model, "window:tokens=8"), pytest.raises(InputError, match="start a new cache"):
        model(_ids(), cache_params=cache, use_cache=True)
    adopted = adopt(model)  # which counts
    cache = adopted.new_cache()
    ids = _ids(2, 20)
    adopted(ids[:, :10], cache)
    _set(adopted, POLICIES["reset"])
    adopted(ids[:, 10:], cache)
    assert cache.position.tolist() == [20, 20]


@torch.no_grad()
def test_two_models_of_one_family_and_a_copy(build):
    one, two = build("mamba2"), build("mamba2")
    ids = _ids()
    plain = _logits(two, ids)
    _set(adopt(one), POLICIES["gates"])
    changed = _logits(one, ids)
    assert torch.equal(_logits(two, ids), plain)
    copied = copy.deepcopy(one)
    assert torch.equal(_logits(copied, ids), changed)
    for p in copied.parameters():
        p.zero_()
    assert torch.equal(_logits(one, ids), changed)  # the copy's forward is its own
    assert adopt(copied) is not adopt(one) and adopt(copied).model is copied


@torch.no_grad()
def test_the_limit_of_dt_in_steps(build):
    ids = _ids(2, 12)

    def steps(model, cut):
        cache, parts = None, []
        for part in ids.split(cut, 1):
            out = model(part, cache_params=cache, use_cache=True)
            cache = out.cache_params
            parts.append(out.logits)
        return torch.cat(parts, 1)

    model = build("mamba2")
    for layer in model.backbone.layers:
        layer.mixer.time_step_limit = (0.3, 0.6)
    plain, nothing = steps(model, [6, *[1] * 6]), ScanPolicy(gain=1 + 1e-7)
    _set(adopt(model), nothing)  # a policy, so that our step runs: it ignores the limit as theirs does
    torch.testing.assert_close(steps(model, [6, *[1] * 6]), plain, **NEAR)
    assert (plain - steps(model, [12])).abs().max() > 1e-3
    adopt(model, time_step_limit_in_decode=True)
    for policy in (nothing, PLAIN):
        _set(adopt(model), policy)
        torch.testing.assert_close(steps(model, [6, *[1] * 6]), steps(model, [12]), **NEAR)


@torch.no_grad()
def test_packed_sequences_begin_anew(build):
    """The library's own convolution keeps them apart with a kernel only, so the scan is asked directly."""
    mixer = adopt(build("mamba2")).mixers[0]
    mixer.policy = POLICIES["cap every 7"]
    seq_idx = torch.tensor([[0] * 9 + [1] * 11, [3] * 20])
    x, dt, B, C = (torch.randn(2, 20, *shape) for shape in ((8, 8), (8,), (1, 16), (1, 16)))
    call = _Call(mixer, None, None)

    def read(*rows, seq_idx=None):
        return _scan(call, rows[0], rows[1], mixer.A, rows[2], rows[3], 8, seq_idx=seq_idx)

    y = read(x, dt, B, C, seq_idx=seq_idx)
    torch.testing.assert_close(y[:1, :9], read(*(t[:1, :9] for t in (x, dt, B, C))), **NEAR)
    torch.testing.assert_close(y[:1, 9:], read(*(t[:1, 9:] for t in (x, dt, B, C))), **NEAR)
    torch.testing.assert_close(y[1:], read(*(t[1:] for t in (x, dt, B, C))), **NEAR)


@torch.no_grad()
def test_threads_do_not_meet(build):
    """A model without a policy reads in one thread while one with a policy reads in another."""
    one, two = build("mamba2"), build("mamba2")
    ids = _ids(2, 15)
    plain = _logits(two, ids)
    _set(adopt(one), POLICIES["window"])
    changed = _logits(one, ids)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: _logits((one, two)[i % 2], ids), range(16)))
    assert all(torch.equal(y, (changed, plain)[i % 2]) for i, y in enumerate(found))


@torch.no_grad()
def test_what_the_library_sees_of_a_window(build):
    model = build("mamba2")
    adopted, ids = adopt(model), _ids(1, 12)
    _set(adopted, ScanPolicy(window=4))
    cache = adopted.new_cache()
    for t in range(12):
        adopted(ids[:, t : t + 1], cache)
    states = [layer.recurrent_states[0] for layer in cache.library.layers]
    assert all(torch.equal(s, c.scan.state) for s, c in zip(states, cache.layers))
    # the first layer's inputs do not depend on the window: its state is that of the last 4 tokens alone
    first = adopted.new_cache()
    _set(adopted, PLAIN)
    adopted(ids[:, :8], first)
    first.library.layers[0].recurrent_states[0].zero_()
    adopted(ids[:, 8:], first)
    torch.testing.assert_close(first.layers[0].scan.state, states[0], **NEAR)


def test_one_mixer_under_two_models_is_refused(build):
    model = build("mamba2")
    with mitigate(model, "rri"), pytest.raises(InputError, match="already, by way of another model"):
        mitigate(model.backbone, "rri")
    with mitigate(model.backbone, "rri"):
        pass


def test_training_takes_no_shortcut_and_has_gradients(build):
    model = build("mamba2").train()
    ids = _ids()
    mitigate(model, "rri:alpha=0.9,beta=0.4")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits.detach(), _logits(model.eval(), ids), **NEAR)
    out.loss.backward()
    assert all(m.module.A_log.grad.abs().sum() > 0 for m in adopt(model).mixers)


@torch.no_grad()
def test_controls(model):
    ids = _ids(2, 20)
    with pytest.raises(NotApplicable, match=r"rnn_longctx.adopt\(model\)"):
        mitigate(model, "reset:every=6")
    assert active(model) == ("none", None)
    adopted = adopt(model)
    with mitigate(adopted, "reset:every=6,overlap=2"):
        cut, cache = _stream(adopted, ids, [4, 9, 7])
        expected = [_logits(model, ids[:, :6]), *(_logits(model, ids[:, t - 2 : t + 6])[:, 2:] for t in (6, 12, 18))]
        torch.testing.assert_close(cut, torch.cat(expected, 1), **NEAR)
        assert cache.position.tolist() == [20, 20]
        with pytest.raises(InputError, match="rows of equal lengths"):
            adopted(ids, mask=torch.arange(20) >= torch.tensor([[3], [0]]))
        assert generate(adopted, ids, 4).shape == (2, 4)
    assert torch.equal(generate(adopted, ids, 4), model.generate(ids, max_new_tokens=4, do_sample=False)[:, 20:])


@torch.no_grad()
def test_probes_and_calibration(model):
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=24, name="small")
    found = measure_envelope(adopted, _ids(4, 24), "made", "0")
    assert (
        torch.tensor(found.peaks).shape == (len(adopted.mixers), 4, adopted.mixers[0].heads)
        and torch.tensor(found.peaks).min() > 1e-6
    )
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    with mitigate(model, "state-norm:quantile=0.5", text=text):
        assert adopted.mixers[0].policy.caps
        assert model.generate(_ids(), max_new_tokens=3).shape == (2, 23)
    ids = _ids()
    losses = adopted.losses(adopted(ids[:, :-1]), ids[:, 1:])
    expected = nn.functional.cross_entropy(_logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(losses.mean(), expected)
    assert len(adopted.weights_hash) == 16 and adopted.backend == "transformers"


@torch.no_grad()
def test_saved_and_loaded_as_before(model, tmp_path):
    ids = _ids()
    before = _logits(model, ids)
    with mitigate(model, "rri:alpha=0.9,beta=0.4"):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(again, ids), before) and active(again) == ("none", None)


def test_what_has_no_mixer_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"no Mamba-2 mixer \(A_log.*found Sequential") as error:
        rnn_longctx.adopt(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no Mamba-2 mixer"):
        mitigate(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), "rri")


def test_right_padding_is_refused_under_a_policy(build):
    model = build("mamba2")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, -3:] = 0
    with mitigate(model, "rri"), pytest.raises(InputError, match="left padding"):
        _logits(model, _ids(), attention_mask=mask)


def test_remedies_that_read_a_text_ask_for_what_that_takes(build):
    model = build("mamba2")
    with pytest.raises(NotApplicable, match="train_length= of load or adopt"):
        mitigate(model, "state-norm")
    adopt(model, train_length=16)
    for remedy in ("state-norm", "token-filter"):
        with pytest.raises(InputError, match=r"no tokenizer; name one .*tokenizer= of load or adopt"):
            mitigate(model, remedy, target_length=64)
    adopt(model, tokenizer=ByteTokenizer())
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    mitigate(model, "state-norm", text=text).remove()


def test_policies_are_plain_after_all(build):
    adopted = adopt(build("bamba"))
    assert all(m.policy == PLAIN and "forward" not in m.module.__dict__ for m in adopted.mixers)


@torch.no_grad()
def test_remedies_that_need_more_than_a_scan(build):
    """A prompt can be read otherwise through this library's interface alone."""
    theirs = build("mamba2")
    ours = rnn_longctx.adopt(theirs, train_length=8)
    ids = _ids(1, 30)
    with mitigate(ours, "chunk-select:chunk=7,query=4"):
        logits, _ = prefill(ours, ids)
    each = [ours.logits(ours(torch.cat([ids[:, max(0, e - 7) : e], ids[:, -4:]], 1)))[:, -1] for e in range(26, 0, -7)]
    entropies = [torch.distributions.Categorical(logits=v).entropy() for v in each]
    torch.testing.assert_close(logits, each[int(torch.cat(entropies).argmin())], **NEAR)
    for remedy in ("chunk-select", "decimate", "reset:every=8"):
        with pytest.raises(NotApplicable, match="is a way to read"):
            mitigate(theirs, remedy)
    for remedy in ("a-winsor:share=0.2", "delta-scale:scale=0.5", "noise-start:std=0.1"):
        with mitigate(theirs, remedy):
            changed = _logits(theirs, ids)
        assert not torch.allclose(changed, _logits(theirs, ids))


@torch.no_grad()
def test_steps_are_those_of_its_own_scan(model, family, monkeypatch):
    """What a mixer's forward hands to its scan, softplus and clamp done here. Families differ in what is before."""
    adopted, given = adopt(model), []
    if family in MAMBA1:
        with pytest.raises(InputError, match="mixer of Mamba-1"):
            adopted.mixers[0].steps(torch.randn(1, 2, 3))
        return
    for mixer in adopted.mixers:
        mixer.module.time_step_limit = (0.2, 0.9)
    scan = adopted.mixers[0].names["mamba2_chunk_scan"]

    def spy(x, dt, *rest, dt_bias, dt_limit, **named):
        given.append(nn.functional.softplus(dt + dt_bias).clamp(*dt_limit))
        return scan(x, dt, *rest, dt_bias=dt_bias, dt_limit=dt_limit, **named)

    monkeypatch.setitem(adopted.mixers[0].names, "mamba2_chunk_scan", spy)
    steps = measure_steps(adopted, _ids())
    assert len(steps) == len(given) == RECURRENT[family]
    for found, expected in zip(steps, given):
        assert found.shape == (2, 20, 8) and ((found > 0.2) & (found < 0.9)).float().mean() > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_token_filter(model, family):
    """The thresholds are those of the steps; below them a token leaves the state alone."""
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=16)
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    if family in MAMBA1:
        with pytest.raises(NotApplicable, match=r"token-filter reads one step a head.*Mamba-1's"):
            mitigate(adopted, "token-filter", target_length=64, text=text)
        return
    for mixer in adopted.mixers:
        mixer.module.A_log[0] = -9.0  # the first head sees far
    with mitigate(adopted, "token-filter:clamp=0", target_length=64, text=text) as handle:
        g = torch.tensor([p.min_dt for p in handle.plan.policies])
        assert "made" in handle.plan.calibration and (g[:, 0] > 0).all()
        ids = _ids()
        filtered, found = _logits(model, ids), measure_steps(adopted, ids)
        states = _stream(adopted, ids, [20])[1].layers
    assert not torch.allclose(filtered, _logits(model, ids))
    first = states[0].scan.log_decay[:, 0]  # of the first layer's far head: from the steps that are kept
    kept = torch.where(found[0][..., 0] >= g[0, 0], found[0][..., 0], 0.0).sum(1)
    torch.testing.assert_close(first.float(), kept * adopted.mixers[0].A[0], rtol=1e-4, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 2])
def test_decimate_reads_as_our_own_model(build, first, tmp_path):
    theirs = build("mamba2")
    theirs.save_pretrained(tmp_path)
    ours, adopted = checkpoint.load(tmp_path), adopt(theirs)
    ids, more = _ids(2, 40), _ids(2, 5)
    remedy = f"decimate:base=12,first={first},least=3"
    with mitigate(adopted, remedy), mitigate(ours, remedy):
        for segment in (40, 7):
            logits, cache = prefill(adopted, ids, segment=segment)
            expected, own = prefill(ours, ids, segment=segment)
            torch.testing.assert_close(logits, expected, **NEAR)
        assert cache.position.tolist() == [40, 40]
        torch.testing.assert_close(adopted.logits(adopted(more, cache)), ours.logits(ours(more, own)), **NEAR)
    assert not torch.allclose(prefill(adopted, ids)[0], logits)


@pytest.mark.parametrize(("family", "why"), [("bamba", "drops tokens between layers"), ("mamba", "Mamba-1's")])
def test_decimate_needs_pure_mamba2(build, family, why):
    with pytest.raises(NotApplicable, match=why):
        mitigate(adopt(build(family)), "decimate")


@torch.no_grad()
def test_chunk_select_of_several_prompts(model):
    """Rows whose surest chunks differ in length go on side by side as each would alone."""
    adopted = adopt(model, time_step_limit_in_decode=True)
    with mitigate(adopted, "chunk-select:chunk=9,query=4"):
        for _ in range(20):
            ids = _ids(3, 19)  # chunks of 9 and 6 tokens
            logits, cache = prefill(adopted, ids, segment=30)
            alone = [prefill(adopted, row[None], segment=30) for row in ids]
            if len({part.seen for _, part in alone}) > 1:
                break
        torch.testing.assert_close(logits, torch.cat([each for each, _ in alone]), **NEAR)
        assert cache.position.tolist() == [19] * 3
        for cut in (1, 5, 1):
            more = _ids(3, cut)
            expected = [adopted(row[None], part) for row, (_, part) in zip(more, alone)]
            torch.testing.assert_close(adopted(more, cache), torch.cat(expected), **NEAR)
    assert len({part.seen for _, part in alone}) > 1


@torch.no_grad()
@pytest.mark.parametrize("policy", [PLAIN, POLICIES["cap every 7"]], ids=["plain", "cap every 7"])
def test_packed_documents_are_read_as_if_alone(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)
    _set(adopted, policy)
    ids, reset = _ids(2, 30), torch.zeros(2, 30, dtype=torch.bool)
    reset[0, [0, 9, 17]] = reset[1, 13] = True
    alone = [[_logits(model, ids[0:1, a:b]) for a, b in ((0, 9), (9, 17), (17, 30))],
             [_logits(model, ids[1:2, a:b]) for a, b in ((0, 13), (13, 30))]]  # fmt: skip
    expected = torch.cat([torch.cat(row, 1) for row in alone])
    for cuts in ([30], [11, 1, 10, 8]):
        cache, found = adopted.new_cache(), []
        for part, begins in zip(ids.split(cuts, 1), reset.split(cuts, 1)):
            found.append(adopted.logits(adopted(part, cache, reset=begins)))
        torch.testing.assert_close(torch.cat(found, 1), expected, **NEAR)
        assert cache.position.tolist() == [13, 17]
    assert (expected - _logits(model, ids)).abs().max() > 1e-3
    mask = torch.arange(30) >= torch.tensor([[3], [0]])
    with pytest.raises(InputError, match="no padding and no control"):
        adopted(ids, mask=mask, reset=reset)


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mamba2", "mamba", "falcon_mamba")])
def test_attention_of_every_hybrid_is_cropped(build, family):
    """As a banded mask does, which every one of them takes; see tests/mitigations/test_hybrid.py."""
    model, ids, at = build(family), _ids(2, 26), torch.arange(26)
    seen = (at <= at[:, None]) & (at >= at[:, None] // 3 * 3 - 3)
    band = torch.zeros(2, 1, 26, 26).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = _logits(model, ids, attention_mask={"full_attention": band, "linear_attention": None})
    adopted = adopt(model, time_step_limit_in_decode=True)
    assert adopted.attends and (expected - _logits(model, ids))[:, 6:].abs().max() > 1e-3
    with mitigate(adopted, "attention-window:tokens=6"):
        for cuts in ([26], [7, 1, 9, 1, 1, 7]):
            torch.testing.assert_close(_stream(adopted, ids, cuts)[0], expected, **NEAR)


REMEDIES = ["none", "state-norm:quantile=0.5", "window:tokens=6", "reset:every=7,overlap=2"]


@torch.no_grad()
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_saved_state_is_gone_on_from(model, remedy, tmp_path):
    """In pieces, from the file, as at once; other weights and other remedies are refused."""
    adopted = adopt(model, time_step_limit_in_decode=True, tokenizer=ByteTokenizer(), train_length=16, name="small")
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    ids = _ids(2, 30)
    with mitigate(adopted, remedy, text=text):
        expected = generate(adopted, ids, 5)
        _, cache = prefill(adopted, ids[:, :17])
        before = adopted.logits(adopted(ids[:, 17:], cache.clone()))
        save_state(tmp_path / "s", cache, adopted, remedy)
        again = load_state(tmp_path / "s", adopted)
        assert again.position.tolist() == [17, 17]
        for a, b in zip(again.layers, cache.layers, strict=True):
            assert torch.equal(a.conv, b.conv) and torch.equal(a.scan.state, b.scan.state)
        torch.testing.assert_close(adopted.logits(adopted(ids[:, 17:], again)), before, rtol=0, atol=1e-5)
        assert torch.equal(generate(adopted, ids[:, 17:], 5, cache=load_state(tmp_path / "s", adopted)), expected)
    with mitigate(adopted, "rri"), pytest.raises(InputError, match="was read with the remedy"):
        load_state(tmp_path / "s", adopted)
    model.get_input_embeddings().weight[0, 0] += 1
    del adopted.weights_hash  # it is worked out once
    with pytest.raises(InputError, match="was read by small"):
        load_state(tmp_path / "s", adopted)


@torch.no_grad()
def test_a_saved_state_of_padded_rows_and_one_to_start_from(model, tmp_path):
    adopted = adopt(model)
    ids, more, mask = _ids(2, 14), _ids(2, 6), torch.arange(14) >= torch.tensor([[5], [0]])
    cache = adopted.new_cache()
    adopted(ids, cache, mask)
    save_state(tmp_path / "s", cache, adopted)
    again = load_state(tmp_path / "s", adopted)
    torch.testing.assert_close(adopted(more, again), adopted(more, cache), rtol=0, atol=1e-5)
    with mitigate(adopted, f"stored-start:file={tmp_path / 's'}"):
        started = [torch.tensor(mixer.policy.start) for mixer in adopted.mixers]
    cache = load_state(tmp_path / "s", adopted)
    torch.testing.assert_close(started, [carry.scan.state[0] for carry in cache.layers])


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_generate_from_a_saved_state_on_the_command_line(build, family, tmp_path, capsys):
    model = build(family, 256)
    model.save_pretrained(tmp_path / "kept")

    def said(*words):
        options = ["--tokenizer", "bytes", "--device", "cpu", "--max-new-tokens", "6"]
        cli.app(["generate", str(tmp_path / "kept"), *words, *options], standalone_mode=False)
        return capsys.readouterr().out

    one, two, three = (str(tmp_path / name) for name in "123")
    whole = said("--prompt", "!!##$$ %%&& ''((", "--save-state", one)
    said("--prompt", "!!##$$ %%&", "--save-state", two)
    assert said("--prompt", "& ''((", "--load-state", two, "--save-state", three) == whole
    for a, b in zip(Cache.load(one).layers, Cache.load(three).layers, strict=True):
        assert a.scan.position.tolist() == b.scan.position.tolist() == [16] and a.scan.state.abs().max() > 1e-3
        torch.testing.assert_close(a.scan.state, b.scan.state, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bamba", "jamba"])
def test_a_checkpoint_is_found_and_adopted(build, tmp_path, family):
    theirs = build(family, 256)
    theirs.save_pretrained(tmp_path / "kept")
    ours = load_adopted(tmp_path / "kept", tokenizer="bytes", train_length=64)
    assert ours.train_length == 64 and ours.name == "kept" and ours.tokenizer.name == "bytes"
    assert ours.scan_state_elements > 0 and ours.conv_state_elements > 0
    ids = _ids()
    torch.testing.assert_close(ours.logits(ours(ids)), _logits(theirs, ids), **NEAR)
    with pytest.raises(InputError, match="without a tokenizer"):
        load_adopted(tmp_path / "kept")
    build("mamba2", 256).save_pretrained(tmp_path / "own")
    assert load_adopted(tmp_path / "own", tokenizer="bytes") is None  # which `load` reads
    assert isinstance(load_any(tmp_path / "own", tokenizer="bytes"), Mamba2LM)


def test_what_cannot_be_adopted_is_one_line(build, tmp_path, capsys, monkeypatch):
    build("mamba").save_pretrained(tmp_path / "narrow")
    theirs = build("mamba", 256)
    theirs.save_pretrained(tmp_path / "kept")
    hf.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    weights = load_file(tmp_path / "kept" / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    for folder, tensors in (("lacking", {k: v for k, v in weights.items() if k != name}),
                            ("nan", weights | {name: weights[name] * float("nan")})):  # fmt: skip
        shutil.copytree(tmp_path / "kept", tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    shutil.copytree(tmp_path / "kept", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\0" * 99)

    def line(folder, *words):
        words = ["generate", str(tmp_path / folder), "--prompt", "a", "--tokenizer", "bytes", *words]
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert f"has 256 tokens, the model's vocabulary {VOCAB}" in line("narrow")
    assert f"lacks 1 weights, {name} among them" in line("lacking")
    assert f"{name} is not finite" in line("nan")
    assert "transformers cannot read cut" in line("cut")
    assert "model_type 'gpt2'; supported:" in line("gpt2") and "falcon_h1" in line("gpt2")
    assert "unknown dtype 'int8'" in line("kept", "--dtype", "int8")
    assert "is not available here" in line("kept", "--device", "cuda:99")


class Int8(torch.Tensor):
    """Weights in eight bits, as libraries of quantisation make them: little more than a product is known of them."""

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype, device=packed.device)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    def dequantize(self):
        return self.packed * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].dequantize(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].packed.clone(), args[0].scale.clone())
        raise NotImplementedError(func)


class Packed(nn.Module):
    """A linear layer or an embedding whose weight is of bytes."""

    def __init__(self, module):
        super().__init__()
        packed, scale = _packed(module.weight)
        self.weight = nn.Parameter((packed + 128).to(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias, self.embeds = getattr(module, "bias", None), isinstance(module, nn.Embedding)

    def dequantize(self):
        return (self.weight.to(self.scale.dtype) - 128) * self.scale

    def forward(self, x):
        if self.embeds:
            return nn.functional.embedding(x, self.dequantize())
        assert x.dtype == self.scale.dtype, "activations in a type that no weight is of"
        return nn.functional.linear(x, self.dequantize(), self.bias)


def _packed(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


def _quantise(model, how):
    """Every linear layer that transformers lets be; returns a copy whose weights are the same numbers in full."""
    wide = copy.deepcopy(model)
    for name, m in list(model.named_modules()):
        if not isinstance(m, nn.Linear | nn.Embedding) or (how != "module" and isinstance(m, nn.Embedding)):
            continue
        if name.endswith("dt_proj"):
            continue  # which transformers multiplies by itself
        if how == "module":
            if name == "lm_head" and "mamba" in model.config.model_type:
                continue  # transformers brings hidden states to the type of these heads' weights
            holder, _, last = name.rpartition(".")
            packed = Packed(m)
            setattr(model.get_submodule(holder), last, packed)
            weight = packed.dequantize()
        elif how == "tensor":
            m.weight = nn.Parameter(Int8(*_packed(m.weight)), requires_grad=False)
            weight = m.weight.dequantize()
        else:
            ao = pytest.importorskip("torchao.quantization")
            ao.quantize_(m, ao.Int8WeightOnlyConfig())
            weight = m.weight.dequantize()
        wide.get_submodule(name).weight = nn.Parameter(weight.detach().clone())
    return wide


@torch.no_grad()
@pytest.mark.parametrize("how", ["tensor", "module", "torchao"])
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_quantised_weights(build, family, how):
    model, ids = build(family), _ids()
    wide = _quantise(model, how)
    before, adopted = _logits(model, ids), adopt(model)
    assert (before - _logits(wide, ids)).abs().max() < 1e-3 and adopted.dtype == torch.float32
    assert adopted.device.type == "cpu" and sum(p.numel() for p in adopted.parameters()) > 0
    torch.testing.assert_close(_stream(adopted, ids, [7, 1, 12])[0], before, **NEAR)
    for policy in (POLICIES["gates"], POLICIES["window"]):
        _set(adopted, policy)
        _set(adopt(wide), policy)
        changed = _logits(wide, ids)
        assert (changed - before).abs().max() > 1e-3
        torch.testing.assert_close(_logits(model, ids), changed, rtol=0, atol=1e-3)
        torch.testing.assert_close(_stream(adopted, ids, [9, 1, 10])[0], changed, rtol=0, atol=1e-3)
    _set(adopted, PLAIN)
    assert torch.equal(_logits(model, ids), before) and adopted(ids[:, :0]).dtype == torch.float32
    model.generate(ids, max_new_tokens=3)

    again = copy.deepcopy(model)
    assert adopt(again).weights_hash == adopted.weights_hash != adopt(wide).weights_hash
    linear = adopt(again).mixers[-1].module.out_proj
    for part in ("packed", "qdata"):
        if hasattr(linear.weight, part):
            getattr(linear.weight, part)[0, 0] ^= 1  # a bit of one number
    if how == "module":
        linear.weight[0, 0] ^= 1
    del adopt(again).__dict__["weights_hash"]
    assert adopt(again).weights_hash != adopted.weights_hash


@torch.no_grad()
def test_states_of_fewer_bits(model):
    adopted, ids, sizes = adopt(model), _ids(), [12, 1, 1, 1, 5]
    before, tokens = _logits(model, ids), model.generate(ids, max_new_tokens=6, do_sample=False)
    cut, _ = _stream(adopted, ids, sizes)
    adopted.use_state_dtype("float32")
    assert adopted.state_dtype is None and torch.equal(_stream(adopted, ids, sizes)[0], cut)

    _set(adopted, POLICIES["gates"])
    plain, (cache, expected) = _stream(adopted, ids, sizes)[0], (adopted.new_cache(), [])
    for part in ids.split(sizes, 1):  # by hand
        expected.append(adopted.logits(adopted(part, cache)))
        for m in adopted.mixers:
            held = m.layer_of(cache.library).recurrent_states[0]
            held.copy_(held.to(torch.bfloat16))
    adopted.use_state_dtype("bfloat16")
    found, kept = _stream(adopted, ids, sizes)
    assert torch.equal(found, torch.cat(expected, 1)) and (found - plain).abs().max() > 1e-4
    assert all(torch.equal(a.scan.state.float(), b.scan.state) for a, b in zip(kept.layers, cache.layers))

    _set(adopted, PLAIN)  # the library's own calls, without a remedy
    assert adopted.backend == "torch" and all(m.active for m in adopted.mixers)
    assert (_stream(adopted, ids, sizes)[0] - cut).abs().max() > 1e-4
    model.generate(ids, max_new_tokens=6, do_sample=False)
    with mitigate(model, "window:tokens=4"):
        again, _ = _stream(adopted, ids, sizes)
        torch.testing.assert_close(again, _logits(model, ids), rtol=0, atol=0.1)
    adopted.use_state_dtype(None)
    assert torch.equal(_logits(model, ids), before) and all("forward" not in vars(m.module) for m in adopted.mixers)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
