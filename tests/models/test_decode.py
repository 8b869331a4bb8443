"""The decoder against the model's own step, which tests/models/test_mamba2.py holds to the definition."""

import pytest
import torch

pytest.importorskip("triton")

from rnn_longctx.errors import InputError
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.generate import generate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

if triton.missing():
    pytest.skip(triton.missing(), allow_module_level=True)

from rnn_longctx.models.kernels import matvec
from rnn_longctx.recurrence.ssd.kernels import decode

DEVICE = "cpu" if triton.interpreted() else "cuda"
POLICIES = {
    "plain": ScanPolicy(),
    "rri": ScanPolicy(add=-0.01, gain=0.75, mul=0.5),
    "filtered": ScanPolicy(min_dt=0.02),
    "cap a token": ScanPolicy(caps=(Cap(0.3),)),
    "cap every 3, per head": ScanPolicy(caps=(Cap((0.2, 0.4, 0.2, 9.0), 3),)),
    "reset": ScanPolicy(reset=5),
}


def small(ngroups=2, bias=False):
    torch.manual_seed(1)
    config = Mamba2Config(d_model=20, n_layer=2, vocab_size=50, d_state=12, headdim=10, ngroups=ngroups, bias=bias)
    return Mamba2LM(config).to(DEVICE).eval()


@torch.no_grad()
def both(model, cache, tokens):
    """The logits of tokens (B, T), stepped by the decoder and by the model."""
    decoder = Decoder(model, cache.clone())
    ours = torch.stack([decoder(tokens[:, i]) for i in range(tokens.shape[1])], 1)
    return (
        ours,
        torch.stack([model.logits(model(tokens[:, i : i + 1], cache)[:, 0]) for i in range(tokens.shape[1])], 1),
        decoder,
    )


@torch.no_grad()
def test_follows_weights_that_change_between_two_tokens():
    """Numbers written in place, and tensors put in the place of others."""
    model, tokens, cache = small(), torch.randint(50, (2, 4), device=DEVICE), Cache()
    model(torch.randint(50, (2, 7), device=DEVICE), cache)
    decoder, last = Decoder(model, cache.clone()), None
    for i, token in enumerate(tokens.unbind(1)):
        mixer = model.mixers[i % 2]
        if i == 1:
            mixer.A_log.data.add_(2.0)
        if i == 2:
            mixer.out_proj.weight.data = mixer.out_proj.weight * 3
        if i == 3:
            mixer.D = torch.nn.Parameter(mixer.D + 1)
        ours, expected = decoder(token), model.logits(model(token[:, None], cache)[:, 0])
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert last is None or not torch.allclose(expected, last, rtol=1e-3)
        last = expected


@pytest.mark.parametrize(("name", "rows"), [*((name, 2) for name in POLICIES), ("rri", matvec.MOST + 1)])
def test_steps_as_the_model_does(name, rows):
    model, tokens = small(bias=name == "rri"), torch.randint(50, (rows, 4), device=DEVICE)
    for mixer in model.mixers:
        mixer.policy = POLICIES[name]
    cache, prompt = Cache(), torch.randint(50, (rows, 7), device=DEVICE)
    mask = torch.ones(rows, 7, dtype=torch.bool, device=DEVICE)
    mask[1, :4] = False  # rows that stand at different positions
    with torch.no_grad():
        model(prompt, cache, mask)
    ours, expected, decoder = both(model, cache, tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    out = decoder.cache()
    assert out.position.tolist() == cache.position.tolist() == [11, 7, *[11] * (rows - 2)]
    for a, b in zip(out.layers, cache.layers):
        torch.testing.assert_close(a.conv, b.conv, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.scan.state, b.scan.state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.scan.log_decay, b.scan.log_decay, rtol=1e-4, atol=1e-5)


def test_a_policy_may_change_between_tokens():
    model, cache = small(ngroups=1), Cache()
    tokens = torch.randint(50, (1, 4), device=DEVICE)
    with torch.no_grad():
        model(tokens, cache)
        decoder = Decoder(model, cache.clone())
        for i in range(4):
            if i == 2:
                for mixer in model.mixers:
                    mixer.policy = POLICIES["rri"]
            expected = model.logits(model(tokens[:, i : i + 1], cache)[:, 0])
            torch.testing.assert_close(decoder(tokens[:, i]), expected, rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    model, cache = small(), Cache()
    assert "nothing has been read" in Decoder.refuses(model, cache)
    with torch.no_grad():
        model(torch.randint(50, (1, 3), device=DEVICE), cache)
    assert Decoder.refuses(model, cache) is None
    model.mixers[1].policy = ScanPolicy(window=4)
    assert "window" in Decoder.refuses(model, cache)
    model.mixers[1].policy = ScanPolicy()
    model.restart = Restart(every=4, overlap=1)
    assert "restart" in Decoder.refuses(model, cache)
    with pytest.raises(InputError, match="restart"):
        Decoder(model, cache)
    model.restart = None
    handle = model.mixers[0].in_proj.register_forward_hook(lambda module, args, out: out * 2)
    assert "hooks" in Decoder.refuses(model, cache)
    handle.remove()
    assert Decoder.refuses(model, cache) is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_launches_of_every_kind_agree(rows, monkeypatch):
    """In bfloat16: a matrix product after a norm of its own, and one launch for both, dependent or not."""
    torch.manual_seed(1)
    model = Mamba2LM(Mamba2Config(d_model=1024, n_layer=4, vocab_size=999, bias=True)).to(DEVICE, torch.bfloat16).eval()
    tokens, cache, logits = torch.randint(999, (rows, 300), device=DEVICE), Cache(), []
    with torch.no_grad():
        model(tokens, cache)
    for most, dependent in ((0, False), (4, False), (4, True)):
        monkeypatch.setattr(matvec, "MOST", most)
        monkeypatch.setattr(decode, "DEPENDENT", dependent)
        decoder = Decoder(model, cache.clone())
        logits.append(torch.stack([decoder(tokens[:, i]) for i in range(300)]))
    assert torch.equal(logits[1], logits[2])
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@torch.no_grad()
def test_a_card_that_is_not_the_current_one():
    """triton-lang/triton#2441, #5205: kernels and graphs take the current card, wherever the tensors are."""
    first = small(ngroups=1)
    second = small(ngroups=1).to("cuda:1")
    tokens = torch.randint(50, (2, 12), device="cuda:0")
    said = [generate(model, tokens, 20).cpu() for model in (first, second, first)]
    assert torch.cuda.current_device() == 0
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
