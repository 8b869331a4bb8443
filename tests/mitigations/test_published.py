"""Each published remedy against its definition, worked out here by brute force; identity settings change nothing."""

import copy
import math

import pytest
import torch
from streams import reference_scan

from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.mitigations import REMEDIES, diagnostics, mitigate, parse_remedy, standard
from rnn_longctx.mitigations.base import NotApplicable
from rnn_longctx.mitigations.token_filter import thresholds
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.generate import continuation, generate, prefill
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.saved_state import save_state
from rnn_longctx.recurrence.span import WHOLE


def scans(model, ids):
    """What every layer's scan is given and gives: (mixer, projected, y before the gated norm)."""
    seen, hooks = [], []
    for mixer in model.mixers:
        hooks.append(mixer.in_proj.register_forward_hook(lambda m, i, o, mixer=mixer: seen.append([mixer, o])))
        hooks.append(mixer.norm.register_forward_pre_hook(lambda m, i: seen[-1].append(i[0])))
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def brute_force(mixer, projected, A, dt_change, keep=None, start=None):
    """The layer's outputs with A (H) and dt changed, token by token, from the projections alone."""
    c = mixer.config
    _, xBC, raw = projected.split([c.d_inner, c.conv_dim, c.nheads], -1)
    padded = torch.nn.functional.pad(xBC.transpose(1, 2), (c.d_conv - 1, 0))
    conv = torch.nn.functional.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=c.conv_dim)
    x, B, C = torch.nn.functional.silu(conv.transpose(1, 2)).split([c.d_inner, c.d_state, c.d_state], -1)
    dt = torch.nn.functional.softplus(raw + mixer.dt_bias)
    decay, scale = dt_change(dt)
    log_decay = decay * A
    if keep is not None:
        log_decay, scale = (torch.where(keep(dt), v, 0.0) for v in (log_decay, scale))
    x = x.unflatten(-1, (c.nheads, c.headdim))
    S = torch.zeros(len(x), c.nheads, c.headdim, c.d_state, dtype=x.dtype) if start is None else start
    ys = []
    for t in range(x.shape[1]):
        S = (
            log_decay[:, t].exp()[..., None, None] * S
            + (scale[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None]
        )
        ys.append((S * C[:, t, None, None]).sum(-1) + mixer.D[:, None] * x[:, t])
    return torch.stack(ys, 1).flatten(2)


CASES = {
    "delta-scale:scale=0.6": lambda i, A: (A, lambda dt: (0.6 * dt, 0.6 * dt)),
    "delta-scale:scale=0.6/1.5/0.9": lambda i, A: (A, lambda dt, s=(0.6, 1.5, 0.9): (s[i] * dt, s[i] * dt)),
    "a-scale:scale=1.7": lambda i, A: (1.7 * A, lambda dt: (dt, dt)),
    "a-winsor:share=0.2": lambda i, A: (A.clamp(torch.quantile(A, 0.2), torch.quantile(A, 0.8)), lambda dt: (dt, dt)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_gates(model, name):
    ids = torch.randint(256, (2, 41))
    with mitigate(model, name):
        seen = scans(model, ids)
    for i, (mixer, projected, y) in enumerate(seen):
        torch.testing.assert_close(y, brute_force(mixer, projected, *CASES[name](i, mixer.A)), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_scaled_decay(model):
    """s exp(dt A), the other place: as if every token's log-decay had log(s) added."""
    ids = torch.randint(256, (1, 30))
    with mitigate(model, "a-scale:scale=0.9,place=decay") as handle:
        seen = scans(model, ids)
    with mitigate(model, "rri:alpha=0.9,beta=1") as other:
        assert handle.plan.policies == other.plan.policies
    for mixer, projected, y in seen:
        expected = brute_force(
            mixer, projected, torch.ones(4).double(), lambda dt, A=mixer.A: (dt * A + math.log(0.9), dt)
        )
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_token_filter(model, made):
    """Global heads skip small steps, others none; the decay left is what training showed."""
    model.mixers[1].A_log.data.copy_(torch.tensor([-9.0, -8.0, 8.0, 9.0]))
    ids = torch.randint(256, (1, 50))
    with mitigate(model, "token-filter:clamp=0", target_length=128, text=made) as handle:
        seen = scans(model, ids)
        assert "made" in handle.plan.calibration
    g = [torch.tensor(m.policy.min_dt) if isinstance(m.policy.min_dt, tuple) else None for m in model.mixers]
    assert g == [None] * 3  # taken off again
    g = torch.tensor(handle.plan.policies[1].min_dt, dtype=torch.float64)
    assert (g[:2] > 0).all() and (g[2:] == 0).all()
    mixer, projected, y = seen[1]
    expected = brute_force(mixer, projected, mixer.A, lambda dt: (dt, dt), keep=lambda dt: dt >= g)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    with mitigate(model, "token-filter", target_length=32, text=made) as handle:
        assert not any(p.changes_gates for p in handle.plan.policies)
    with pytest.raises(NotApplicable, match="target_length"):
        mitigate(model, "token-filter", text=made)


@torch.no_grad()
def test_a_token_filter_does_not_hang_on_rounding(model, made):
    """Steps of the first layer are those of the tokens, so that some token's equals the threshold."""
    lm = model.float()
    for mixer in lm.mixers:
        mixer.A_log.data.fill_(-9.0)
    letters = Text("letters", bytes(torch.randint(97, 105, (5000,)).tolist()))
    ids = torch.randint(97, 105, (3, 60))
    with mitigate(lm, "token-filter", target_length=64, text=letters) as handle:
        g = torch.tensor(handle.plan.policies[0].min_dt)
        off = (measure_steps(lm, ids)[0] / g - 1).abs()
        assert (off.amin((0, 1)) < 2e-4).all() and (off > 2e-5).all()
        whole, cache = lm(ids), Cache()
        torch.testing.assert_close(torch.cat([lm(t, cache) for t in ids.split(1, 1)], 1), whole, rtol=0, atol=1e-4)


def test_thresholds_keep_the_largest_steps():
    dt = torch.tensor([[1.0, 5.0], [4.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert thresholds(dt, 0.7, 0.0).tolist() == [3.0, 5.0]  # 4 + 3 of 10; two of four
    assert thresholds(dt, 0.3, 0.0)[0] == math.inf  # not even the largest
    assert thresholds(dt, 0.7, 0.3)[0] == 3.0  # 4 counts as 3: 3 + 3 of 9
    n = torch.rand(1000, 3)
    g = thresholds(n, 0.25, 0.0)
    kept = torch.where(n >= g, n, 0.0).sum(0) / n.sum(0)
    assert ((kept <= 0.25) & (kept > 0.24)).all()


@torch.no_grad()
def test_starts(model, tmp_path):
    ids, cache = torch.randint(256, (1, 20)), Cache()
    model(torch.randint(256, (1, 30)), cache)
    cache.save(tmp_path / "kept.state")
    with mitigate(model, f"stored-start:file={tmp_path / 'kept.state'}"):
        seen = scans(model, ids)
    for (mixer, projected, y), layer in zip(seen, cache.layers):
        expected = brute_force(mixer, projected, mixer.A, lambda dt: (dt, dt), start=layer.scan.state)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    save_state(tmp_path / "told.state", cache, model)
    with mitigate(model, f"stored-start:file={tmp_path / 'told.state'}"):
        torch.testing.assert_close([part[2] for part in scans(model, ids)], [part[2] for part in seen])
    sister = copy.deepcopy(model)
    sister.mixers[0].D.data.mul_(2)
    with pytest.raises(InputError, match=rf"told.state was read by .*, not by .* {sister.weights_hash}"):
        mitigate(sister, f"stored-start:file={tmp_path / 'told.state'}")
    with mitigate(model, "noise-start:std=0.5,seed=1") as handle:
        starts = torch.tensor(handle.plan.policies[0].start)
        assert starts.shape == (4, 16, 8) and 0.4 < starts.std() < 0.6
        assert not torch.equal(model(ids), model(ids[:, :10].repeat(1, 2)))
    other = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).eval()
    with pytest.raises(InputError, match=r"3 layers of .* the model has 2"):
        mitigate(other, f"stored-start:file={tmp_path / 'kept.state'}")


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1, 2])
def test_decimate(model, first):
    """Against whole sequences, layer after layer, however the prompt is cut into segments."""
    ids = torch.stack([torch.randperm(256)[:40] for _ in range(2)])  # no two alike: the first layer sees no past
    keep = {i: max(3, round(12 * 0.5 ** (i - first))) for i in range(first, 3)}
    expected = []
    for row in ids:
        h = model.backbone.embedding(row[None])
        for i, block in enumerate(model.layers):
            normed = block.norm(h)
            if i in keep:
                size = block.mixer.steps(block.mixer.in_proj(normed))[0].norm(dim=-1)
                chosen = sorted({h.shape[1] - 1, *size[:-1].topk(min(keep[i], h.shape[1]) - 1).indices.tolist()})
                h, normed = h[:, chosen], normed[:, chosen]
            h = h + block.mixer(normed, None, WHOLE)[0]
        expected.append(model.logits(model.backbone.norm_f(h)[:, -1]))
    with mitigate(model, f"decimate:base=12,first={first},least=3"):
        for segment in (40, 7):
            logits, cache = prefill(model, ids, segment=segment)
            torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-8, atol=1e-8)
        assert cache.position.tolist() == [40, 40]
        next(continuation(model, logits, cache))
        with pytest.raises(InputError, match="cannot go on"):
            prefill(model, ids, Cache())
    with mitigate(model, "decimate:base=40,beta=1"):  # nothing is left out
        torch.testing.assert_close(prefill(model, ids)[0], model.logits(model(ids)[:, -1]))
    with pytest.raises(InputError, match="layers 0 to 2"):
        mitigate(model, "decimate:first=3")


@torch.no_grad()
@pytest.mark.parametrize("length", [53, 8, 5])
def test_chunk_select(model, length):
    ids, model.tokenizer.eos_id = torch.randint(256, (2, length)), None  # so that answers go on
    with mitigate(model, "chunk-select:chunk=9,query=5"):
        logits, cache = prefill(model, ids, segment=40)
        assert generate(model, ids, 3).shape == (2, 3)
    for row, output in zip(ids, logits):
        body, question = row[:-5], row[-5:]
        ends = range(len(body), 0, -9) if len(body) else [0]
        prompts = [torch.cat([body[max(0, e - 9) : e], question]) for e in ends]
        each = [model.logits(model(p[None])[:, -1])[0] for p in prompts]
        entropies = [-(v.softmax(-1) * v.log_softmax(-1)).sum() for v in each]
        torch.testing.assert_close(output, each[int(torch.stack(entropies).argmin())], rtol=1e-8, atol=1e-8)
    assert cache.position.tolist() == [length] * 2


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["delta-scale:scale=1", "a-scale:scale=1", "a-scale:scale=1,place=decay", "a-winsor:share=0", "noise-start:std=0"],
)
def test_identity_settings_change_nothing_bit_for_bit(model, name):
    ids = torch.randint(256, (2, 70))
    plain = model(ids)
    with mitigate(model, name):
        assert torch.equal(model(ids), plain)


def test_what_cannot_be_put_on(model):
    with pytest.raises(InputError, match="2 values are given, the model has 3"):
        mitigate(model, "delta-scale:scale=0.5/0.6")
    with pytest.raises(InputError, match="one can be taken"):
        mitigate(model, "decimate+reset:every=8")
    with mitigate(model, "decimate+rri") as handle:
        assert model.reader is not None and model.mixers[0].policy.gain == 0.75
    assert model.reader is None and str(handle.remedy).startswith("decimate")


def test_all_can_be_read_and_put_on(model, made):
    named = {name.partition(":")[0] for name in standard(32)}
    assert named == set(REMEDIES) - {"stored-start"}
    for train in (32, None):
        for name in standard(train):
            assert str(parse_remedy(str(parse_remedy(name)))) == str(parse_remedy(name))
    for name in standard(32):
        if name in diagnostics(32) or name.startswith(("erase", "yarn")):  # of hybrids, rules that erase, attention
            continue
        mitigate(model, name, target_length=64, text=made).remove()


def test_reference_of_a_filter():
    """The definition itself: skipped tokens neither decay nor write."""
    x, dt = torch.randn(1, 6, 1, 2).double(), torch.tensor([0.5, 0.01, 0.3, 0.02, 0.4, 0.6]).double().view(1, 6, 1)
    B, C = torch.randn(1, 6, 1, 3).double(), torch.randn(1, 6, 1, 3).double()
    from rnn_longctx.recurrence.policy import ScanPolicy

    A = -torch.ones(1).double()
    y, state, _ = reference_scan(x, dt, A, B, C, dt_softplus=False, policy=ScanPolicy(min_dt=0.1))
    some = [0, 2, 4, 5]
    z, left, _ = reference_scan(x[:, some], dt[:, some], A, B[:, some], C[:, some], dt_softplus=False)
    torch.testing.assert_close(y[:, some], z)
    torch.testing.assert_close(state, left)
