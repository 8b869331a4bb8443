"""Every mixer keeps the contract: what a new file in rnn_longctx/models/mixers is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models import attention, checkpoint
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import TYPES, carry
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixer_reading import MixerReading
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.gla import GLA
from rnn_longctx.models.mixers.mamba2 import Mamba2, Mamba2Config
from rnn_longctx.models.restart import Crop
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.recurrence.ssd.scan import scan
from rnn_longctx.testing import mixers as contract

MIXED = ["mamba2:d_state=4,headdim=8", "sliding-window:window=5,heads=2", "gla:heads=2"]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("text", [text for name in MIXERS for text in contract.examples(name)])
def test_the_contract(text, check, seed):
    check(text, seed)


@torch.no_grad()
def test_layers_of_several_kinds(tmp_path):
    model = LM(ModelConfig(MIXED, d_model=16, n_layer=4, vocab_size=20, mlp=1.5)).eval()
    assert [type(layer.mixer).name for layer in model.layers] == ["mamba2", "sliding-window", "gla", "mamba2"]
    assert [type(mixer).name for mixer in model.mixers] == ["mamba2", "gla", "mamba2"]
    assert model.attends and all(layer.mlp is not None for layer in model.layers)
    size = model.state_size()
    assert set(size.fixed) == {"scan", "conv"} and not size.per_token and size.windows == {4: 2 * 16}
    assert size.total(3) - size.total() == 3 * 2 * 16 and size.total(4) == size.total(1000)
    checkpoint.save(model, tmp_path / "mixed")
    loaded = checkpoint.load(tmp_path / "mixed")
    assert loaded.config == model.config and loaded.weights_hash == model.weights_hash
    ids = torch.randint(20, (2, 30))
    cache, expected = Cache(), model(ids)
    out = torch.cat([loaded(part, cache) for part in ids.split([11, 19], 1)], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="is for models of Mamba-2 alone"):
        checkpoint.save(model, tmp_path / "other", layout="transformers")


def test_a_flat_config_is_a_model_of_mamba2_layers():
    flat = Mamba2Config(d_model=32, n_layer=2, d_state=8, headdim=8)
    torch.manual_seed(3)
    a = LM(flat)
    torch.manual_seed(3)
    b = LM(ModelConfig("mamba2:d_state=8,headdim=8", d_model=32, n_layer=2))
    ids = torch.randint(256, (1, 9))
    assert torch.equal(a(ids), b(ids)) and list(a.state_dict()) == list(b.state_dict())
    assert a.state_size().fixed == {"scan": flat.scan_state_elements, "conv": flat.conv_state_elements}
    assert model_config({"d_model": 32, "n_layer": 1}) == Mamba2Config(d_model=32, n_layer=1)
    assert model_config({"mixer": "gla", "n_layer": 1}) == ModelConfig("gla", n_layer=1)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"mixer": "mambo2"}, "unknown mixer 'mambo2'.*mamba2"),
        ({"mixer": "gla:head=2"}, "gla has no parameter 'head'.*heads"),
        ({"mixer": "gla:heads=5"}, "channels do not divide into 5 heads"),
        ({"mixer": []}, "expected at least one"),
        ({"mixer": "gla", "d_state": 4}, 'unknown key "d_state"'),
        ({"mixer": "sliding-window:window=1"}, "a window of at least 2 tokens"),
        ({"mixer": "gla", "mlp": -1.0}, "mlp: expected"),
        ({"d_modl": 4}, 'unknown key "d_modl".*d_model'),
    ],
)
def test_a_config_that_is_none(data, message):
    with pytest.raises(InputError, match=message):
        model_config(data)


# --- the contract can fail


class Averages(torch.nn.Module):
    """The mean of the inputs so far: a toy mixer, sound unless `fault` says otherwise."""

    name, attends = "averages", False

    @dataclass(frozen=True)
    class Config:
        fault: str = "none"

    def __init__(self, config, model):
        super().__init__()
        self.fault = config.fault
        self.proj = torch.nn.Linear(model.d_model, model.d_model)

    @classmethod
    def of(cls, config, model):
        return cls(config, model)

    def new_carry(self, rows):
        width, fault = self.proj.in_features, self.fault
        total = torch.zeros(rows, width, dtype=self.proj.weight.dtype)
        return Total(total + (fault == "beginning"), torch.zeros(rows, dtype=torch.int64))

    def state_size(self):
        return StateSize({"total": self.proj.in_features + (self.fault == "size")})

    def forward(self, u, carry, span):
        fault = self.fault
        begun = carry is not None
        carry = Total(u.new_zeros(len(u), u.shape[2]), torch.zeros(len(u), dtype=torch.int64)) if not begun else carry
        x = self.proj(u)
        if fault == "future":
            x = x + x.roll(-1, 1)
        mask = torch.ones(u.shape[:2], dtype=torch.bool) if span.mask is None or fault == "padding" else span.mask
        x = x * mask[..., None]
        reset = torch.zeros(u.shape[:2], dtype=torch.bool) if span.reset is None or fault == "documents" else span.reset
        document = reset.long().cumsum(1)
        same = (document[:, :, None] == document[:, None]).tril()  # (B, T, T)
        total, count = carry.total, carry.count
        if fault == "gradient":
            total = total.detach()
        if fault == "rows":
            total = total.mean(0, keepdim=True).expand_as(total)
        first = (document == 0)[..., None]
        sums = same.to(x.dtype) @ x + first * total[:, None]
        counts = (same & mask[:, None]).sum(2) + (document == 0) * count[:, None]
        after = Total(sums[:, -1], counts[:, -1])
        if fault == "bfloat16" and u.dtype == torch.bfloat16:
            sums = sums.to(torch.float8_e5m2).to(u.dtype)
        if fault == "cut" and begun:
            counts = counts + 1
        return sums / counts.clamp(min=1)[..., None], after


@carry
@dataclass
class Total:
    total: torch.Tensor
    count: torch.Tensor


@pytest.fixture
def averages(monkeypatch):
    monkeypatch.setattr(MIXERS, "_known", {**MIXERS._known})
    MIXERS.register(Averages)


FAULTS = {
    "future": contract.check_no_gradient_from_the_future,
    "padding": contract.check_left_padded_rows_are_rows_alone,
    "documents": contract.check_documents_are_documents_alone,
    "gradient": contract.check_gradients_flow_through_carries,
    "cut": contract.check_any_cut_is_one_pass,
    "rows": contract.check_rows_are_reordered_and_joined,
    "bfloat16": contract.check_bfloat16_is_roughly_float64,
    "size": contract.check_state_size_is_what_a_carry_holds,
    "beginning": contract.check_a_new_carry_is_none,
}


def test_a_mixer_from_elsewhere_keeps_the_contract(averages, seed):
    contract.check_mixer("averages", seed)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mixer_that_breaks_the_contract(averages, fault, seed):
    with pytest.raises(AssertionError, match=f"averages:fault={fault}"):
        FAULTS[fault](f"averages:fault={fault}", seed)


def test_a_mixer_that_follows_no_policy(averages, seed):
    class Lawless(GLA):
        name = "lawless"

        def forward(self, u, carry, span):
            policy, self.policy = self.policy, PLAIN
            y, after = super().forward(u, carry, span)
            self.policy = policy
            return y, after

    MIXERS.register(Lawless)
    assert contract.examples("lawless") == ("lawless",) and contract.examples("gla") == GLA.examples
    with pytest.raises(AssertionError, match="lawless:heads=2: under a norm cap, a state's norm is"):
        contract.check_a_norm_cap_is_followed("lawless:heads=2", seed)


def test_carries_are_registered_by_name():
    with pytest.raises(InputError, match="two carries are called 'Total'"):
        carry(dataclass(type("Total", (), {"__module__": "elsewhere", "__annotations__": {"x": torch.Tensor}})))

    @dataclass
    class Stranger:
        x: torch.Tensor

    with pytest.raises(InputError, match="Stranger is not registered"):
        Cache([Stranger(torch.zeros(1))], torch.zeros(1, dtype=torch.int64)).save("never-written")


def test_what_a_plugin_brought_is_asked_for(averages, tmp_path, monkeypatch):
    """A checkpoint and a saved state of a mixer from elsewhere, where nobody has given the file that has it."""
    model, cache = LM(ModelConfig("averages", d_model=8, n_layer=1, vocab_size=9)), Cache()
    model(torch.randint(9, (1, 3)), cache)
    checkpoint.save(model, tmp_path / "model")
    cache.save(tmp_path / "read.state")
    assert Cache.load(tmp_path / "read.state").layers[0].count.tolist() == [3]
    monkeypatch.delitem(MIXERS._known, "averages")
    monkeypatch.delitem(TYPES, "Total")
    with pytest.raises(InputError, match=r"unknown mixer 'averages'.* give the file that has it with --plugin"):
        checkpoint.load(tmp_path / "model")
    with pytest.raises(InputError, match=r"read.state holds a Total, .* give the file that has it with --plugin"):
        Cache.load(tmp_path / "read.state")


# --- what the newcomers compute


def mixer_of(text, **shape):
    model = LM(ModelConfig(text, **{"d_model": 16, "n_layer": 1, "vocab_size": 9, **shape})).double()
    return model.layers[0].mixer


@torch.no_grad()
def test_gla_is_its_recurrence():
    mixer, u = mixer_of("gla:heads=2,rank=3"), torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = (proj(u).unflatten(-1, (2, -1)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    a = mixer.decay_proj(u).sigmoid().pow(1 / 16).unflatten(-1, (2, -1))
    state, expected = torch.zeros(2, 2, 8, 4, dtype=torch.float64), []
    for t in range(9):
        state = state * a[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        y = (state @ q[:, t, :, :, None])[..., 0] / 4**0.5  # (B, H, P)
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        expected.append(mixer.out_proj(y.flatten(1) * F.silu(mixer.g_proj(u[:, t]))))
    torch.testing.assert_close(mixer(u, None, WHOLE)[0], torch.stack(expected, 1), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 7, 40])
def test_sliding_window_is_softmax_over_a_window(window, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 5)
    mixer, u = mixer_of(f"sliding-window:window={window},heads=2"), torch.randn(1, 23, 16, dtype=torch.float64)
    q, k, v = mixer.in_proj(u).unflatten(-1, (3, 2, 8))[0].unbind(1)  # (T, H, D)
    rates = 10_000.0 ** (-torch.arange(4) / 4)

    def turn(x, place):
        z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), place * rates).to(torch.complex128)
        return torch.cat([z.real, z.imag], -1)

    expected = []
    for t in range(23):
        seen = range(max(0, t - window + 1), t + 1)
        scores = torch.stack([(turn(q[t], t) * turn(k[s], s)).sum(-1) for s in seen]) / 8**0.5  # (S, H)
        values = (scores.softmax(0)[..., None] * v[list(seen)]).sum(0)
        expected.append(mixer.out_proj(values.flatten()))
    torch.testing.assert_close(mixer(u, None, WHOLE)[0][0], torch.stack(expected), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_window_is_as_wide_as_what_was_read():
    """Its carry grows up to the window; one that is wider than that, as old states are, is read on."""
    model = LM(ModelConfig("sliding-window:window=7,heads=2", d_model=16, n_layer=1, vocab_size=9)).double().eval()
    ids, cache, widths = torch.randint(9, (1, 9)), Cache(), []
    for t in range(9):
        model(ids[:, t : t + 1], cache)
        widths.append(cache.layers[0].keys.shape[1])
    assert widths == [1, 2, 3, 4, 5, 6, 6, 6, 6]
    cache = Cache()
    model(ids[:, :3], cache)
    (keys,) = cache.layers
    wide = replace(keys, **{n: F.pad(getattr(keys, n), (0, 0, 0, 0, 3, 0)) for n in ("keys", "values")})
    cache.layers = [wide]
    torch.testing.assert_close(model(ids[:, 3:], cache), model(ids)[:, 3:], rtol=0, atol=1e-9)
    assert cache.layers[0].keys.shape[1] == 6


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_full_attention_goes_on_without_a_mask(positions, monkeypatch):
    """What is held and what is read are two parts of one softmax, with its gradients; what the kernels cannot
    read takes masks."""
    mixer = (
        LM(ModelConfig(f"full-attention:heads=2,positions={positions}", d_model=16, n_layer=1)).double().layers[0].mixer
    )
    u = torch.randn(2, 30, 16, dtype=torch.float64, requires_grad=True)
    cuts = [0, *sorted(torch.randint(1, 30, (3,)).tolist()), 30]
    into = torch.randn_like(u)

    def read() -> list[torch.Tensor]:
        carry, outputs = None, []
        for begin, end in zip(cuts, cuts[1:]):
            if end > begin:
                y, carry = mixer(u[:, begin:end], carry, WHOLE)
                outputs.append(y)
        y = torch.cat(outputs, 1)
        return [y, *torch.autograd.grad((y * into).sum(), [u, *mixer.parameters()])]

    monkeypatch.setattr(attention, "readable", lambda q: False)
    masked = read()
    monkeypatch.undo()
    monkeypatch.setattr(attention, "_chunks", None)
    for a, b in zip(read(), masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@torch.no_grad()
def test_full_attention_goes_on_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)
    with torch.device("cuda"):
        mixer = LM(ModelConfig("full-attention:heads=4", d_model=256, n_layer=1)).bfloat16().layers[0].mixer
        u = torch.randn(2, 3000, 256, dtype=torch.bfloat16)
    whole, carry = mixer(u, None, WHOLE)[0], None
    monkeypatch.setattr(attention, "_chunks", None)
    for piece, expected in zip(u.split([1000, 1, 1999], 1), whole.split([1000, 1, 1999], 1)):
        y, carry = mixer(piece, carry, WHOLE)
        assert (y - expected).float().norm() < 0.01 * expected.float().norm()


@torch.no_grad()
def test_attention_forgets_under_a_control():
    """Attention of ours is cropped as that of an adopted hybrid is."""
    model = LM(ModelConfig("sliding-window:window=30,heads=2", d_model=16, n_layer=1, vocab_size=9)).double().eval()
    ids = torch.randint(9, (1, 24))
    model.restart = Crop(4, 4)
    cropped = model(ids)
    model.restart = None
    for start in range(0, 24, 4):  # every 4 tokens all but the last 4 are forgotten
        alone = model(ids[:, max(0, start - 4) : start + 4])[:, -4:]
        torch.testing.assert_close(cropped[:, start : start + 4], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_tap_sees_what_a_layer_reads(seed):
    model, ids = contract.small_model(Mamba2.examples[0], seed), torch.randint(31, (2, 9))
    readings: list[MixerReading] = []
    model.mixers[1].tap = readings.append
    before = model.weights_hash
    cache = Cache()
    whole = model(ids[:, :5], cache), model(ids[:, 5:], cache)
    model.mixers[1].tap = None
    assert model.weights_hash == before and torch.equal(torch.cat(whole, 1)[:, :5], model(ids[:, :5]))
    first, second = readings
    assert first.carry is None and second.carry is not None and second.inputs.x.shape == (2, 4, 8, 8)
    mixer = model.mixers[1]
    y, _ = scan(second.inputs, second.gates, second.span, carry=second.carry.scan)
    assert mixer.output(y, second.rest).shape == (2, 4, 32)
    assert second.rest.convolved.shape == (2, 4, mixer.channels[0])
