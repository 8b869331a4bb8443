"""LAMB against its definition, worked out here token by token: what the question attends to, and what is skipped."""

import math

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval import evaluate
from rnn_longctx.measure.taps import tapping
from rnn_longctx.mitigations import NotApplicable, mitigate
from rnn_longctx.mitigations.lamb import Choice, Question
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.mixer_reading import MixerReading, Rest
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.testing.remedies import model_of


def readings_of(model, ids):
    """What every layer's scan reads of a prompt that is read plainly."""
    readings = []
    with tapping(model.mixers, [readings.append] * len(model.mixers)):
        model(ids)
    return readings


def kept_by_definition(reading, policy, train_length, tokens, query, theta):
    """Which tokens each head reads, (B, T, H): loops over rows, heads, tokens and queries, on numbers of Python."""
    inputs, gates = reading.inputs, reading.gates.worked_out(torch.float64, policy)
    B, T, H = gates.log_decay.shape
    body, groups = T - query, inputs.B.shape[2]
    keep = torch.ones(B, T, H, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            decays, g = gates.log_decay[b, :, h].tolist(), h * groups // H
            if math.exp(sum(decays[:body]) / body * train_length) <= theta:
                continue
            attention = []
            for j in range(body):
                decay_before = sum(decays[j + 1 : body]) * tokens / body
                attention.append(max(
                    abs(float(inputs.C[b, i, g] @ inputs.B[b, j, g]))
                    * math.exp(decay_before + sum(decays[body : i + 1])) * float(gates.input_scale[b, j, h])
                    for i in range(body, T)
                ))  # fmt: skip
            for j in sorted(range(body), key=attention.__getitem__)[: body - tokens]:
                keep[b, j, h] = False
    return keep


def scanned(reading, policy, keep):
    """The outputs of a scan (B, T, H * P) that skips what is not kept, token by token."""
    inputs, gates = reading.inputs, reading.gates.worked_out(torch.float64, policy)
    log_decay, scale = (torch.where(keep, v, 0.0) for v in (gates.log_decay, gates.input_scale))
    B, T, H, P = inputs.x.shape
    S, ys = torch.zeros(B, H, P, inputs.B.shape[3], dtype=torch.float64), []
    for t in range(T):
        key, query = (v[:, t].repeat_interleave(H // v.shape[2], 1)[:, :, None] for v in (inputs.B, inputs.C))
        written = (scale[:, t, :, None] * inputs.x[:, t])[..., None] * key
        S = log_decay[:, t].exp()[..., None, None] * S + written
        ys.append((S * query).sum(-1) + inputs.D[:, None] * inputs.x[:, t])
    return torch.stack(ys, 1).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lamb:tokens=9,query=5,theta=0.3", "rri:alpha=0.99,beta=0.9+lamb:tokens=9,query=5"])
def test_lamb(model, name):
    length, more = 71, 6
    ids, next_ids = torch.randint(256, (2, length)), torch.randint(256, (2, more))
    theta, policy = (0.05, ScanPolicy(add=math.log(0.99), gain=0.9)) if "rri" in name else (0.3, PLAIN)
    with mitigate(model, "rri:alpha=0.99,beta=0.9" if "rri" in name else "none"):
        readings = readings_of(model, ids)
    keeps = [kept_by_definition(r, policy, 32, 9, 5, theta) for r in readings]
    skipped = torch.stack(keeps).logical_not().float().mean()
    assert skipped > 0.2 and all(keep[:, -5:].all() for keep in keeps)

    third, ys = [], []  # of the reading with the filter, which is the last
    hooks = [m.norm.register_forward_pre_hook(lambda module, given: ys.append(given[0])) for m in model.mixers]
    with mitigate(model, name), tapping(model.mixers, [third.append] * 3):
        prefill(model, ids, segment=200)
    for hook in hooks:
        hook.remove()
    for keep, reading, y in zip(keeps, third[-3:], ys[-3:], strict=True):
        torch.testing.assert_close(y, scanned(reading, policy, keep), rtol=1e-6, atol=1e-9)

    with mitigate(model, name):
        logits, cache = prefill(model, ids, segment=13)
        stepped = [model.logits(model(next_ids[:, t : t + 1], cache)) for t in range(more)]

    # what comes after the prompt is read by every head: as in one call under the same filter
    def filtering(keep):
        keep = torch.cat([keep, torch.ones(2, more, keep.shape[2], dtype=torch.bool)], 1)
        return lambda r: r.gates.stepping(r.gates.worked_out(torch.float64).input_scale * keep)

    for mixer in model.mixers:
        mixer.policy = ScanPolicy(add=policy.add, gain=policy.gain, min_dt=1e-30)
    with tapping(model.mixers, [filtering(keep) for keep in keeps]):
        whole = model.logits(model(torch.cat([ids, next_ids], 1)))
    torch.testing.assert_close(logits, whole[:, length - 1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.cat(stepped, 1), whole[:, length:], rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_short_prompts_and_what_loses_nothing_are_read_as_they_are(model):
    model.tokenizer.eos_id = None
    for length, name in ((32, "lamb:tokens=3,query=2"), (60, "lamb:tokens=44"), (60, "lamb:theta=0.999999999")):
        ids = torch.randint(256, (2, length))
        plain = model.logits(model(ids)[:, -1])
        with mitigate(model, name):
            torch.testing.assert_close(prefill(model, ids)[0], plain, rtol=1e-9, atol=1e-9)
            assert generate(model, ids, 3).shape == (2, 3)
    with mitigate(model, "lamb:tokens=3"):
        assert float((prefill(model, ids)[0] - plain).abs().max()) > 1e-6


def test_a_far_token_is_chosen_where_products_of_decays_underflow():
    T, query = 400, 2
    B = 0.01 * torch.rand(1, T, 1, 4).double() + 0.01
    B[:, 3] = 1e30  # after it decays of 8 nats a token: exp(-3168) is no number
    decays, scale = torch.full((1, T, 1), -8.0).double(), torch.ones(1, T, 1).double()
    inputs = ScanInputs(torch.zeros(1, T, 1, 2).double(), B, torch.ones(1, T, 1, 4).double())
    question = Question(T, query, PLAIN)
    choice = Choice(question, 2)
    for tap in (question, choice):
        for start, stop in ((0, 150), (150, 151), (151, T)):
            gates = Gates(decays[:, start:stop], scale[:, start:stop])
            tap(MixerReading(inputs.tokens(start, stop), gates, WHOLE, None, Rest()))
    share = 2 / (T - query)
    expected = math.log(4e30) - 8 * (share * (T - query - 1 - 3) + 1)
    best = dict(zip(choice.positions[0, 0].tolist(), choice.scores[0, 0].tolist()))
    assert best[3] == pytest.approx(expected) and set(best) - {3} < set(range(T - query - 60, T - query))


def test_memory_does_not_grow_with_the_prompt(model):
    question = Question(10_000, 5, PLAIN)
    with torch.no_grad(), tapping(model.mixers[:1], [question]):
        cache = Cache()
        for _ in range(20):
            model(torch.randint(256, (1, 500)), cache)
    assert question.C.shape[1] == question.reach.shape[1] == 5
    assert sum(piece.untyped_storage().nbytes() for piece in question._C) <= 5 * 8 * 8


def test_refusals(model, tmp_path):
    for text, message in (
        ("lamb:tokens=0", "at least 1 token"),
        ("lamb:query=0", "at least 1"),
        ("lamb:theta=1", "theta"),
    ):
        with pytest.raises(InputError, match=message):
            mitigate(model, text)
    with pytest.raises(InputError, match="one can be taken"):
        mitigate(model, "lamb+reset:every=8")
    with pytest.raises(NotApplicable, match=r"lamb reads one step a head.*: a layer of own has steps that do not say"):
        mitigate(model_of("gated-deltanet:heads=2,head_dim=8"), "lamb")
    (tmp_path / "t.txt").write_text("some words and more of them. " * 60)
    with pytest.raises(NotApplicable, match="lamb reads prompts, and has no loss of a text"):
        evaluate(model, [64], ["lm:slices=1,tokens=0"], ["lamb"], text=str(tmp_path / "t.txt"))
    model.train_length = None
    with pytest.raises(NotApplicable, match="lamb needs the training length"):
        mitigate(model, "lamb")


@torch.no_grad()
def test_attention_beside_it_reads_every_token():
    model = model_of(["mamba2:headdim=8,d_state=4", "full-attention:heads=2"])
    ids = torch.randint(256, (1, 90))
    with mitigate(model, "lamb:tokens=9,query=5") as handle:
        logits, cache = prefill(model, ids, segment=17)
        assert len(handle.plan.policies) == 1 and cache.position.tolist() == [90]
    (reading,) = readings_of(model, ids)
    keep = kept_by_definition(reading, PLAIN, 32, 9, 5, 0.05)
    filtering = lambda r: r.gates.stepping(r.gates.worked_out(torch.float64).input_scale * keep)  # noqa: E731
    with tapping(model.mixers, [filtering]):
        torch.testing.assert_close(logits, model.logits(model(ids)[:, -1]), rtol=1e-8, atol=1e-9)
