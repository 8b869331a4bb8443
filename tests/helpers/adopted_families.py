"""What tests of adopted models share: small random models of every family, built from its config, and what is read of
them.
"""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import nn

from rnn_longctx.mitigations import active, handles_on, mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.adopt.cache import cache_name
from rnn_longctx.models.generate import generate
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

VOCAB = 97
COMMON = {"hidden_size": 32, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
HYBRID = {
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rms_norm_eps": 1e-2,  # outputs of the delta rule may be tiny, and a norm makes their rounding large
}  # fmt: skip
# All experts are taken: which ones are, would hang on rounding.
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
QWEN = {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6, **HYBRID,
}  # fmt: skip
KIMI = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "linear_head_dim": 8,
    "linear_num_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mlp_layer_types": ["dense", "sparse", "dense"], **EXPERTS, **HYBRID,
}  # fmt: skip
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


def _nemotron():  # whose steps drop the limit of dt that its prompts respect: one that binds is Zamba2's matter here
    return hf.NemotronHConfig(
        **COMMON, **ATTENTION, head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=1,
        chunk_size=8, layers_block_type=["mamba", "attention", "mlp", "mamba"], mlp_hidden_act="relu2",
        time_step_min=1e-6,
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


def _qwen3_next():
    return hf.Qwen3NextConfig(**COMMON, **QWEN, **EXPERTS, num_experts=2, shared_expert_intermediate_size=16)


def _qwen3_5():
    return hf.Qwen3_5TextConfig(**COMMON, **QWEN, intermediate_size=48)


def _qwen3_5_moe():
    return hf.Qwen3_5MoeTextConfig(**COMMON, **QWEN, **EXPERTS, num_experts=2, shared_expert_intermediate_size=16)


def _olmo_hybrid():  # whose beta goes up to 2
    return hf.OlmoHybridConfig(**COMMON, **QWEN | {"linear_num_key_heads": 4}, intermediate_size=48)


def _kimi_linear():
    return hf.KimiLinearConfig(**COMMON, **KIMI, num_local_experts=2)


def _bailing_hybrid():  # whose gate has a lower bound
    return hf.BailingHybridConfig(**COMMON, **KIMI, num_local_experts=2, n_group=1, topk_group=1)


def _minimax():  # whose decays are fixed, and whose cache is one of its own
    return hf.MiniMaxConfig(
        **COMMON, **ATTENTION, head_dim=8, num_local_experts=2, num_experts_per_tok=2, block_size=8,
        num_hidden_layers=3, layer_types=HYBRID["layer_types"],
    )  # fmt: skip


def _recurrent_gemma():  # whose attention slides
    return hf.RecurrentGemmaConfig(
        **COMMON, **ATTENTION, num_hidden_layers=3, lru_width=32, attention_window_size=8,
    )  # fmt: skip


SCAN_FAMILIES = {
    "mamba2": _mamba2, "bamba": _bamba, "falcon_h1": _falcon_h1, "granitemoehybrid": _granite,
    "nemotron_h": _nemotron, "zamba2": _zamba2, "mamba": _mamba, "falcon_mamba": _falcon_mamba, "jamba": _jamba,
}  # fmt: skip
DELTA_FAMILIES = {
    "qwen3_next": _qwen3_next, "qwen3_5": _qwen3_5, "qwen3_5_moe": _qwen3_5_moe, "olmo_hybrid": _olmo_hybrid,
    "kimi_linear": _kimi_linear, "bailing_hybrid": _bailing_hybrid,
}  # fmt: skip
if not hasattr(hf, "BailingHybridConfig"):  # before transformers 5.20
    del DELTA_FAMILIES["bailing_hybrid"]
GIVEN_FAMILIES = {"minimax": _minimax, "recurrent_gemma": _recurrent_gemma}  # the scan, its gates given
if not hasattr(hf.DynamicCache(config=_recurrent_gemma()).layers[0], "recurrent_states"):  # as in transformers 5.15
    del GIVEN_FAMILIES["recurrent_gemma"]
FAMILIES = {**SCAN_FAMILIES, **DELTA_FAMILIES, **GIVEN_FAMILIES}
RECURRENT = {
    **dict.fromkeys((*DELTA_FAMILIES, *GIVEN_FAMILIES), 2),
    "mamba2": 3,
    "bamba": 2,
    "falcon_h1": 2,
    "granitemoehybrid": 2,
    "nemotron_h": 2,
    "zamba2": 3,
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), 2),
}


@torch.no_grad()
def filled(model):
    """Fill a model's A_log, dt_bias, D, biases, norms and embedding with values far from their defaults."""
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            p.uniform_(math.log(0.01), math.log(16.0))
        elif last == "dt_bias":
            p.uniform_(-4.0, 1.0)
        elif last in ("D", "bias"):
            p.normal_(0.0, 0.5)
        elif "norm" in name:
            p.normal_(1.0, 0.3)
        elif "embedding" in name:
            p.normal_()
    return model


def built(family, vocab=VOCAB, attends=True):
    """A small random model of a family in eval mode, none of whose layers attend where `attends` is False."""
    config = FAMILIES[family]()
    config.vocab_size = vocab
    if not attends and family == "recurrent_gemma":
        config.num_hidden_layers = 2  # of the pattern recurrent, recurrent, attention
    elif not attends and family not in ("mamba2", "mamba", "falcon_mamba"):
        config.layer_types = ["linear_attention"] * config.num_hidden_layers
    model = filled(hf.AutoModelForCausalLM.from_config(config)).eval()
    for m in model.modules():
        if isinstance(m, nn.Linear):  # so that every layer matters
            nn.init.normal_(m.weight, std=m.in_features**-0.5)
        if family in DELTA_FAMILIES and isinstance(m, nn.Conv1d):  # so that states are as large as a scan's
            nn.init.normal_(m.weight)
    filled(model)
    if family in DELTA_FAMILIES:
        nn.init.normal_(model.get_input_embeddings().weight)
    for m in model.modules():  # Qwen's norms scale by 1 + weight
        if type(m).__name__.startswith("Qwen") and type(m).__name__.endswith("RMSNorm"):
            m.weight.data -= 1
    model.generation_config.eos_token_id = None
    return model


MAMBA1 = ("mamba", "falcon_mamba", "jamba")
POLICIES = {
    "gates": ScanPolicy(mul=0.7, add=-0.1, gain=0.75),
    "filter": ScanPolicy(min_dt=0.5),
    "cap every token": ScanPolicy(caps=(Cap(0.5),)),
    "cap every 7": ScanPolicy(caps=(Cap(0.4, 7),)),
    "window": ScanPolicy(window=5),
    "reset": ScanPolicy(reset=6),
}


def cases(policies):
    """Every family with the name of every policy that its recurrence follows, to parametrise ("family", "policy")."""
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in FAMILIES
        for name in policies
        if follows(family, POLICIES[name])
    ]


def follows(family, policy):
    """Whether a family's recurrence follows a policy."""
    if family in DELTA_FAMILIES:
        return DELTA.unfollowed(policy) is None
    return family in SCAN_FAMILIES or policy.min_dt == 0.0


def followed(family, remedy):
    """The remedy, or another one where the family's recurrence has no window."""
    return "delta-scale:scale=0.7" if family in DELTA_FAMILIES and remedy.startswith("window") else remedy


NEAR = {"rtol": 0, "atol": 1e-4}
RRI = "rri:alpha=0.9,beta=0.4"


def cached(model, ids, cache=None):
    """The library's own call with a cache: logits, and the cache moved on."""
    name = cache_name(model)
    out = model(ids, **{name: cache}, use_cache=True)
    return out.logits, out[name]


def random_ids(batch=2, length=20):
    return torch.randint(2, VOCAB, (batch, length))


def put(adopted, policy):
    for mixer in adopted.mixers:
        mixer.policy = policy


@torch.no_grad()
def logits_of(model, ids, **given):
    logits = model(ids, use_cache=False, **given).logits
    assert logits.std() > 0.01  # not a comparison of zeros
    return logits.float()


@torch.no_grad()
def streamed(adopted, ids, cuts):
    cache = adopted.new_cache()
    return torch.cat([adopted.logits(adopted(part, cache)) for part in ids.split(cuts, 1)], 1), cache


@torch.no_grad()
def generates_with_beams_and_padding(model):
    """In the model's own generate beams take their states with them, and padding leaves no trace."""
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    told = {"max_new_tokens": 7, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    beams = {"num_beams": 3, "num_return_sequences": 3}
    found = model.generate(ids, attention_mask=mask, **told, **beams)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **told, **beams)
    torch.testing.assert_close(found.sequences_scores, again.sequences_scores, **NEAR)
    assert torch.equal(found.sequences, again.sequences)
    greedy = model.generate(ids, attention_mask=mask, **told).sequences[1, -7:]
    assert torch.equal(greedy, model.generate(ids[1:, 5:], **told).sequences[0, -7:])


@torch.no_grad()
def own_logits(model, ids):
    out = model(ids)
    logits = out.logits if hasattr(out, "logits") else out[0]
    assert logits.std() > 1e-3  # not a comparison of zeros
    return logits.float()


@torch.no_grad()
def read_as_its_own(model):
    """With and without a remedy; greedy generation is recomputation."""
    ours, ids = adopt(model), random_ids(2, 14)
    before = own_logits(model, ids)
    torch.testing.assert_close(streamed(ours, ids, [5, 1, 8])[0], before, **NEAR)
    with mitigate(model, RRI):
        assert active(model)[0] == active(ours)[0] == RRI and len(handles_on(model)) == 1
        changed = own_logits(model, ids)
        assert (changed - before).abs().max() > 1e-5
        torch.testing.assert_close(streamed(ours, ids, [5, 1, 8])[0], changed, **NEAR)
        new = generate(model, ids, 4)
        whole = own_logits(model, torch.cat([ids, new], 1))[:, 13:-1]
        best = whole.max(-1).values
        assert (best - whole.gather(2, new[..., None])[..., 0]).max() < 1e-4  # (two may be alike to a last bit)
    assert torch.equal(own_logits(model, ids), before) and active(model)[0] == "none"
    return ours
