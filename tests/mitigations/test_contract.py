"""Every remedy of the registry is held to what `rnn_longctx.testing` says, on models of every kind."""

import pytest
import torch

from rnn_longctx.mitigations import REMEDIES, diagnostics, parse_remedy, standard
from rnn_longctx.mitigations.base import Need
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.saved_state import save_state
from rnn_longctx.testing.remedies import (
    KINDS,
    TRAIN_LENGTH,
    check_cuts,
    check_on_and_off,
    check_remedy,
    check_text,
    examples,
    is_applicable,
    own_model,
)

NEED_A_FILE = {"stored-start"}  # below
MORE = ["attention-window:tokens=8", "a-floor:tokens=9+rri"]
HELD = [text for kind in REMEDIES.values() if kind.name not in NEED_A_FILE for text in examples(kind)]
SETTINGS = dict.fromkeys(str(parse_remedy(text)) for text in (*HELD, *MORE))


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return {kind: make(0) for kind, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SETTINGS)
def test_a_remedy_on_a_kind_of_model(text, kind, models):
    check_text(text)
    if is_applicable(text, models[kind]):
        check_on_and_off(text, models[kind])
        check_cuts(text, models[kind])


def test_a_start_that_a_file_holds(tmp_path):
    model = own_model()
    save_state(tmp_path / "s", prefill(model, torch.arange(1, 60)[None])[1], model, "none")
    check_remedy(f"stored-start:file={tmp_path / 's'}", kinds=["own"])


def test_every_remedy_is_among_them():
    held = {part.name for text in SETTINGS for part in parse_remedy(text).parts} | {"none", *NEED_A_FILE}
    assert held == set(REMEDIES) and {str(parse_remedy(text)) for text in standard(TRAIN_LENGTH)} <= set(SETTINGS)


@pytest.mark.parametrize("name", REMEDIES)
def test_examples_are_settings_of_their_remedy(name):
    for text in REMEDIES[name].examples:
        assert type(parse_remedy(text)) is REMEDIES[name], f"{text} stands in {name}"


def test_a_remedy_without_any_setting_is_held_to_its_bare_name():
    assert examples(REMEDIES["stored-start"]) == ["stored-start"] and examples(REMEDIES["rri"])[0] == "rri"
    assert examples(REMEDIES["reset"]) == [*REMEDIES["reset"].usual(TRAIN_LENGTH), "reset:every=7,overlap=3"]


def test_which_kinds_of_models_take_which_remedies(models):
    """What `needs` says, and what happens, are the same."""
    given = {Need.ATTENTION, Need.STEPS, Need.RATES}
    lacks = {
        "own": {Need.ATTENTION, Need.ERASING},
        "given gates": {*given, Need.ERASING},
        "delta rule": {*given, "a window"},
        "attention alone": {*given, Need.RECURRENCE, Need.NO_ATTENTION, Need.ERASING},
        "full attention": {*given, Need.RECURRENCE, Need.NO_ATTENTION, Need.ERASING},
        "adopted Mamba-2": {Need.ATTENTION, Need.ERASING, Need.KEYS},
        "adopted Mamba-1": {*given, Need.ERASING, Need.KEYS},
        "hybrid": {Need.NO_ATTENTION, Need.ERASING, Need.KEYS},
    }
    for kind, missing in lacks.items():
        missing |= set() if kind == "full attention" else {Need.ROTARY}
    hang_on_the_setting = {"rri:alpha=0.9999,beta=0.75,erases=true": {Need.ERASING}}
    for text in SETTINGS:
        for kind, model in models.items():
            parts = parse_remedy(text).parts
            needs = frozenset().union(*(part.needs for part in parts), hang_on_the_setting.get(text, ()))
            needs |= {"a window" for part in parts if part.name == "window"}
            assert is_applicable(text, model) == (not needs & lacks[kind]), f"{text} on {kind}"
        assert any(not needs & lacks[kind] for kind in models), f"{text} is held to nothing"


def test_all_is_in_the_order_of_controls_last():
    texts = standard(TRAIN_LENGTH)
    controls = [REMEDIES[text.partition(":")[0]].control for text in texts]
    assert texts[0] == "none" and controls == sorted(controls) and texts[-2:] == diagnostics(TRAIN_LENGTH)
    for train_length in (48, None):
        texts = standard(train_length)
        assert set(texts) == {text for kind in REMEDIES.values() for text in kind.usual(train_length)}
        assert len(set(map(str, map(parse_remedy, texts)))) == len(texts), "no setting twice"


def test_all_has_the_published_settings():
    without_a_length = {
        "none",
        "rri",
        "rri:alpha=0.999,beta=1",
        "a-winsor",
        "a-scale:scale=1.5",
        "delta-scale:scale=0.7",
        "noise-start:std=0.1",
        "decimate",
        "chunk-select",
    }
    of_a_length = {
        "state-norm",
        "state-norm:every=64",
        "window:tokens=48",
        "window:tokens=192",
        "token-filter",
        "lamb",
        "a-floor",
        "recompute:last=48",
        "recompute:last=96",
        "reset:every=48",
        "attention-window:tokens=48",
        "reset-recurrence:every=48",
    }
    controls = {"recompute:last=512", "recompute:last=2048", "reset:every=512"}
    named = {text.partition(":")[0] for text in without_a_length | of_a_length}  # a remedy that is new is another's
    for train_length, settings in ((48, of_a_length), (None, controls)):
        texts = {text for text in standard(train_length) if text.partition(":")[0] in named}
        assert texts == without_a_length | settings
