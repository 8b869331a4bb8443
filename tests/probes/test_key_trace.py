"""What is seen of a key, against a recurrence of one layer, where it is known, and the caches put together by hand."""

import pandas as pd
import pytest
import torch

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.probes import key_trace
from rnn_longctx.probes.key_trace import KeyTrace, trace_key

SLOW = "mamba2:headdim=16,d_state=8,A_low=1e-3,A_high=1e-2,A_draw=log-uniform"
DELTA = "gated-deltanet:heads=2,head_dim=8,expand_v=2,A_min=1e-3,A_max=0.1"
TEXT = Text("made", bytes(torch.randint(32, 127, (9000,), generator=torch.Generator().manual_seed(1)).tolist()))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model(mixer=SLOW, layers=1):
    lm = LM(ModelConfig(mixer, d_model=32, n_layer=layers)).double().eval()
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    lm.name, lm.tokenizer = "traced", ByteTokenizer()
    return lm


def whole(trace, state, gap=-1):
    """Return the loss with all heads in a state, at the last gap."""
    a = trace.answers
    (loss,) = a[(a["state"] == state) & (a["layer"] < 0) & (a["gap"] == a["gap"].unique()[gap])]["loss"]
    return loss


@pytest.mark.parametrize("mixer", [SLOW, "gla:heads=2"])
def test_one_layer_only_decays(mixer):
    """After the key the rows' inputs are alike, so that in the first layer what differs decays and no more."""
    lm, gaps = model(mixer), [200, 500]
    plain, held, frozen = (
        trace_key(lm, gaps, 3, haystack=TEXT, reading=reading, each_head=False)
        for reading in ("plain", "held", "frozen")
    )
    at_key, *later = (plain.signals[plain.signals["gap"] == gap] for gap in (0, *gaps))
    assert (at_key["kept"] == 1).all() and (at_key["decay"] == 1).all() and (at_key["signal"] > 0).all()
    if mixer == SLOW:  # (of decays per channel the mean says less)
        for rows in later:
            assert rows["kept"].tolist() == pytest.approx(rows["decay"].tolist(), rel=1e-6, abs=1e-9)
        assert (later[1]["decay"].to_numpy() < later[0]["decay"].to_numpy()).all()
    after = held.signals[held.signals["gap"] == 500]
    assert (after["decay"] == 1).all() and after["kept"].tolist() == pytest.approx([1.0] * len(after), rel=1e-9)
    assert whole(frozen, "read") == pytest.approx(whole(plain, "unwritten"), rel=1e-6)
    assert whole(frozen, "undecayed") == pytest.approx(whole(plain, "restored"), rel=1e-6)
    states = ["read", "restored", "undecayed", "unwritten"]
    if mixer == SLOW:  # (of a key in a fresh GLA's states 500 tokens may leave nothing to amplify)
        states.append("amplified")
    assert len({round(whole(plain, state), 9) for state in states}) == len(states)


@pytest.mark.parametrize("mixer", [SLOW, DELTA])
def test_states_put_in_head_by_head(mixer):
    """Each head's row is that of caches put together one by one."""
    lm = model(mixer, 2)
    trace = trace_key(lm, [150], 2)
    gap = int(trace.answers["gap"].max())
    assert gap % len(key_trace.FILLER) == 0 and gap - 150 < len(key_trace.FILLER)
    prompts = key_trace._prompts(lm.tokenizer, 150, 2, None, 0)
    with torch.inference_mode():
        key, later = lm.new_cache(), lm.new_cache()
        lm(prompts.begun, key)
        lm(torch.cat([prompts.begun, prompts.filler.expand(2, -1)], 1), later)
        ids = torch.cat([prompts.question, prompts.reply], 1)
        a, heads = trace.answers.set_index(["state", "layer", "head"])["loss"], lm.mixers[1].heads
        for layer, head in ((0, 0), (1, heads - 1)):
            for state, base, other in (("restored", later, key), ("damaged", key, later)):
                cache = later.clone()
                for i in range(2):
                    cache.layers[i].scan.state.copy_(base.layers[i].scan.state)
                cache.layers[layer].scan.state[:, head] = other.layers[layer].scan.state[:, head]
                losses = lm.losses(lm(ids[:, :-1], cache), ids[:, 1:])[:, -prompts.reply.shape[1] :]
                assert a[state, layer, head] == pytest.approx(float(losses.mean()), rel=1e-9)
    names = set(trace.answers["state"])
    assert ("undecayed" in names) is ("unwritten" in names) is (mixer == SLOW)
    assert {"best 1", "best 2"} <= names and f"best {2 * heads}" not in names


def test_rows_differ_in_the_key_alone():
    prompts = key_trace._prompts(ByteTokenizer(), 300, 4, TEXT, 1)
    rows = [bytes(row.tolist()) for row in prompts.begun]
    keys = [bytes(row.tolist()).decode().strip() for row in prompts.reply]
    assert len(set(keys)) == 4 and prompts.step == 1 and len(prompts.filler) == 300
    bare = {row.replace(key.encode(), b"?") for row, key in zip(rows, keys)}
    assert len(bare) == 1 and all(row.count(key.encode()) == 2 for row, key in zip(rows, keys))


def test_a_checkpoint_that_loses_its_keys():
    """The demo finds no key at 8K that stood at the beginning; with the states of right after the key it does."""
    trace = trace_key(rnn_longctx.load("demo"), [8192], 3, each_head=False)
    assert whole(trace, "restored") < 0.1 < whole(trace, "read")
    assert trace.by_gap("right").loc["read"].iloc[-1] < 0.9 and "of the keys are found" in trace.verdict


def test_the_verdict():
    def verdict(**right):
        rows = [{"gap": 0, "state": "read", "layer": -1, "right": right.pop("begun", 1.0)}]
        rows += [{"gap": 2048, "state": state, "layer": -1, "right": value} for state, value in right.items()]
        return KeyTrace({}, pd.DataFrame(), pd.DataFrame(rows)).verdict

    assert verdict(read=1.0, undecayed=1.0) == "no key is lost up to a gap of 2K"
    assert verdict(begun=0.5, read=0.0) == "keys are not even found right after they were read"
    fades = verdict(read=0.3, undecayed=1.0, unwritten=0.5, amplified=0.2)
    assert fades.startswith("at a gap of 2K 30% of the keys are found") and fades.endswith("so decay loses them")
    assert "so later writes cover them" in verdict(read=0.0, undecayed=0.1, unwritten=0.9)
    assert "no single state" in verdict(read=0.0, amplified=0.0)


def test_what_cannot_be_traced():
    lm = model()
    for arguments, words in (
        (([], 2), "gaps of at least 1"),
        (([100], 1), "at least 2 keys"),
        (([100], 2, "melted"), "unknown reading 'melted'"),
        (([10_000], 2), "a slice of"),
    ):
        gaps, n, *reading = arguments
        with pytest.raises(InputError, match=words):
            trace_key(lm, gaps, n, haystack=TEXT, **({"reading": reading[0]} if reading else {}))
    with pytest.raises(InputError, match="recurrent layers"):
        trace_key(model("full-attention:heads=2"), [100], 2)
