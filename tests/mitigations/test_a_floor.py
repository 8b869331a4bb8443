"""The floor of A against its definition, head by head and token by token."""

import math

import pytest
import torch

from rnn_longctx.data import tokens
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import SLICES
from rnn_longctx.mitigations import NotApplicable, mitigate, standard
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.recurrence.policy import PLAIN


@pytest.fixture
def model(model):
    """Of heads far below the floor and, in every layer, one far above it."""
    for mixer in model.mixers:
        mixer.A_log.data.uniform_(-7, 1)
        mixer.A_log.data[1] = 7.0
    return model


def steps_of_each(model, rows):
    """dt of every layer, row, token and head, from the inputs of in_proj, one product at a time."""
    seen, hooks = [], []
    for mixer in model.mixers:
        hooks.append(mixer.in_proj.register_forward_pre_hook(lambda m, given: seen.append(given[0])))
    model(rows)
    for hook in hooks:
        hook.remove()
    outputs = []
    for mixer, u in zip(model.mixers, seen):
        weight = mixer.in_proj.weight[-mixer.heads :]
        outputs.append(
            [
                [
                    [math.log1p(math.exp(float(weight[h] @ x + mixer.dt_bias[h]))) for h in range(mixer.heads)]
                    for x in row
                ]
                for row in u
            ]
        )
    return outputs


def floored(model, rows, limit):
    """A' of the definition, [layer][head], for steps on rows (n, T)."""
    result = []
    for mixer, layer in zip(model.mixers, steps_of_each(model, rows)):
        rates = []
        for h in range(mixer.heads):
            A = -math.exp(float(mixer.A_log[h]))
            decays = [dt[h] * abs(A) for row in layer for dt in row]
            rates.append(A * max(1.0, (1 / limit) / (math.fsum(decays) / len(decays))))
        result.append(rates)
    return torch.tensor(result, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize(("name", "limit"), [("a-floor", 32), ("a-floor:tokens=9", 9), ("a-floor:tokens=301", 301)])
def test_definition(model, made, name, limit):
    rows = torch.stack([torch.from_numpy(tokens(made, model.tokenizer, i, 32)[0]) for i in range(SLICES)])
    expected = floored(model, rows, limit)
    ids = torch.randint(256, (2, 45))
    with mitigate(model, name, text=made) as handle:
        outputs = model(ids)
        mul = torch.stack([torch.tensor(m.policy.mul, dtype=torch.float64).expand(4) for m in model.mixers])
        assert "made" in handle.plan.calibration and handle.plan.calibration.endswith("8 x 32")
    before = torch.stack([m.A for m in model.mixers])
    torch.testing.assert_close(mul * before, expected, rtol=1e-6, atol=0)  # steps are measured in float32
    assert (mul[:, 1] == 1).all() and (mul > 1).any()
    for mixer, A in zip(model.mixers, expected):
        mixer.A_log.data = A.neg().log()
    torch.testing.assert_close(outputs, model(ids), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_heads_that_forget_fast_enough_stay_as_they_are(model, made):
    model.mixers[2].dt_bias.data[3] = -1e4  # takes no steps: it writes nothing, and no factor makes it forget
    ids = torch.randint(256, (2, 70))
    plain = model(ids)
    with mitigate(model, f"a-floor:tokens={10**9}", text=made):
        assert torch.equal(model(ids), plain) and all(m.policy == PLAIN for m in model.mixers)
    with mitigate(model, "a-floor:tokens=4", text=made):
        assert model.mixers[2].policy.mul[3] == 1 and model(ids).isfinite().all()
        assert not torch.allclose(model(ids), plain)


@torch.no_grad()
def test_prefill_is_step_by_step(model, made):
    ids = torch.randint(256, (2, 53))
    with mitigate(model, "a-floor:tokens=13", text=made):
        whole = model(ids)
        for cuts in ([1] * 53, [17, 1, 3, 32]):
            cache = Cache()
            parts = torch.cat([model(part, cache) for part in ids.split(cuts, 1)], 1)
            torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


def test_the_training_length_is_asked_for(model, made):
    model.train_length = None
    with pytest.raises(NotApplicable, match=r"a-floor without tokens=\.\.\. needs the training length.*--train-length"):
        mitigate(model, "a-floor", text=made)
    with mitigate(model, "a-floor:tokens=20", text=made) as handle:
        assert handle.plan.calibration.endswith("8 x 20")
    assert "a-floor" in standard(32) and "a-floor" not in standard(None)
    model.tokenizer = LazyTokenizer(None, "it", 256)
    with pytest.raises(InputError, match="no tokenizer"):
        mitigate(model, "a-floor:tokens=20")
