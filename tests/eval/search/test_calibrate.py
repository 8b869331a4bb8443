"""Calibration: the guard, the searches, the file it writes and who may read it."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

from rnn_longctx.data import ByteTokenizer, Text, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval import evaluate
from rnn_longctx.eval.search import calibrate as module
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.eval.tables.leaderboard import leaderboard
from rnn_longctx.mitigations import mitigate, parse_remedy
from rnn_longctx.mitigations.calibrated import CalibrationFile
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.saved_state import save_state

TEXT = Text("made", bytes(torch.randint(32, 127, (9000,), generator=torch.Generator().manual_seed(1)).tolist()))


def tiny(layers=2, **more):
    torch.set_num_threads(1)
    config = Mamba2Config(d_model=16, n_layer=layers, headdim=16, d_state=8, **more)
    lm = Mamba2LM(config).eval()
    lm.train_length, lm.tokenizer, lm.name = 32, ByteTokenizer(), "tiny"
    return lm


def losses(monkeypatch, loss, recall=lambda remedy: 1.0):
    """An objective of our own, in place of the model's."""
    monkeypatch.setattr(module.Objective, "loss", lambda self, remedy: loss(remedy))
    monkeypatch.setattr(module.Objective, "recall", lambda self, remedy: {"passkey@32": recall(remedy)})


def scales(remedy):
    return np.array([float(v) for v in remedy.partition("scale=")[2].split("/")]) if "scale=" in remedy else np.ones(1)


def alphas(remedy):
    return np.array([float(v) for v in str(parse_remedy(remedy).alpha).split("/")])


def test_the_least_loss_that_keeps_recall(monkeypatch):
    losses(
        monkeypatch, lambda r: 1.0 if r == "none" else 1 - parse_remedy(r).share, lambda r: 0.0 if "0.25" in r else 1.0
    )
    result = calibrate(tiny(), "a-winsor", 128, TEXT)
    assert result.remedy == "a-winsor:share=0.15" and result.method == "grid"
    assert result.scores["loss"] == pytest.approx(0.85) and result.scores["loss_without"] == 1.0
    assert sum(not t["kept"] for t in result.scores["tried"]) == 1
    losses(monkeypatch, lambda r: 1.0, lambda r: 1.0 if r == "none" else 0.5)
    with pytest.raises(InputError, match="no setting of 18 keeps the recall"):
        calibrate(tiny(), "rri", 128, TEXT)


def test_a_winner_that_does_not_help_is_said_and_marked(monkeypatch, tmp_path):
    lines = []
    losses(monkeypatch, lambda r: 1.25 if r == "none" else float(3.25 - alphas(r).mean() - parse_remedy(r).beta))
    result = calibrate(tiny(), "rri", 128, TEXT, say=lines.append)
    assert parse_remedy(result.remedy) == parse_remedy("rri:alpha=1,beta=1") and not result.helps
    assert lines[-1].endswith("lowers the loss (1.2500 without): rri:alpha=1,beta=1 changes nothing")
    result.save(tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text().splitlines()[1] == "helps: false"
    assert parse_remedy(str(tmp_path / "r.yaml")).content == result
    losses(monkeypatch, lambda r: 1.0 if r == "none" else 2.0)
    result = calibrate(tiny(), "a-winsor", 128, TEXT, say=lines.append)
    assert not result.helps and lines[-1].endswith(f"lowers the loss (1.0000 without): {result.remedy} has 2.0000")
    losses(monkeypatch, lambda r: math.inf if r == "none" else 2.0)
    assert calibrate(tiny(), "a-winsor", 128, TEXT).helps


def test_settings_that_blow_up(monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else math.nan)
    with pytest.raises(InputError, match="of 5 settings that keep recall none has a finite loss at 128 tokens"):
        calibrate(tiny(), "a-winsor", 128, TEXT)
    losses(monkeypatch, lambda r: 1.0, lambda r: 1.0 if r == "none" else 0.5)
    for name in ("state-norm", "token-filter", "delta-scale", "a-scale", "window"):
        with pytest.raises(InputError, match=r"keeps the recall of the bare model \(passkey@32 1.00\): try another"):
            calibrate(tiny(), name, 128, TEXT)


def test_parameters_may_be_held(monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float("nan") if "0.75" in r else parse_remedy(r).quantile)
    result = calibrate(tiny(), "state-norm:every=16,quantile=1", 128, TEXT)
    assert result.remedy == "state-norm:every=16,quantile=1"
    result = calibrate(tiny(), "state-norm:every=16", 128, TEXT)
    assert result.remedy == "state-norm:every=16,quantile=0" and result.policies[0]["caps"][0]["every"] == 16
    assert len(result.scores["tried"]) == 5
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float(alphas(r).mean()) + parse_remedy(r).beta)
    result = calibrate(tiny(), "rri:alpha=0.95", 128, TEXT)
    assert parse_remedy(result.remedy) == parse_remedy("rri:alpha=0.95,beta=0.5") and result.method == "grid"
    with pytest.raises(InputError, match="evry"):
        calibrate(tiny(), "state-norm:evry=16", 128, TEXT)


def test_spsa_finds_an_alpha_a_layer(monkeypatch):
    goal = np.log([3e-4, 1e-3, 6e-3])  # of 1 - alpha
    losses(monkeypatch, lambda r: 9.0 if r == "none" else float(((np.log(1 - alphas(r) + 1e-9) - goal) ** 2).sum()))
    result = calibrate(tiny(3), "rri", 128, TEXT, steps=60)
    single = min(t["loss"] for t in result.scores["tried"] if "/" not in t["remedy"])
    assert result.method == "spsa" and result.scores["loss"] < 0.3 * single
    assert [p["add"] for p in result.policies] == pytest.approx(np.log(alphas(result.remedy)).tolist())


def test_spsa_goes_on_beside_settings_that_blow_up(monkeypatch):
    """A layer's factor above 1 has no loss: the way turns back from there."""
    goal = np.log([0.5, 0.9, 0.95])

    def loss(remedy):
        point = np.log(scales(remedy))
        return float(((point - goal) ** 2).sum()) if (point <= 0).all() else math.nan

    losses(monkeypatch, lambda r: 9.0 if r == "none" else loss(r))
    result = calibrate(tiny(3), "delta-scale", 128, TEXT, steps=60)
    single = min(t["loss"] for t in result.scores["tried"] if "/" not in t["remedy"])
    assert result.scores["loss"] < 0.3 * single and all(
        "/" not in t["remedy"] or t["loss"] < 9 for t in result.scores["tried"]
    )


def test_spsa_finds_a_scale_of_the_decay_a_layer(monkeypatch):
    """The other place of a-scale forgets as RRI does, and its values are tried as RRI's are."""
    goal = np.log([3e-4, 1e-3, 6e-3])  # of 1 - scale
    forgotten = lambda r: 1 - np.array([float(v) for v in str(parse_remedy(r).scale).split("/")])  # noqa: E731
    losses(monkeypatch, lambda r: 9.0 if r == "none" else float(((np.log(forgotten(r) + 1e-9) - goal) ** 2).sum()))
    result = calibrate(tiny(3), "a-scale:place=decay", 128, TEXT, steps=60)
    single = min(t["loss"] for t in result.scores["tried"] if "/" not in t["remedy"])
    assert result.method == "spsa" and result.scores["loss"] < 0.3 * single
    assert [p["add"] for p in result.policies] == pytest.approx(np.log(1 - forgotten(result.remedy)).tolist())


def test_spsa_finds_a_factor_a_layer(monkeypatch):
    goal = np.log([0.5, 0.9, 1.6])
    losses(monkeypatch, lambda r: float(((np.log(scales(r)) - goal) ** 2).sum()))
    result = calibrate(tiny(3), "delta-scale", 128, TEXT, steps=60)
    single = min(t["loss"] for t in result.scores["tried"] if "/" not in t["remedy"])
    assert result.method == "spsa" and result.scores["loss"] < 0.3 * single
    assert [p["mul"] for p in result.policies] == pytest.approx(scales(result.remedy).tolist())


@torch.no_grad()
def test_its_own_objective():
    """Loss over the second half of the target, of the calibration text alone; recall of both kinds."""
    lm = tiny()
    objective = module.Objective(lm, 64, TEXT, 0, 2, 4, 300)
    ids = objective.ids
    expected = lm.losses(lm(ids[:, :-1]), ids[:, 1:])[:, 32:].mean()
    assert objective.loss("none") == pytest.approx(float(expected), rel=1e-5)
    assert set(objective.recall("none")) == {"passkey@300", "passkey@600", "multikey@300", "multikey@600"}
    lines = []
    lm.train_length = 150
    result = calibrate(lm, "state-norm", 400, TEXT, slices=2, prompts=2, say=lines.append)
    assert result.method == "quantile" and len(lines) == 6 + (not result.helps) and "made" in result.text


def test_what_cannot_be_calibrated():
    with pytest.raises(InputError, match="'rrj' cannot be calibrated"):
        calibrate(tiny(), "rrj", 128, TEXT)
    with pytest.raises(InputError, match="above the training length"):
        calibrate(tiny(), "rri", 32, TEXT)
    with pytest.raises(InputError, match=r"were asked for|has"):
        calibrate(tiny(), "rri", 10**6, TEXT)
    with pytest.raises(InputError, match="takes the name of a remedy"):
        calibrate(tiny(), None, 128, TEXT)
    for count in ({"slices": 0}, {"prompts": 1.5}, {"steps": -1}, {"seed": None}):
        with pytest.raises(InputError, match=f"{next(iter(count))}: expected a whole number, at least"):
            calibrate(tiny(), "rri", 128, TEXT, **count)
    for held in ("rri:junk", "a-scale:place=rates", "rri:alphas=1"):
        with pytest.raises(InputError):
            calibrate(tiny(), held, 128, TEXT)


def test_the_file(tmp_path, monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float(alphas(r).mean()))
    result, lm, path = calibrate(tiny(), "rri", 128, TEXT), tiny(), tmp_path / "remedy.yaml"
    result.save(path)
    remedy = parse_remedy(str(path))
    assert remedy.content == result and str(parse_remedy(str(remedy))) == str(remedy)
    with mitigate(lm, result.remedy):
        expected = [m.policy for m in lm.mixers]
    with mitigate(lm, str(path)) as handle:
        assert [m.policy for m in lm.mixers] == expected and "made" in handle.plan.calibration
    with pytest.raises(InputError, match="found for a model with layers = 2, this one has 3"):
        mitigate(tiny(3), str(path))
    path.write_text(path.read_text().replace("-0.01", "-0.02"))
    with pytest.raises(InputError, match="has changed"):
        parse_remedy(str(remedy))
    path.write_text("remedy: rri\n")
    with pytest.raises(InputError, match="missing"):
        parse_remedy(str(path))
    bad = CalibrationFile("rri", result.model, [{"mull": 1.0}, {}], 128, "made", 0, "grid")
    bad.save(path)
    with pytest.raises(InputError, match="unknown policy field 'mull'"):
        parse_remedy(str(path))


def test_bad_files_and_words(tmp_path, monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float(alphas(r).mean()))
    result = calibrate(tiny(), "rri", 128, TEXT)
    for policy in (
        {"window": "x"},
        {"window": 1.5},
        {"mul": float("nan")},
        {"caps": 3},
        {"caps": [{"norm": 1.0, "ever": 2}]},
        {"caps": [{"norm": 1.0, "every": 1.5}]},
    ):
        CalibrationFile("rri", result.model, [policy, {}], 128, "made", 0, "grid").save(tmp_path / "bad.yaml")
        with pytest.raises(InputError, match=r"bad\.yaml: a policy in it") as error:
            parse_remedy(str(tmp_path / "bad.yaml"))
        assert "\n" not in str(error.value)
    for start, message in (("abc", "no state of numbers"), ([[1.0]], "start has shape")):
        CalibrationFile("rri", result.model, [{"start": start}, {}], 128, "made", 0, "grid").save(tmp_path / "bad.yaml")
        with mitigate(lm := tiny(), str(tmp_path / "bad.yaml")), pytest.raises(InputError, match=message):
            lm(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="cannot write"):
        save_state(tmp_path, Cache(), tiny())
    with mitigate(tiny(), "decimate") as handle, pytest.raises(InputError, match="cannot be gone on from"):
        save_state(tmp_path / "s", Cache(), handle.model, "decimate")
    (tmp_path / "t.txt").write_bytes(TEXT.data)
    with pytest.raises(InputError, match="has no loss of a text"):
        evaluate(tiny(), [64], ["lm"], ["decimate"], text=str(tmp_path / "t.txt"))
    frame = evaluate(tiny(), [64], ["lm:slices=2,tokens=1"], ["none", "rri"], text=str(tmp_path / "t.txt"))
    assert (leaderboard(frame)["wins"] == "not compared").all()  # without a control


def test_another_model_of_the_shape_is_named_once(tmp_path, caplog, monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float(alphas(r).mean()))
    path, lm = tmp_path / "remedy.yaml", tiny()
    sister = copy.deepcopy(lm)
    calibrate(lm, "rri", 128, TEXT).save(path)
    with mitigate(lm, str(path)):
        assert not caplog.records
    old, sister.name = sister.weights_hash, "sister"
    sister.lm_head.weight.data.mul_(0.5)
    for _ in range(2):
        mitigate(sister, str(path)).remove()
    warning = f"was calibrated on tiny (weights {old}), not on this sister (weights {sister.weights_hash})"
    assert [r.getMessage() for r in caplog.records] == [f"{path} {warning}"]


def test_values_a_head_are_counted_before_anything_is_read(tmp_path):
    lm, path = tiny(), tmp_path / "made.yaml"
    for policy, message in (
        ({"mul": [2.0] * 9}, "mul of layer 1 has 9 values"),
        ({"caps": [{"norm": [1.0] * 9}]}, "cap"),
    ):
        about = {"name": "tiny", **module.shape_of(lm)}
        CalibrationFile("mine", about, [{}, policy], 128, "made", 0, "by hand").save(path)
        with pytest.raises(InputError, match=rf"{message}.*the model has 2 heads a layer"):
            mitigate(lm, str(path))


def test_what_a_model_lacks_shows_before_anything_is_measured():
    lines = []
    config = MambaConfig(hidden_size=16, vocab_size=256, state_size=4, num_hidden_layers=1, time_step_rank=4)
    theirs = adopt(AutoModelForCausalLM.from_config(config).eval(), tokenizer="bytes", train_length=32)
    with pytest.raises(InputError, match="token-filter reads one step a head"):
        calibrate(theirs, "token-filter", 128, TEXT, say=lines.append)
    assert not lines


def test_a_file_of_an_unknown_remedy_composes_by_itself(tmp_path):
    lm, path = tiny(), tmp_path / "made.yaml"
    about = {"name": "tiny", **module.shape_of(lm)}
    CalibrationFile("mine", about, [{"mul": 2.0}, {}], 128, "made", 0, "by hand").save(path)
    with mitigate(lm, f"{path}+a-scale:scale=3"):
        assert [m.policy.mul for m in lm.mixers] == [6.0, 3.0]


@pytest.mark.parametrize("train", [33, 2048, 2**21 + 4])
def test_what_is_tried_can_be_read(train):
    for name in ("rri", "window", "state-norm", "token-filter", "a-winsor", "a-floor", "delta-scale", "a-scale"):
        grid = module.grid_of(name, train)
        tried = [parse_remedy(text) for text in module._grid(name, grid)]
        for key, values in grid.items():
            assert {getattr(remedy, key) for remedy in tried} == set(values)


def test_nothing_that_guards_is_an_error(monkeypatch):
    lm = tiny()
    lm.train_length = 16  # no prompt is so short
    with pytest.raises(InputError, match="nothing would guard recall"):
        calibrate(lm, "rri", 64, TEXT)


def test_no_evaluation_on_the_text_of_a_calibration(tmp_path, monkeypatch):
    losses(monkeypatch, lambda r: 1.0 if r == "none" else float(alphas(r).mean()))
    (tmp_path / "t.txt").write_bytes(TEXT.data)
    text = load_text(str(tmp_path / "t.txt"))
    calibrate(tiny(), "rri", 128, text).save(tmp_path / "remedy.yaml")
    with pytest.raises(InputError, match="which is to be evaluated"):
        evaluate(tiny(), [64], ["lm"], [f"{tmp_path / 'remedy.yaml'}+none"], text=str(tmp_path / "t.txt"))
    with pytest.raises(InputError, match=r"state-norm was calibrated on .*t\.txt, which is to be evaluated"):
        evaluate(
            tiny(), [64], ["lm"], ["state-norm"], text=str(tmp_path / "t.txt"), calibration_text=str(tmp_path / "t.txt")
        )
    lm = tiny()
    with mitigate(lm, str(tmp_path / "remedy.yaml")), pytest.raises(InputError, match="which is to be evaluated"):
        evaluate(lm, [64], ["lm"], text=str(tmp_path / "t.txt"))
