"""What the mixers compute that run on the delta rule: against the formulas of their papers, token after token in
float64. That fla computes the same: tests/models/checkpoint/test_fla_itself.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import fold
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.span import WHOLE

LENGTH, WIDTH = 40, 16


def mixer_of(text: str):
    """A layer whose weights are large enough for every part to matter."""
    mixer = LM(ModelConfig(text, d_model=WIDTH, n_layer=1, vocab_size=9)).double().eval().layers[0].mixer
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn_like(p)
    return mixer


def reading() -> torch.Tensor:
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)


def convolved(mixer, u: torch.Tensor):
    """q, k, v, each behind its own convolution of as many taps."""
    keys, taps = mixer.q_proj.out_features, mixer.conv1d.kernel_size[0]
    sizes = [keys, keys, mixer.v_proj.out_features]
    for proj, weight in zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), mixer.conv1d.weight[:, 0].split(sizes)):
        padded = F.pad(proj(u), (0, 0, taps - 1, 0))
        yield F.silu(torch.stack([(padded[:, t : t + taps].mT * weight).sum(-1) for t in range(LENGTH)], 1))


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def outputs(mixer, u: torch.Tensor, decay: torch.Tensor, top: float, erase=None, write=None) -> torch.Tensor:
    """The heads' normed outputs (B, T, H, P) of the recurrence. decay: (B, T, H, 1 or N); top: of beta; erase, write:
    (B, T, H, N) and (B, T, H, P), or None for beta."""
    heads, size = mixer.heads, mixer.d_state
    q, k, v = (x.unflatten(-1, (-1, width)) for x, width in zip(convolved(mixer, u), (size, size, mixer.headdim)))
    shared = heads // q.shape[2]
    if erase is None:
        erase = write = top * mixer.b_proj(u).sigmoid()[..., None]
    state, ys = torch.zeros(2, heads, mixer.headdim, size, dtype=torch.float64), []
    for t in range(LENGTH):
        for h in range(heads):
            key, query = unit(k[:, t, h // shared]), unit(q[:, t, h // shared]) / size**0.5
            old = state[:, h] * decay[:, t, h, None]
            erased = torch.einsum("bpn,bn,bm->bpm", old, erase[:, t, h] * key, key)
            state[:, h] = old - erased + (write[:, t, h] * v[:, t, h])[..., None] * key[:, None]
            ys.append((state[:, h] @ query[..., None])[..., 0])
    y = torch.stack(ys, 1).unflatten(1, (LENGTH, heads))
    return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight


def same(mixer, u: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(mixer(u, None, WHOLE)[0], mixer.out_proj(expected), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ",v_heads=4,expand_v=0.5", ",neg_eigval=true,d_conv=2"])
def test_gated_deltanet(more):
    mixer, u = mixer_of("gated-deltanet:heads=2,head_dim=6" + more), reading()
    decay = (-mixer.A_log.exp() * F.softplus(mixer.a_proj(u) + mixer.dt_bias)).exp()[..., None]
    y = outputs(mixer, u, decay, 2.0 if "neg" in more else 1.0)
    same(mixer, u, y.flatten(2) * F.silu(mixer.g_proj(u)))


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ",v_heads=4,expand_v=0.5", ",lower_bound=-4", ",neg_eigval=true"])
def test_kda(more):
    mixer, u = mixer_of("kda:heads=2,head_dim=6" + more), reading()
    f = (mixer.f_proj[1].weight @ mixer.f_proj[0].weight @ u[..., None])[..., 0] + mixer.dt_bias
    f, A = f.unflatten(-1, (mixer.heads, 6)), mixer.A_log.exp()[:, None]
    decay = (-4 * (A * f).sigmoid() if "bound" in more else -A * F.softplus(f)).exp()
    y = outputs(mixer, u, decay, 2.0 if "neg" in more else 1.0)
    same(mixer, u, y.flatten(2) * (mixer.g_proj[1](u @ mixer.g_proj[0].weight.T)).sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ",expand_v=0.5,neg_eigval=true"])
def test_gdn2(more):
    mixer, u = mixer_of("gdn2:heads=2,head_dim=6" + more), reading()
    f = (u @ mixer.f_proj[0].weight.T @ mixer.f_proj[1].weight.T + mixer.dt_bias).unflatten(-1, (2, 6))
    decay = (-mixer.A_log.exp()[:, None] * F.softplus(f)).exp()
    erase, write = (proj(u).sigmoid().unflatten(-1, (2, -1)) for proj in (mixer.b_proj, mixer.w_proj))
    y = outputs(mixer, u, decay, 1.0, erase * (2 if "neg" in more else 1), write)
    same(mixer, u, y.flatten(2) * (mixer.g_proj[1](u @ mixer.g_proj[0].weight.T)).sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ",gated=true", ",expand_k=0.5,expand_v=2,neg_eigval=true"])
def test_deltanet(more):
    mixer, u = mixer_of("deltanet:heads=2" + more), reading()
    y = outputs(mixer, u, u.new_ones(2, LENGTH, 2, 1), 2.0 if "neg" in more else 1.0).flatten(2)
    same(mixer, u, y * F.silu(mixer.g_proj(u)) if "gated" in more else y)


@torch.no_grad()
def test_where_decays_begin():
    u = torch.randn(4, LENGTH, 64, dtype=torch.float64)

    def begun(text: str):
        mixer = LM(ModelConfig(text, d_model=64, n_layer=1)).double().layers[0].mixer
        steps = F.softplus(mixer.dt_bias)
        assert float(steps.min()) > 0.9e-3 and float(steps.max()) < 0.11
        beta = mixer.inputs(u, None, WHOLE)[1].input_scale
        assert abs(float(beta.mean()) - 0.5) < 0.05
        return -mixer.A

    for name, low, high in (("gated-deltanet", 0, 16), ("kda", 1, 16)):
        rates = begun(f"{name}:heads=64,head_dim=2,expand_v=1")
        assert float(rates.min()) >= low and float(rates.max()) <= high and abs(float(rates.mean()) - 8) < 2.5
        slow = begun(f"{name}:heads=64,head_dim=2,expand_v=1,A_min=0.001,A_max=1,A_log_uniform=true")
        assert 0.9e-3 < float(slow.min()) < 0.02 and 0.3 < float(slow.max()) <= 1 and float(slow.median()) < 0.15


@torch.no_grad()
def test_rates_are_scaled_where_weights_hold_them(tmp_path):
    for text in ("gated-deltanet:heads=2,head_dim=6", "kda:heads=2,head_dim=6"):
        mixer, u = mixer_of(text), reading()
        before, factor = mixer.inputs(u, None, WHOLE)[1].log_decay, torch.rand(2, dtype=torch.float64) + 0.5
        mixer.scale_rates(factor)
        after = mixer.inputs(u, None, WHOLE)[1].log_decay
        torch.testing.assert_close(after, before * factor.view(2, *(1,) * (before.ndim - 3)), rtol=1e-9, atol=0)
    for text, reason in (
        ("kda:heads=2,head_dim=6,lower_bound=-5", "a kda layer bounds its log-decays by a sigmoid"),
        ("deltanet:heads=2", "a deltanet layer has no decay"),
    ):
        model = LM(ModelConfig(text, d_model=WIDTH, n_layer=1))
        assert model.mixers[0].A is None
        with pytest.raises(InputError, match=reason):
            model.mixers[0].scale_rates(torch.ones(2, dtype=torch.float64))
        with pytest.raises(InputError, match=reason):
            fold(model, "a-scale:scale=1.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gated-deltanet:heads=0", "heads must be at least 1"),
        ("gated-deltanet:heads=2,v_heads=3", "v_heads must be a multiple of heads = 2, got 3"),
        ("gated-deltanet:head_dim=5,expand_v=1.5", "expand_v \\* head_dim must be a whole number, got 7.5"),
        ("gated-deltanet:d_conv=0", "d_conv must be at least 1"),
        ("gated-deltanet:A_log_uniform=true", "expected a range above 0, A_min at most A_max, got 0 to 16"),
        ("kda:dt_min=1,dt_max=0.1", "dt_min at most dt_max, got 1 to 0.1"),
        ("kda:lower_bound=2", "lower_bound must be below 0"),
        ("deltanet:heads=3", "channels do not divide into 3 heads"),
        ("deltanet:heads=0", "at least 1 head"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)
