"""What a filter would take, against the step sizes; and where keys are found, with answers put in its mouth."""

from itertools import count

import pytest
import torch

import rnn_longctx
from rnn_longctx import mitigate
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes import held
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.probes.held import dropped_share, key_digits, key_hits
from rnn_longctx.tasks.passkey import passkey_batch


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model():
    shape = {"d_model": 16, "n_layer": 3, "headdim": 8, "d_state": 5, "A_init": (0.01, 9.0), "A_log_uniform": True}
    lm = Mamba2LM(Mamba2Config(**shape)).eval()
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    lm.train_length, lm.tokenizer = 32, ByteTokenizer()
    return lm


def test_what_a_filter_takes():
    lm, ids = model(), torch.randint(256, (1, 90))
    found = dropped_share(lm, ids, target_length=300, segment=40)
    assert list(found.columns) == ["layer", "head", "min_dt", "dropped", "share"] and len(found) == 3 * 4
    plain = attribute(lm, ids).values[:, 0].abs()
    with mitigate(lm, "token-filter", target_length=300):
        filters = [m.policy.min_dt for m in lm.mixers]
        steps = measure_steps(lm, ids)
    for row in found.itertuples():
        g = filters[row.layer] if isinstance(filters[row.layer], float) else filters[row.layer][row.head]
        away = steps[row.layer][0, :, row.head] < g
        size = plain[row.layer, row.head]
        assert row.min_dt == g
        assert row.dropped == pytest.approx(float(away.double().mean()))
        assert row.share == pytest.approx(float(size[away].sum() / size.sum()), rel=1e-4, abs=1e-7)
    assert found["dropped"].max() > 0.2 and (found.query("min_dt == 0")["share"] == 0).all()
    assert (dropped_share(lm, ids[:, :30])["share"] == 0).all()  # made for no more than training: nothing is dropped


def test_a_remedy_that_is_no_filter_and_one_too_many():
    lm, ids = model(), torch.randint(256, (1, 50))
    for remedy in ("rri", "window:tokens=9", "recompute:last=16", "token-filter+rri"):
        with pytest.raises(InputError, match="something else than drop tokens"):
            dropped_share(lm, ids, remedy)
        assert rnn_longctx.mitigations.active(lm)[0] == "none"
    with mitigate(lm, "rri"), pytest.raises(InputError, match="take the remedy off"):
        dropped_share(lm, ids)
    with pytest.raises(InputError, match=r"\(1, T\)"):
        dropped_share(lm, ids[0])


def test_the_digits_of_a_key():
    for length in (200, 1100):
        (prompt,) = passkey_batch(ByteTokenizer(), length, 1, seed=torch.randint(999, ()).item())
        found = key_digits(ByteTokenizer(), prompt)
        assert bytes(prompt.ids[found].tolist()).decode() == prompt.answer * 2
        assert found == [i for i, b in enumerate(prompt.ids) if chr(b).isdigit()]


def test_hits(monkeypatch, seed):
    """A model made to say the right answer to two prompts in three, in turn with and without a space before it."""
    lm, length, top = model(), 193, 25
    prompts, asked = passkey_batch(lm.tokenizer, length, 6, seed % 1000), count()

    def said(model, ids, new):
        i = next(asked)
        assert ids.tolist() == [prompts[i].ids.tolist()]
        answer = prompts[i].answer if i % 3 else "12"
        return torch.from_numpy(lm.tokenizer.encode((" " * (i % 2) + answer + ". blah")[:new]))[None]

    monkeypatch.setattr(held, "generate", said)
    found = key_hits(lm, n=6, length=length, top=top, seed=seed % 1000)
    assert (found["right"] == 4).all() and (found["n"] == 6).all() and len(found) == 12
    assert found["hits"].is_monotonic_decreasing
    found = found.set_index(["layer", "head"])
    hits, shares, chance = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), 0.0
    for i in (1, 2, 4, 5):
        asking = [*prompts[i].ids.tolist(), *([32] if i % 2 else [])]
        text = bytes(asking).decode()
        unasked = asking[: text.index("\nWhat is the passkey?")]
        for k, ids in enumerate((asking, unasked)):
            sizes = attribute(lm, torch.tensor([ids])).values[:, 0].abs()
            digit = torch.tensor([chr(b).isdigit() for b in ids])
            for layer in range(3):
                for head in range(4):
                    best = sizes[layer, head].topk(top).indices
                    best = best[digit[best]]
                    hits[k, layer, head] += len(best) > 0
                    shares[k, layer, head] += sizes[layer, head][best].sum() / sizes[layer, head].sum()
        miss = 1.0
        for k in range(top):
            miss *= (len(asking) - 10 - k) / (len(asking) - k)
        chance += (1 - miss) / 4
    for (layer, head), row in found.iterrows():
        for k, name in enumerate(("", "unasked_")):
            assert row[f"{name}hits"] == hits[k, layer, head] / 4
            assert row[f"{name}share"] == pytest.approx(float(shares[k, layer, head]) / 4, rel=1e-4, abs=1e-9)
        assert row["chance"] == pytest.approx(chance)
    assert hits.sum() > 0


@pytest.mark.slow
def test_heads_of_the_demo_find_the_key():
    found = key_hits(rnn_longctx.load("demo"), n=5, length=512)
    best = found.iloc[0]
    assert best["right"] >= 4 and best["hits"] >= 0.8 > 4 * best["chance"]


def test_no_right_answer_and_bad_input():
    lm = model()
    empty = key_hits(lm, n=2, length=150)
    assert empty.empty and "hits" in empty.columns
    for arguments, message in (((2, 20), "at least"), ((2, 150, 0), "top=0"), ((0, 150), "n=0")):
        with pytest.raises(InputError, match=message):
            key_hits(lm, *arguments)
    with mitigate(lm, "window:tokens=16"), pytest.raises(InputError, match="gates alone"):
        key_hits(lm, n=2, length=150)
    lm.tokenizer = None
    with pytest.raises(InputError, match="no tokenizer"):
        key_hits(lm)
