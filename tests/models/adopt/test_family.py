"""A family of mixers is one registered entry: nothing of the base names it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adopted_families import DELTA_FAMILIES, RECURRENT
from adopted_families import FAMILIES as TRANSFORMERS
from torch import Tensor, nn

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.adopt.beside import Beside, tokens_counted
from rnn_longctx.models.adopt.family import FAMILIES, Family
from rnn_longctx.models.adopt.mixer import Call
from rnn_longctx.models.adopt.stepped import UNLIMITED, SteppedAdopted
from rnn_longctx.recurrence.gates import ScanInputs


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_mixer_fits_one_family(name, build):
    model = build(name)
    fitting = [[f.name for f in FAMILIES.values() if f.fits(module)] for module in model.modules()]
    assert [names for names in fitting if names] == [[FAMILIES_OF.get(name, "mamba2")]] * RECURRENT[name]


FAMILIES_OF = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), "mamba1"),
    **dict.fromkeys(DELTA_FAMILIES, "gated_delta_net"),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), "kimi_delta"),
    "minimax": "minimax",
    "recurrent_gemma": "recurrent_gemma",
}


class Leaky(nn.Module):
    """A mixer of nobody's library: a state of two numbers a channel, with given steps."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(-1, 1, 3))
        self.dt_bias, self.D = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
        self.in_proj = nn.Linear(6, 3)

    def forward(self, u: Tensor) -> Tensor:
        x, steps = u.unflatten(-1, (3, 2)), F.softplus(self.in_proj(u))
        state, out = torch.zeros(len(u), 3, 2, 2), []
        for t in range(u.shape[1]):
            state = state * (-steps[:, t] * self.A_log.exp()).exp()[..., None, None]
            state = state + steps[:, t, :, None, None] * x[:, t, :, :, None] * _written(u)[:, t, 0]
            out.append(state.sum(-1) + x[:, t])
        return torch.stack(out, 1).flatten(2)


def _written(u: Tensor) -> Tensor:
    """B (B, T, 1, N), and a C of ones reads their sum."""
    return torch.ones(*u.shape[:2], 1, 2)


class LeakyMixer(SteppedAdopted):
    dt_limit = UNLIMITED
    shape = (3, 2, 2)

    def forward(self, u: Tensor) -> Tensor:
        if not self.active:
            return self.original("forward")(u)
        ones = _written(u)
        inputs = ScanInputs(u.unflatten(-1, (3, 2)), ones, ones, self.D)
        y, _ = self.read(Call(self, None, None), inputs, self.gates(self.in_proj(u), UNLIMITED), None)
        return y.flatten(2)


@pytest.fixture
def leaky():
    FAMILIES.register(Family("leaky", lambda module: isinstance(module, Leaky), LeakyMixer))
    yield nn.Sequential(nn.Linear(6, 6), Leaky(), nn.Linear(6, 6))
    del FAMILIES._known["leaky"]


@torch.no_grad()
def test_a_new_family_takes_remedies(leaky):
    u = torch.randn(2, 9, 6)
    plain, adopted = leaky(u), adopt(leaky)
    assert [type(m) for m in adopted.mixers] == [LeakyMixer] and adopted.mixers[0].name == "1"
    adopted.mixers[0].continue_stream(True)  # our scan, under no policy: the same recurrence
    torch.testing.assert_close(leaky(u), plain)
    adopted.mixers[0].continue_stream(False)
    with mitigate(leaky, "rri:alpha=0.9,beta=0.4"):
        assert (leaky(u) - plain).abs().max() > 1e-3
    assert torch.equal(leaky(u), plain)


def test_without_its_family_it_is_no_model():
    with pytest.raises(InputError, match="no recurrence that this library knows"):
        adopt(nn.Sequential(Leaky()))


def test_rows_that_began_uncounted_never_look_like_new_ones():
    beside = Beside.uncounted(1, 3)
    beside.position += torch.tensor([0, 1, 70_000])
    assert not beside.from_start.any() and Beside(1, torch.tensor([0, 5])).from_start.all()
    assert tokens_counted(beside.position).tolist() == [0, 1, 70_000]
    assert tokens_counted(torch.tensor([0, 5])).tolist() == [0, 5]
