"""Recurrent models of transformers that take no remedy: each is refused by a line that says why, and why holds."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from adopted_families import COMMON

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt, load_any
from rnn_longctx.models.checkpoint.layouts import ADOPTED, NOT_ADOPTED

CONFIGS = {
    "xlstm": lambda: hf.xLSTMConfig(
        **COMMON | {"hidden_size": 64}, num_heads=2, num_hidden_layers=2, qk_dim_factor=1.0,
    ),
}  # fmt: skip
WHY = {"xlstm": "running maximum of its gates"}


def made(family):
    return hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_it_is_refused_in_one_line_that_says_why(family, tmp_path):
    model = made(family)
    model.save_pretrained(tmp_path / "kept")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for model_or_backbone in (model, model.base_model):
        for act in (adopt, lambda m: mitigate(m, "rri:alpha=0.9,beta=0.4")):
            with pytest.raises(InputError, match=rf"\({family}\) is not adopted: .*{WHY[family]}") as error:
                act(model_or_backbone)
            assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=rf"kept \({family}\) is not adopted: .*{WHY[family]}"):
        load_any(tmp_path / "kept", tokenizer="bytes")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_no_family_is_both():
    assert set(NOT_ADOPTED) == set(CONFIGS) and not set(NOT_ADOPTED) & set(ADOPTED)


@torch.no_grad()
def test_outputs_of_xlstm_hang_on_its_running_maximum():
    """The same sums, kept over another maximum, give another output: eps is added to what is kept."""
    layer = next(m.mlstm_layer for m in made("xlstm").modules() if hasattr(m, "mlstm_layer"))
    q, k, v = torch.rand(3, 1, 2, 4).unbind()
    sums, norms = torch.rand(1, 2, 4, 4) + 0.5, torch.rand(1, 2, 4)
    shut = torch.full((1, 2, 1), -40.0)  # an input gate that writes nothing; its negative forgets nothing

    def output(maximum):
        step, scale = layer.mlstm_backend.step_kernel_fn, torch.tensor(-maximum).exp()
        where = {"cstate": sums * scale, "nstate": norms * scale, "mstate": torch.full((1, 2, 1), maximum)}
        return step(query=q + 0.5, key=k, value=v, igate=shut, fgate=-shut, **where)[0]

    torch.testing.assert_close(output(1.0), output(0.0), rtol=1e-4, atol=0)
    assert ((output(12.0) - output(0.0)) / output(0.0)).abs().min() > 0.01
