"""Remedies where a recurrence erases: what they change in each layer, and what is refused, with the reason."""

import pytest
import torch

from rnn_longctx import mitigate
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, Plan, Remedy, parse_remedy
from rnn_longctx.mitigations.base import planned
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.testing.remedies import model_of, own_model

MIXED = ["rwkv7:headdim=16", "mamba2:d_state=4,headdim=8"]


@pytest.fixture(scope="module")
def mixed():
    torch.set_num_threads(1)
    return model_of(MIXED)


@pytest.mark.parametrize(
    "text, erasing, scanning",
    [
        ("erase:scale=0.5", ScanPolicy(erase=0.5), PLAIN),
        ("erase:scale=2,least=0.25", ScanPolicy(erase=2.0, least_erase=0.25), PLAIN),
        ("delta-scale:scale=0.7", ScanPolicy(mul=0.7), ScanPolicy(mul=0.7, gain=0.7)),
        ("rri:alpha=1,beta=0.5", ScanPolicy(gain=0.5), ScanPolicy(gain=0.5)),
        ("rri:alpha=1,beta=0.5,erases=true", ScanPolicy(gain=0.5, erase=0.5), ScanPolicy(gain=0.5)),
    ],
)
def test_each_layer_gets_what_means_something_to_it(text, erasing, scanning, mixed):
    assert planned(parse_remedy(text), mixed).policies == (erasing, scanning)


@torch.no_grad()
def test_a_layer_that_erases_nothing_is_a_scan(mixed):
    """Under erase:scale=0 the states are sums of what was written, which fades."""
    model, ids, readings = model_of("rwkv7:headdim=16"), torch.randint(256, (1, 30)), []
    model.mixers[0].tap = readings.append
    with mitigate(model, "erase:scale=0"):
        cache = model.new_cache()
        model(ids, cache)
    inputs, log_decay = readings[0].inputs, readings[0].gates.log_decay
    left = (log_decay.sum(1, keepdim=True) - log_decay.cumsum(1)).exp()
    expected = torch.einsum("bthp,bthn->bhpn", inputs.x, inputs.B * left)
    torch.testing.assert_close(cache.layers[0].scan.state, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text, message",
    [
        ("erase:scale=0.9", "^erase needs a recurrence that erases, as the delta rule does: own has none"),
        ("rri:erases=true", "^rri:.*needs a recurrence that erases, as the delta rule does: own has none"),
    ],
)
def test_not_where_nothing_is_erased(text, message):
    with pytest.raises(NotApplicable, match=message):
        mitigate(own_model(), text)


class Asks(Remedy):
    """A remedy from outside, that gives every layer one policy."""

    name = "asks"

    def __init__(self, policy):
        object.__setattr__(self, "policy", policy)

    def plan(self, model, target_length=None, text=None):
        return Plan((self.policy,) * len(model.mixers))

    def __str__(self):
        return "asks"


def test_a_policy_that_means_nothing_to_a_layer_makes_a_remedy_not_applicable(mixed):
    for policy, reason in (
        (ScanPolicy(window=9), "asks: the delta rule has no sliding window"),
        (ScanPolicy(min_dt=0.1), "asks: min_dt leaves out tokens"),
        (ScanPolicy(erase=0.5), "asks: the scan erases nothing, so erase means nothing to it"),
        (ScanPolicy(least_erase=0.5), "asks: the scan erases nothing, so least_erase"),
    ):
        with pytest.raises(NotApplicable, match=reason):
            planned(Asks(policy), mixed)
    assert planned(Asks(ScanPolicy(mul=0.5)), mixed).policies[0].mul == 0.5
    with pytest.raises(NotApplicable, match="window:tokens=9: the delta rule has no sliding window"):
        mitigate(mixed, "window:tokens=9")


@pytest.mark.parametrize("text", ["erase:scale=-1", "erase:least=inf", "erase:scale=nan"])
def test_settings_out_of_range(text):
    with pytest.raises(InputError, match="must be at least 0"):
        parse_remedy(text)


def test_contributions_do_not_add_up_where_a_state_is_erased(mixed):
    with pytest.raises(InputError, match=r"a later token erases.*delta recurrence of own"):
        attribute(mixed, torch.randint(256, (1, 20)))
