"""What the mixers compute that run on the scan: against the formulas of their papers, token after token in float64.
That fla computes the same: tests/models/checkpoint/test_fla_itself.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models import attention
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig, model_config
from rnn_longctx.models.lm import LM
from rnn_longctx.models.rotary import turned
from rnn_longctx.recurrence.span import WHOLE

LENGTH, WIDTH = 40, 16


def model_of(text: str, layers: int = 1, width: int = WIDTH) -> LM:
    return LM(ModelConfig(text, d_model=width, n_layer=layers, vocab_size=9)).double().eval()


def stirred(mixer):
    """With norms, biases and bounds that are not what they begin as."""
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.3 * torch.randn_like(p)
    return mixer


def reading() -> torch.Tensor:
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)


def same(mixer, u: torch.Tensor, expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(mixer(u, None, WHOLE)[0], torch.stack(expected, 1), rtol=1e-9, atol=1e-9)


def rms(y: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: torch.Tensor, place: int) -> torch.Tensor:
    """x (..., D) at a place: channels i and i + D / 2 are the parts of a complex number."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * place * rates)
    return torch.cat([z.real, z.imag], -1)


@torch.no_grad()
def test_retnet():
    mixer, u = stirred(model_of("retnet:heads=2").layers[0].mixer), reading()
    state, expected = torch.zeros(2, 2, 16, 8, dtype=torch.float64), []
    pace = 1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)
    for t in range(LENGTH):
        q, k = (rotated(proj(u[:, t]).unflatten(-1, (2, 8)), t) for proj in (mixer.q_proj, mixer.k_proj))
        v = mixer.v_proj(u[:, t]).unflatten(-1, (2, 16))
        state = pace[:, None, None] * state + v[..., None] * k[..., None, :]
        y = rms((state @ q[..., None])[..., 0] / 8**0.5) * mixer.norm.weight
        expected.append(mixer.out_proj(y.flatten(1) * F.silu(mixer.g_proj(u[:, t]))))
    same(mixer, u, expected)


@torch.no_grad()
def test_hgrn2():
    u, model = reading(), model_of("hgrn2:heads=2", layers=3)
    for layer in range(3):
        mixer = stirred(model.layers[layer].mixer)
        bound = torch.zeros(WIDTH) if mixer.bound is None else mixer.bound.sigmoid()
        state, expected = torch.zeros(2, 2, 8, 8, dtype=torch.float64), []
        for t in range(LENGTH):
            f = bound + (1 - bound) * mixer.f_proj(u[:, t]).sigmoid()
            q, f, i = (x.unflatten(-1, (2, 8)) for x in (F.silu(mixer.q_proj(u[:, t])), f, mixer.i_proj(u[:, t])))
            state = state * f[..., None, :] + i[..., None] * (1 - f)[..., None, :]
            y = (state @ q[..., None])[..., 0].flatten(1) / 8**0.5
            expected.append(mixer.out_proj(rms(y) * mixer.norm.weight))
        same(mixer, u, expected)


@torch.no_grad()
def test_mamba1():
    """As mamba-ssm's selective_scan_ref says it, with the convolution before and the gate behind."""
    mixer, u = stirred(model_of("mamba1:d_state=3,d_conv=3").layers[0].mixer), reading()
    x, z = mixer.in_proj(u).chunk(2, -1)  # (B, T, D)
    padded = F.pad(x, (0, 0, 2, 0))
    taps = mixer.conv1d.weight[:, 0]  # (D, 3)
    state, expected = torch.zeros(2, 2 * WIDTH, 3, dtype=torch.float64), []
    for t in range(LENGTH):
        seen = F.silu((padded[:, t : t + 3].mT * taps).sum(-1) + mixer.conv1d.bias)  # (B, D)
        low, B, C = mixer.x_proj(seen).split([1, 3, 3], -1)
        dt = F.softplus(mixer.dt_proj(low))  # (B, D)
        state = (dt[..., None] * -mixer.A_log.exp()).exp() * state + (dt * seen)[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + mixer.D * seen
        expected.append(mixer.out_proj(y * F.silu(z[:, t])))
    same(mixer, u, expected)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("sizes", [[LENGTH], [1, 20, LENGTH - 21]])
def test_full_attention(positions, sizes, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 7)
    mixer, u = model_of(f"full-attention:heads=2,positions={positions}").layers[0].mixer, reading()
    q, k, v = mixer.in_proj(u).unflatten(-1, (3, 2, 8)).unbind(2)  # (B, T, H, D)
    turn = rotated if positions == "rope" else lambda x, place: x
    expected = []
    for t in range(LENGTH):
        scores = torch.stack([(turn(q[:, t], t) * turn(k[:, s], s)).sum(-1) for s in range(t + 1)], 1) / 8**0.5
        values = (scores.softmax(1)[..., None] * v[:, : t + 1]).sum(1)
        expected.append(mixer.out_proj(values.flatten(1)))
    carry, outputs = None, []
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), torch.stack(expected, 1), rtol=0, atol=1e-9)
    assert carry.keys.shape[1] == LENGTH and carry.held.tolist() == [LENGTH] * 2


def test_attention_grows_with_every_token():
    size = model_of("full-attention:heads=2").state_size()
    assert size.per_token == 2 * WIDTH and size.total(1000) == 2000 * WIDTH


@torch.no_grad()
def test_positions_are_as_exact_at_ten_million_tokens():
    """Only distances count, in float32 too."""
    model = model_of("retnet:heads=2").float()
    ids, caches = torch.randint(9, (1, 30)), (Cache(), Cache())
    outputs = []
    for cache, before in zip(caches, (0, 10_000_000)):
        cache.restore(model.new_cache(1))
        cache.layers[0].scan.position += before
        outputs.append(torch.cat([model(piece, cache) for piece in ids.split([11, 1, 18], 1)], 1))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    x = torch.randn(1, 1, 1, 8)
    near, far = turned(x, torch.tensor([3])), turned(x, torch.tensor([10_000_003]))
    assert (near - far).abs().max() > 1e-3  # the angles are others


@torch.no_grad()
def test_where_decays_begin():
    u = torch.randn(4, LENGTH, 64, dtype=torch.float64)

    def decays(text: str, layers: int = 1):
        for layer in model_of(text, layers, 64).layers:
            mixer = layer.mixer
            yield mixer.inputs(u, None, WHOLE)[1].worked_out(torch.float64).log_decay.exp()

    (gla,) = decays("gla:heads=4")
    torch.testing.assert_close(gla, torch.full_like(gla, 0.5 ** (1 / 16)), rtol=0, atol=0.01)
    (retnet,) = decays("retnet:heads=8")
    assert retnet[0, 0].tolist() == pytest.approx([1 - 2.0 ** (-5 - h) for h in range(8)], abs=1e-12)
    for layer, hgrn2 in enumerate(decays("hgrn2:heads=4", 4)):
        begins = layer / 4 + (1 - layer / 4) / 2
        assert float(hgrn2.mean()) == pytest.approx(begins, abs=0.02) and float(hgrn2.min()) > layer / 4
    mixer = model_of("mamba1", 1, 64).layers[0].mixer
    torch.testing.assert_close(mixer.A, -torch.arange(1.0, 17).double().expand(128, 16), rtol=1e-6, atol=0)
    steps = F.softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < float(steps.min()) < 4e-3 and 0.03 < float(steps.max()) < 0.11
    assert float(steps.log().mean()) == pytest.approx(math.log(1e-2), abs=0.6)


def test_rates_of_mamba1_are_scaled():
    mixer = model_of("mamba1:d_state=3").layers[0].mixer
    before, factor = mixer.A.clone(), torch.rand(2 * WIDTH, dtype=torch.float64) + 0.5
    mixer.scale_rates(factor)
    torch.testing.assert_close(mixer.A, before * factor[:, None], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retnet:heads=3", "channels do not divide into 3 heads"),
        ("retnet:heads=16", "positions turn pairs of a key's channels, and a head has 1"),
        ("hgrn2:heads=3", "channels do not divide into 3 heads"),
        ("hgrn2:heads=0", "at least 1 head"),
        ("hgrn2:lower_bound=2", "expected bool"),
        ("mamba1:d_state=0", "d_state must be at least 1"),
        ("mamba1:dt_rank=-1", "dt_rank must be at least 1, or 0"),
        ("full-attention:heads=16", "does not divide into 16 heads of even size"),
        ("full-attention:positions=alibi", "positions"),
        ("gla:expand_k=0.3", "channels do not divide into 4 heads"),
    ],
)
def test_settings_that_do_not_fit(text, message):
    with pytest.raises(InputError, match=message) as error:
        model_config({"mixer": text, "d_model": WIDTH, "n_layer": 1})
    assert "\n" not in str(error.value)
