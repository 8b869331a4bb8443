"""States that are saved, and gone on from."""

import pytest
import torch
from evaluated import make_model
from typer.testing import CliRunner

from rnn_longctx import cli
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.saved_state import load_state, save_state


@torch.no_grad()
def test_a_saved_state_goes_on_as_if_never_stopped(tmp_path):
    lm, ids = make_model(), torch.randint(256, (1, 50))
    for name in ("none", "rri", "window:tokens=7", "reset:every=8,overlap=3"):
        with mitigate(lm, name):
            expected = generate(lm, ids, 6)
            save_state(tmp_path / "s", prefill(lm, ids[:, :33])[1], lm, name)
            assert torch.equal(generate(lm, ids[:, 33:], 6, cache=load_state(tmp_path / "s", lm)), expected)
    with pytest.raises(InputError, match="with the remedy reset:every=8,overlap=3"):
        load_state(tmp_path / "s", lm)
    lm.use_state_dtype("bfloat16")
    save_state(tmp_path / "s", prefill(lm, ids)[1], lm)
    assert load_state(tmp_path / "s", lm).layers[0].scan.state.dtype == torch.bfloat16
    lm.use_state_dtype(None)
    with pytest.raises(InputError, match="states in bfloat16: give the same --state-dtype"):
        load_state(tmp_path / "s", lm)
    old = lm.weights_hash
    lm.lm_head.weight.data.mul_(0.5)
    with pytest.raises(InputError, match=f"was read by tiny {old}, not by tiny {lm.weights_hash}"):
        load_state(tmp_path / "s", lm)
    Cache().save(tmp_path / "c")
    with pytest.raises(InputError, match="does not say which weights"):
        load_state(tmp_path / "c", lm)
    with pytest.raises(InputError, match=r"none: no such file$"):
        load_state(tmp_path / "none", lm)


def test_generate_command_keeps_and_loads_a_state(tmp_path):
    run, state = CliRunner().invoke, str(tmp_path / "s.state")
    whole = run(cli.app, ["generate", "demo", "--prompt", "def f(x):\n    return", "--max-new-tokens", "5"])
    first = run(cli.app, ["generate", "demo", "--prompt", "def f(x):\n", "--save-state", state])
    second = run(
        cli.app, ["generate", "demo", "--prompt", "    return", "--load-state", state, "--max-new-tokens", "5"]
    )
    assert first.exit_code == second.exit_code == 0 and second.stdout == whole.stdout
    assert len(whole.stdout) > 1 and not first.stdout  # only read
    assert first.stderr.startswith(f"wrote {state}, ") and first.stderr.endswith(" MiB\n")
