"""mamba_ssm's own models under our policies. On a CPU its Triton kernels give way to the PyTorch functions that it
tests them against; with a GPU (`-m gpu`) they run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import active, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import generate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

pytest.importorskip("mamba_ssm")
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules import mamba2, mamba2_simple
from mamba_ssm.ops.triton import layer_norm, layernorm_gated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref
from mamba_ssm.utils.generation import InferenceParams

VOCAB = 61
NEAR = {"rtol": 0, "atol": 1e-4}
POLICIES = {
    "gates": ScanPolicy(mul=0.7, add=-0.1, gain=0.75),
    "cap every token": ScanPolicy(caps=(Cap(0.5),)),
    "cap every 7": ScanPolicy(caps=(Cap(0.4, 7),)),
    "window": ScanPolicy(window=5),
    "reset": ScanPolicy(reset=6),
}
SHAPES = {
    "plain": {},
    "groups, no norm": {"ngroups": 2, "rmsnorm": False},
    "an MLP beside, D a channel": {"d_ssm": 32, "D_has_hdim": True},
    "norm before gate": {"norm_before_gate": True},
}


def _slow_scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, seq_idx=None,
               cu_seqlens=None, dt_limit=(0.0, float("inf")), return_final_states=False, **_):  # fmt: skip
    """mamba_ssm's scan as a loop of its reference step."""
    assert seq_idx is None
    H, P, N = x.shape[2], x.shape[3], B.shape[-1]
    dt = dt + dt_bias if dt_bias is not None else dt
    dt = (nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    state = x.new_zeros(len(x), H, P, N)
    D = torch.zeros(H, P) if D is None else D if D.ndim == 2 else D[:, None].expand(H, P)
    A, y = A[:, None, None].expand(H, P, N), []
    for t in range(x.shape[1]):
        y.append(
            selective_state_update_ref(state, x[:, t], dt[:, t, :, None].expand(-1, H, P), A, B[:, t], C[:, t], D=D,
                                       z=None if z is None else z[:, t])
        )  # fmt: skip
    y = torch.stack(y, 1)
    return (y, state) if return_final_states else y


@pytest.fixture
def on_cpu(monkeypatch):
    def norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        return layernorm_gated.rms_norm_ref(x, weight, bias, z, eps, group_size, norm_before_gate)

    def block_norm(x, weight, bias, residual=None, eps=1e-6, dropout_p=0.0, prenorm=False, residual_in_fp32=False):
        return layer_norm.rms_norm_ref(x, weight, bias, residual=residual, eps=eps, prenorm=prenorm)

    for module in (mamba2, mamba2_simple):
        monkeypatch.setattr(module, "mamba_chunk_scan_combined", _slow_scan)
    monkeypatch.setattr(mamba2, "selective_state_update", selective_state_update_ref)
    monkeypatch.setattr(layernorm_gated, "rmsnorm_fn", norm)
    monkeypatch.setattr(layer_norm, "rms_norm_fn", block_norm)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: None)  # which its generate makes


@pytest.fixture
def build(on_cpu, randomise):
    def made(layers=2, device="cpu", **ssm):
        ssm = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "use_mem_eff_path": False, **ssm}
        config = MambaConfig(d_model=24, n_layer=layers, vocab_size=VOCAB, ssm_cfg=ssm, fused_add_norm=False,
                             pad_vocab_size_multiple=1)  # fmt: skip
        return randomise(MambaLMHeadModel(config)).eval()

    return made


def _ids(batch=2, length=20):
    return torch.randint(VOCAB, (batch, length))


def _set(adopted, policy):
    for mixer in adopted.mixers:
        mixer.policy = policy


@torch.no_grad()
def _logits(model, ids):
    return model(ids).logits


@torch.no_grad()
def _theirs(model, ids, cuts):
    """Through the library's own cache."""
    params = InferenceParams(max_seqlen=ids.shape[1], max_batch_size=len(ids))
    parts = []
    for part in ids.split(cuts, 1):
        parts.append(model(part, inference_params=params).logits)
        params.seqlen_offset += part.shape[1]
    return torch.cat(parts, 1)


@torch.no_grad()
def _stream(adopted, ids, cuts, mask=None):
    cache, masks = adopted.new_cache(), [None] * len(cuts) if mask is None else mask.split(cuts, 1)
    parts = [adopted.logits(adopted(part, cache, m)) for part, m in zip(ids.split(cuts, 1), masks)]
    return torch.cat(parts, 1), cache


def _ours(theirs) -> Mamba2LM:
    """This library's model with the same weights: the parameters have the same names."""
    model = Mamba2LM(Mamba2Config(d_model=24, n_layer=2, vocab_size=VOCAB, d_state=8, headdim=8, ngroups=2))
    model.load_state_dict(theirs.state_dict())
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_policy_of_next_to_nothing_reads_as_theirs(build, shape):
    model, ids = build(**shape), _ids()
    expected = _logits(model, ids)
    stepped = _theirs(model, ids, [12, *[1] * 8]) if "D_has_hdim" not in shape else expected  # (its step has no such D)
    tokens = model.generate(ids, max_length=26) if "D_has_hdim" not in shape else None
    assert expected.std() > 0.01
    _set(adopt(model), ScanPolicy(gain=1 + 1e-7))
    torch.testing.assert_close(_logits(model, ids), expected, **NEAR)
    torch.testing.assert_close(_theirs(model, ids, [12, *[1] * 8]), stepped, **NEAR)
    if tokens is not None:
        assert torch.equal(model.generate(ids, max_length=26), tokens)


@torch.no_grad()
def test_its_own_forward_refuses_a_way_to_read(build):
    theirs, ids = build(), _ids()
    ours, plain = adopt(theirs), _logits(theirs, ids)
    cut = torch.cat([_logits(theirs, part) for part in ids.split(7, 1)], 1)
    with mitigate(ours, "reset:every=7"):
        for call in (theirs, theirs.backbone, theirs.backbone.forward, lambda ids: theirs.generate(ids, max_length=22)):
            with pytest.raises(InputError, match=r"reset:every=7 .* is a way to read"):
                call(ids)
        torch.testing.assert_close(_stream(ours, ids, [20])[0], cut, **NEAR)
    assert torch.equal(_logits(theirs, ids), plain) and not torch.allclose(cut, plain)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_against_our_own_model(build, policy):
    theirs, ids = build(ngroups=2), _ids(2, 30)
    ours, adopted = _ours(theirs), adopt(theirs)
    plain = _logits(theirs, ids)
    _set(ours, policy)
    _set(adopted, policy)
    expected = ours.logits(ours(ids))
    assert (expected - plain).abs().max() > 1e-3, "the policy does nothing here"
    torch.testing.assert_close(_logits(theirs, ids), expected, **NEAR)
    torch.testing.assert_close(_theirs(theirs, ids, [9, 1, 12, 1, 7]), expected, **NEAR)
    torch.testing.assert_close(_theirs(theirs, ids, [1] * 30), expected, **NEAR)
    found, cache = _stream(adopted, ids, [7, 1, 14, 8])
    torch.testing.assert_close(found, expected, **NEAR)
    own = ours.new_cache()
    ours(ids, own)
    for a, b in zip(cache.layers, own.layers):
        torch.testing.assert_close(a.conv, b.conv, **NEAR)
        torch.testing.assert_close(a.scan.log_decay, b.scan.log_decay, **NEAR)
        assert a.scan.position.tolist() == [30, 30]
        if policy.window is None:
            torch.testing.assert_close(a.scan.state, b.scan.state, **NEAR)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :8] = False
    padded, _ = _stream(adopted, ids, [10, 20], mask)
    torch.testing.assert_close(padded[mask], ours.logits(ours(ids, mask=mask))[mask], **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": False, "dt_limit": (0.01, math.inf), "ngroups": 2}])
def test_what_we_save_they_load(shape, on_cpu, randomise, tmp_path):
    ours = randomise(Mamba2LM(Mamba2Config(24, 2, VOCAB, d_state=8, headdim=8, **shape))).eval()
    checkpoint.save(ours, tmp_path / "a", layout="state-spaces")
    theirs = MambaLMHeadModel.from_pretrained(str(tmp_path / "a")).eval()
    for module in theirs.modules():  # kernels of a GPU alone
        module.fused_add_norm = module.use_mem_eff_path = False
    ids = _ids()
    torch.testing.assert_close(theirs(ids).logits, ours.logits(ours(ids)), **NEAR)
    theirs.save_pretrained(tmp_path / "b")  # what they write is read again
    assert checkpoint.load(tmp_path / "b").weights_hash == checkpoint.load(tmp_path / "a").weights_hash


@torch.no_grad()
def test_plain_streams(build):
    """Without a policy the library's own forward reads, but what it cannot."""
    model, ids = build(), _ids()
    expected, adopted = _logits(model, ids), adopt(model)
    assert torch.equal(_stream(adopted, ids, [20])[0], expected) and adopted.backend == "mamba_ssm"
    torch.testing.assert_close(_stream(adopted, ids, [7, 1, 9, 1, 2])[0], expected, **NEAR)
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    padded, _ = _stream(adopted, ids, [8, 12], mask)
    torch.testing.assert_close(padded[1, 6:], _logits(model, ids[1:, 6:])[0], **NEAR)
    assert all(m.policy == PLAIN and not {"forward", "step"} & set(vars(m.module)) for m in adopted.mixers)
    with mitigate(adopted, "rri"):
        assert adopted.backend == "torch"
    assert adopted.dtype == torch.float32 and len(adopted.weights_hash) == 16
    assert adopted.scan_state_elements == 2 * 6 * 8 * 8 and adopted.conv_state_elements == 2 * 64 * 3


@torch.no_grad()
def test_on_and_off(build):
    model, ids = build(), _ids()
    logits, tokens = _logits(model, ids), model.generate(ids, max_length=26)
    stepped, names = _theirs(model, ids, [12, *[1] * 8]), list(model.state_dict())
    with mitigate(model, "rri:alpha=0.9,beta=0.4"), mitigate(model, "window:tokens=4") as handle:
        assert active(model)[0] == "rri:alpha=0.9,beta=0.4+window:tokens=4"
        assert not torch.equal(_logits(model, ids), logits)
        handle.remove()
        assert not torch.equal(_theirs(model, ids, [12, *[1] * 8]), stepped)
    assert torch.equal(_logits(model, ids), logits) and torch.equal(_theirs(model, ids, [12, *[1] * 8]), stepped)
    assert torch.equal(model.generate(ids, max_length=26), tokens) and list(model.state_dict()) == names


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_generate_is_recomputation(build, policy):
    model, ids = build(), _ids(2, 9)
    adopted = adopt(model)
    _set(adopted, policy)
    tokens = model.generate(ids, max_length=21)
    for t in range(9, 21):
        assert torch.equal(tokens[:, t], _logits(model, tokens[:, :t])[:, -1].argmax(-1))
    assert torch.equal(generate(adopted, ids, 12), tokens[:, 9:])


@torch.no_grad()
def test_steps_from_states_of_the_library(build):
    mixer, u = build().backbone.layers[0].mixer, torch.randn(2, 15, 24)
    adopt(nn.Sequential(mixer)).mixers[0].policy = POLICIES["cap every 7"]  # a model that this library cannot read
    conv, state = mixer.allocate_inference_cache(2, 15)
    parts = [mixer.step(u[:, t : t + 1], conv, state)[0] for t in range(15)]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(u), **NEAR)
    flat = mixer(u.flatten(0, 1), seqlen=15)
    torch.testing.assert_close(flat.unflatten(0, (2, 15)), mixer(u), **NEAR)


@torch.no_grad()
def test_packed_rows_begin_anew(build):
    mixer, u = build().backbone.layers[0].mixer, torch.randn(1, 20, 24)
    adopt(nn.Sequential(mixer)).mixers[0].policy = POLICIES["cap every 7"]
    seq_idx = torch.tensor([[0] * 9 + [1] * 11], dtype=torch.int32)
    packed = mixer(u, seq_idx=seq_idx)
    torch.testing.assert_close(packed, torch.cat([mixer(u[:, :9]), mixer(u[:, 9:])], 1), **NEAR)
    with pytest.raises(InputError, match="seq_idx"):
        mixer(u, cu_seqlens=torch.tensor([0, 9, 20]))


@torch.no_grad()
def test_the_limit_of_dt(build):
    model, ids = build(dt_limit=(0.3, 0.6)), _ids()
    whole, stepped = _logits(model, ids), _theirs(model, ids, [12, *[1] * 8])
    assert (whole - stepped).abs().max() > 1e-3  # the library's step ignores it, and so does ours
    _set(adopt(model), ScanPolicy(gain=1 + 1e-7))
    torch.testing.assert_close(_logits(model, ids), whole, **NEAR)
    torch.testing.assert_close(_theirs(model, ids, [12, *[1] * 8]), stepped, **NEAR)
    adopt(model, time_step_limit_in_decode=True)
    torch.testing.assert_close(_theirs(model, ids, [12, *[1] * 8]), whole, **NEAR)


@torch.no_grad()
def test_a_cache_goes_where_its_rows_go(build):
    model, ids, more = build(), _ids(3, 10), _ids(3, 9)
    adopted = adopt(model)
    _set(adopted, POLICIES["cap every 7"])
    cache = adopted.new_cache()
    adopted(ids, cache)
    rows = torch.tensor([2, 0, 0, 1])
    moved, cloned = cache.rows(rows), cache.clone()
    expected = adopted.logits(adopted(more, cache))
    assert torch.equal(adopted.logits(adopted(more, cloned)), expected)
    torch.testing.assert_close(adopted.logits(adopted(more[rows], moved)), expected[rows], **NEAR)
    assert moved.position.tolist() == [19] * 4
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.zero_()
    torch.testing.assert_close(_logits(model, ids), _stream(adopted, ids, [10])[0], **NEAR)


@torch.no_grad()
def test_a_cache_from_before_the_remedy(build):
    model, ids = build(), _ids()
    params = InferenceParams(max_seqlen=21, max_batch_size=2)
    model(ids, inference_params=params)
    params.seqlen_offset = 20
    with mitigate(model, "rri"):
        model(ids[:, :1], inference_params=copy.deepcopy(params))  # needs no position
    with mitigate(model, "window:tokens=8"), pytest.raises(InputError, match="start a new cache"):
        model(ids[:, :1], inference_params=params)


@torch.no_grad()
def test_sixteen_bit_states_are_read_wide(build):
    model, ids = build(), _ids()
    adopted = adopt(model)
    _set(adopted, POLICIES["gates"])
    expected = _logits(model, ids)
    model.to(torch.bfloat16)
    found, cache = _stream(adopted, ids, [9, 1, 10])
    assert found.dtype == torch.float32 and cache.layers[0].scan.state.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 * expected.std()
    params = InferenceParams(21, 2, key_value_memory_dict=model.allocate_inference_cache(2, 21))
    theirs = model(ids, inference_params=params).logits  # states of the weights' type, made by the library
    assert params.key_value_memory_dict[0][1].dtype == torch.bfloat16
    assert (theirs.float() - expected).abs().mean() < 0.1 * expected.std()


@torch.no_grad()
def test_states_of_fewer_bits(build):
    theirs, ids = build(ngroups=2), _ids(2, 24)
    ours, adopted, sizes = _ours(theirs), adopt(theirs), [12, *[1] * 12]
    plain = _theirs(theirs, ids, sizes)
    for each in (ours, adopted):
        each.use_state_dtype("bfloat16")
    cache = ours.new_cache()
    expected = torch.cat([ours.logits(ours(part, cache)) for part in ids.split(sizes, 1)], 1)
    assert (expected - plain).abs().max() > 1e-3
    # (a last bit of float32 may tip one of bfloat16)
    assert (_theirs(theirs, ids, sizes) - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()
    assert (_stream(adopted, ids, sizes)[0] - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()
    adopted.use_state_dtype(None)
    assert torch.equal(_theirs(theirs, ids, sizes), plain)


def test_gradients(build):
    model, ids = build().train(), _ids()
    mitigate(model, "rri:alpha=0.9,beta=0.4")
    model(ids).logits.logsumexp(-1).sum().backward()
    assert all(m.module.A_log.grad.abs().sum() > 0 for m in adopt(model).mixers)


@torch.no_grad()
def test_mamba2_simple(on_cpu, randomise):
    mixer = mamba2_simple.Mamba2Simple(24, d_state=8, headdim=8, use_mem_eff_path=False)
    model, u = randomise(nn.Sequential(mixer)), torch.randn(2, 15, 24)
    expected = model(u)
    with mitigate(model, "rri:alpha=0.9,beta=0.4"):
        assert (model(u) - expected).abs().max() > 1e-3
    _set(adopt(model), ScanPolicy(gain=1 + 1e-7))
    torch.testing.assert_close(model(u), expected, **NEAR)
    with pytest.raises(InputError, match="no MambaLMHeadModel"):
        adopt(model)(_ids())


@torch.no_grad()
def test_wrapped(build):
    class Wrap(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.m = model

    model, ids = build(), _ids()
    adopted, expected = adopt(model), _logits(model, ids)
    assert not adopted.attends and adopt(nn.Sequential(model)) is adopted
    for wrapped in (nn.Sequential(model), torch.optim.swa_utils.AveragedModel(model)):
        torch.testing.assert_close(_stream(adopt(wrapped), ids, [7, 1, 12])[0], expected, **NEAR)
        with mitigate(wrapped, "rri:alpha=0.9,beta=0.4"):
            changed = wrapped(ids).logits
            assert (changed - expected).abs().max() > 1e-3
            torch.testing.assert_close(_stream(adopt(wrapped), ids, [7, 1, 12])[0], changed, **NEAR)
    with pytest.raises(InputError, match=r"give the model inside it, MODEL\.m$"):
        adopt(Wrap(model))


def test_what_is_refused(build):
    model = build()
    params = InferenceParams(21, 2, lengths_per_sample=torch.zeros(2))  # what `generate(cg=True)` gives
    with mitigate(model, "rri"), pytest.raises(InputError, match="cg=True"):
        model(_ids(), inference_params=params)
    config = MambaConfig(d_model=24, n_layer=1, vocab_size=VOCAB, ssm_cfg={"layer": "Mamba1"}, fused_add_norm=False)
    with pytest.raises(InputError, match="Mamba-1 mixer of mamba_ssm"):
        adopt(MambaLMHeadModel(config))
    with pytest.raises(InputError, match="learned state"):
        adopt(nn.Sequential(mamba2_simple.Mamba2Simple(24, d_state=8, headdim=8, learnable_init_states=True)))

    class Other(mamba2.Mamba2):
        def forward(self, u):
            return super().forward(u)

    with pytest.raises(InputError, match="a forward of its own"):
        adopt(nn.Sequential(Other(24, d_state=8, headdim=8)))
    with pytest.raises(InputError, match="layers of attention"):
        model.backbone.layers.append(nn.Identity())
        adopt(model)(_ids())


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_its_kernels(randomise, dtype):
    ssm = {"layer": "Mamba2", "d_state": 64, "headdim": 64}
    config = MambaConfig(d_model=256, n_layer=2, vocab_size=256, ssm_cfg=ssm)
    model = randomise(MambaLMHeadModel(config)).eval().to("cuda", dtype)
    ids = torch.randint(256, (2, 300), device="cuda")
    far = 0.02 * float(model(ids).logits.float().std()) * (1 if dtype == torch.float32 else 4)
    near = {"rtol": torch.finfo(dtype).eps, "atol": far}  # a logit of bfloat16 may be rounded the other way
    expected, tokens = model(ids).logits, model.generate(ids, max_length=310)
    adopted = adopt(model)
    torch.testing.assert_close(_stream(adopted, ids, [130, 1, 169])[0], expected.float(), **near)
    with mitigate(model, "rri:alpha=0.9,beta=0.4"), mitigate(model, "a-scale:scale=1.5"):
        changed = model(ids).logits
        assert not torch.equal(changed, expected)
        torch.testing.assert_close(_theirs(model, ids, [128, 100, 70, 1, 1]).float(), changed.float(), **near)
        model.generate(ids, max_length=310)
        with pytest.raises(InputError, match="cg=True"):
            model.generate(ids, max_length=310, cg=True)
    assert torch.equal(model(ids).logits, expected) and torch.equal(model.generate(ids, max_length=310), tokens)


@torch.no_grad()
@pytest.mark.parametrize("policy", [PLAIN, *POLICIES.values()], ids=["plain", *POLICIES])
def test_a_conversation_in_rows_that_end_apart(build, policy):
    adopted, tokenizer = adopt(build()), ByteTokenizer()
    _set(adopted, policy)
    prompts, how = [_ids(1, n)[0].tolist() for n in (3, 6)], {"temperature": 9.0, "seed": 1}
    adopted.tokenizer = None
    free = generate(adopted, prompts, 8, **how).tolist()
    adopted.tokenizer, tokenizer.eos_id = tokenizer, free[0][2]
    cache = adopted.new_cache()
    generate(adopted, prompts, 8, cache=cache, **how)
    rows = [[*p, *said[: said.index(free[0][2]) + 1 if free[0][2] in said else 8]] for p, said in zip(prompts, free)]
    assert cache.position.tolist() == [len(row) for row in rows]
    more = _ids(2, 4)
    found = adopted.logits(adopted(more, cache))
    for row, token, logits in zip(rows, more, found):
        wanted = adopted.logits(adopted(torch.tensor([[*row, *token.tolist()]])))[0, -4:]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-3)
