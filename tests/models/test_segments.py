"""How much is read at once: within what other libraries' kernels count. The fault itself is never provoked."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from adopted_families import MAMBA1, NEAR, SCAN_FAMILIES, random_ids, streamed
from rich.console import Console
from typer.testing import CliRunner

from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.eval.show.terminal import header
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models import segments
from rnn_longctx.models.adopt import model as adopting
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import generate
from rnn_longctx.models.state_size import StateSize
from rnn_longctx.probes.monitor.inputs import input_statistics
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy


class OnGPU:
    """An adopted model that says that it is on a GPU."""

    device = torch.device("cuda")
    backend = "transformers"
    own_forward = True

    def __init__(self, *widths):
        layers = [torch.nn.Linear(1, width, device="meta") for width in widths]
        self.mixers = [type("Mixer", (), {"in_proj": layer}) for layer in layers]


def test_the_longest_call_stays_below_the_limit():
    for width in (3, 4384, 20_000, 37_152):
        for rows in (1, 2, 7, 32):
            tokens = segments.longest(OnGPU(100, width, 50), rows)
            assert rows * tokens * max(width, 100) < 2**31 <= rows * (tokens + 1) * max(width, 100)
    assert segments.longest(OnGPU(2**30), 8) == 1
    narrow, wide = OnGPU(4384), OnGPU(37_152)
    assert segments.longest(narrow) == 489_845
    assert segments.reads(narrow).startswith("65,536 tokens at once") and "32-bit limit of 489,845" in segments.reads(
        narrow
    )
    assert segments.reads(wide).startswith("57,802 tokens at once instead of 65,536: layers 37,152 wide")
    wide.device = torch.device("cpu")
    assert segments.longest(wide) is None and segments.reads(wide) is None


def test_of_our_own_models_only_where_their_kernels_are_asked_for(make):
    model = make()
    model.__class__ = type("There", (type(model),), {"device": torch.device("cuda"), "backend": "fused"})
    assert segments.longest(model) is None
    type(model).backend = "mamba_ssm"
    width = model.mixers[0].in_proj.out_features
    assert segments.longest(model, 3) == (2**31 - 1) // (3 * width)
    assert segments.reads(model) is None, "their calls are refused there, not cut"


@pytest.mark.parametrize("family", SCAN_FAMILIES)
def test_the_width_is_that_of_what_in_proj_gives(build, family):
    model = build(family)
    ours, seen = adopt(model), []
    hooks = [m.in_proj.register_forward_hook(lambda *given: seen.append(given[-1].shape[-1])) for m in ours.mixers]
    with torch.no_grad():
        model(random_ids())
    assert segments.widest(ours) == max(seen) and hooks
    for mixer in ours.mixers:  # as packed weights may be
        for name in ("out_features", "weight"):
            if name in vars(mixer.in_proj):
                delattr(mixer.in_proj, name)
    assert max(seen) <= segments.widest(ours) <= (1 if family not in MAMBA1 else 2) * max(seen)


@pytest.fixture
def narrow(monkeypatch):
    """Calls of at most 11 tokens, all rows together."""
    monkeypatch.setattr(adopting, "longest", lambda model, rows=1: max(1, 11 // rows))
    monkeypatch.setattr("rnn_longctx.probes.monitor.inputs.longest", lambda model, rows=1: 11)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_every_call_of_ours_is_cut(build, family, narrow):
    model, ids, calls = build(family, 256), random_ids(2, 31), []  # of which one is left over
    twin = copy.deepcopy(model)
    ours = adopt(model, tokenizer=ByteTokenizer(), train_length=16)
    whole = model(ids, use_cache=False).logits.float()
    steps = measure_steps(ours, ids) if family != "mamba" else None
    ours.base.register_forward_pre_hook(
        lambda module, args, given: calls.append(given["input_ids"].numel()), with_kwargs=True
    )
    torch.testing.assert_close(ours.logits(ours(ids)), whole, **NEAR)
    torch.testing.assert_close(streamed(ours, ids, [20, 11])[0], whole, **NEAR)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :9] = False
    padded = ours.logits(ours(ids, ours.new_cache(), mask))
    torch.testing.assert_close(padded[0, 9:], twin(ids[:1, 9:], use_cache=False).logits[0].float(), **NEAR)
    generate(model, ids, 3)
    text = Text("made", bytes(torch.randint(97, 123, (4000,)).tolist()))
    if family == "mamba2":
        input_statistics(ours, 1, text)
    assert max(calls) <= 11 and len(calls) > 10
    if steps is not None:
        assert [s.shape[:2] for s in steps] == [(2, 31)] * len(ours.mixers)
        projected, found = [], adopt(twin)
        hooks = [
            m.in_proj.register_forward_hook(lambda *given, m=m: projected.append(m.steps(given[-1])))
            for m in found.mixers
        ]
        twin(ids, use_cache=False)
        assert hooks
        for one, other in zip(steps, projected):
            torch.testing.assert_close(one, other.float(), **NEAR)


@torch.no_grad()
def test_a_persons_own_longer_call_is_warned_of_once(build, monkeypatch):
    monkeypatch.setattr(adopting, "kernels_there", lambda: True)
    for module in (adopting, segments):
        monkeypatch.setattr(module, "longest", lambda model, rows=1: 22 // rows)
    model, ids = build("bamba"), random_ids(2, 12)
    adopt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(ids[:, :11])
        generate(model, ids, 2)  # ours is cut
    with pytest.warns(RuntimeWarning, match=r"2 x 12 tokens .* read at most 11 tokens at once"):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(ids)


@torch.no_grad()
def test_a_remedy_on_some_layers_leaves_the_others_to_their_kernels(build, monkeypatch):
    monkeypatch.setattr(adopting, "kernels_there", lambda: True)
    for module in (adopting, segments):
        monkeypatch.setattr(module, "longest", lambda model, rows=1: 11)
    model, ids = build("mamba2"), random_ids(1, 12)
    ours = adopt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for mixer in ours.mixers:
            mixer.policy = ScanPolicy(gain=0.5)
        model(ids)
    ours.mixers[1].policy = PLAIN
    with pytest.warns(RuntimeWarning, match="read at most 11 tokens at once"):
        model(ids)


COMMANDS = {
    "eval": "--lengths 256 --task lm:slices=2,tokens=0 --mitigation none --text t.txt",
    "probe": "--length 256 --every 32 --slices 2 --text t.txt",
    "capacity": "--limit 128 --slices 2 --width 0.3 --text t.txt",
    "calibrate": "--mitigation rri:alpha=0.9,beta=1 --target 128 --slices 2 --text t.txt",
    "lm-eval": "--tasks rnn_longctx_passkey --lengths 256 --limit 1",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_the_segment_that_they_read_in(build, command, tmp_path, monkeypatch):
    """As on a GPU where 40 tokens are the most: it is said, and it is so."""
    if command == "lm-eval":
        pytest.importorskip("lm_eval")
    ours, calls = adopt(build("mamba2", 256), tokenizer=ByteTokenizer(), train_length=64), []
    ours.base.register_forward_pre_hook(
        lambda module, args, inputs: calls.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    for module in (segments, adopting):
        monkeypatch.setattr(module, "longest", lambda model, rows=1: 40 // rows)
    monkeypatch.setattr("rnn_longctx.models.adopt.adopting.load_any", lambda name, **how: ours)
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_bytes(bytes(torch.randint(97, 123, (4000,)).tolist()))
    words = [command, *(["--model"] if command == "lm-eval" else []), "tiny", *COMMANDS[command].split()]
    ran = CliRunner().invoke(cli.app, [*words, "--out", "out.yaml" if command == "calibrate" else "out"])
    assert ran.exit_code == 0, ran.output
    width = f"{segments.widest(ours):,}"
    assert f"40 tokens at once instead of 4,096: layers {width} wide" in " ".join(ran.output.split())
    assert max(calls) == 40


def test_the_header_says_it():
    console = Console(width=200, record=True)
    given = ("tiny", 2_913_408, StateSize({"scan": 393216}), 256, "cuda", "float32", "transformers")
    console.print(header(*given))
    console.print(header(*given, segments.reads(OnGPU(37_152))))
    lines = [line for line in console.export_text().splitlines() if line.startswith("reads")]
    assert len(lines) == 1 and "57,802 tokens at once instead of 65,536" in lines[0] and "32-bit" in lines[0]
