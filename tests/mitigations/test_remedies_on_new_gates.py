"""docs/results/remedies-on-new-gates.md: its tables against models of every kind, and what it says of norms and
retention."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from adopted_families import FAMILIES, built

from rnn_longctx import mitigate
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import REMEDIES, NotApplicable, fold, parse_remedy
from rnn_longctx.mitigations.base import planned
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.lm import LM
from rnn_longctx.models.saved_state import save_state
from rnn_longctx.recurrence.delta import DELTA
from rnn_longctx.recurrence.gates import DeltaGates, ScanInputs
from rnn_longctx.recurrence.policy import ScanPolicy
from rnn_longctx.testing.remedies import TARGET_LENGTH, TRAIN_LENGTH, calibration_text, examples

PAGE = (Path(__file__).parents[2] / "docs" / "results" / "remedies-on-new-gates.md").read_text()
KINDS = {
    "Mamba-2": ["mamba2:headdim=8,d_state=4"],
    "Mamba-1": ["mamba1:d_state=4"],
    "gates given": ["gla:heads=2", "hgrn2:heads=2", "retnet:heads=2", "mamba3:d_state=4,headdim=8"],
    "Gated DeltaNet, KDA": ["gated-deltanet:heads=2,head_dim=8", "kda:heads=2,head_dim=8"],
    "KDA, bounded": ["kda:heads=2,head_dim=8,lower_bound=-5"],
    "DeltaNet": ["deltanet:heads=2"],
    "RWKV-7": ["rwkv7:headdim=8"],
    "GDN-2": ["gdn2:heads=2,head_dim=8"],
    "Performer": ["performer:heads=2,features=8"],
    "Sumformer": ["sumformer:width=8,hidden=8"],
}
ADOPTED = {  # families of transformers, and the kind that each is of
    "minimax": "gates given",
    "recurrent_gemma": "gates given",
    "qwen3_next": "Gated DeltaNet, KDA",
    "kimi_linear": "Gated DeltaNet, KDA",
    "bailing_hybrid": "KDA, bounded",
}
ADOPTED = {family: kind for family, kind in ADOPTED.items() if family in FAMILIES}  # (not in an older transformers)
OF_GATES = {"mul", "add", "gain", "erase", "least_erase"}


def model_of(mixer):
    """A model of 2 layers, its weights large enough for the text to move all gates."""
    lm = LM(ModelConfig(mixer, d_model=16, n_layer=2, vocab_size=256)).double().eval()
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if weight.ndim == 2 and "A_log" not in name:
                weight.copy_(torch.randn_like(weight) * (4 / weight.shape[1]) ** 0.5)
    lm.name, lm.train_length, lm.tokenizer = "tiny", TRAIN_LENGTH, ByteTokenizer()
    return lm


def model_of_family(family, attends=False):
    """A small model of transformers, adopted, in float32."""
    return adopt(built(family, 256, attends), name="tiny", train_length=TRAIN_LENGTH, tokenizer=ByteTokenizer())


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    return {mixer: model_of(mixer) for mixers in KINDS.values() for mixer in mixers}


def rows(head):
    """The rows of the page's table whose first heading is `head`, as {first cell: {heading: cell}}."""
    table = re.search(rf"^\| {head} \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    assert table, f"the page has no table of {head}"
    headings, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table[0].splitlines())
    return {line[0].strip("`"): dict(zip(headings[1:], line[1:], strict=True)) for line in lines}


REMEDY_ROWS, FOLDED_ROWS, REASONS = rows("remedy"), rows("folded"), rows("reason")


def row_of(text):
    """The label of the row that a setting belongs to: of those whose parameters it has, the one that names most."""
    name, _, settings = text.partition(":")
    fitting = []
    for label in REMEDY_ROWS:
        remedy, _, parameters = label.partition(":")
        if remedy == name and set(filter(None, parameters.split(","))) <= set(settings.split(",")):
            fitting.append(label)
    assert fitting, f"the page has no row for {text}"
    return max(fitting, key=len)


TEXTS = [text for kind in REMEDIES.values() for text in examples(kind)]
SETTINGS = list(dict.fromkeys(text if text == "stored-start" else str(parse_remedy(text)) for text in TEXTS))


def outcome(function, *arguments):
    """What the page calls what happens in a call: yes, or no and the reason's word."""
    try:
        function(*arguments)
    except InputError as error:
        (word,) = [word for word, row in REASONS.items() if row["what the message says"] in str(error)]
        return f"no: {word}"
    return "yes"


def test_the_tables_name_all_remedies_and_kinds():
    assert {label.partition(":")[0] for label in REMEDY_ROWS} == set(REMEDIES)
    assert {row_of(text) for text in SETTINGS} == set(REMEDY_ROWS)
    assert all(list(row) == list(KINDS) for row in (*REMEDY_ROWS.values(), *FOLDED_ROWS.values()))
    assert {cell.removeprefix("no: ") for table in (REMEDY_ROWS, FOLDED_ROWS) for row in table.values()
            for cell in row.values()} == {"yes", "no effect", *REASONS} - {"library"}  # fmt: skip
    paragraphs = "".join(re.findall(r"\*\*(.*?)\*\*", PAGE, re.DOTALL))
    assert not [name for name in REMEDIES if name != "none" and f"`{name}`" not in paragraphs]


@pytest.mark.parametrize("text", SETTINGS)
def test_what_applies_is_what_the_page_says(text, models, tmp_path):
    row, ids = REMEDY_ROWS[row_of(text)], torch.randint(1, 256, (1, TARGET_LENGTH))
    for kind, mixers in KINDS.items():
        for model in map(models.get, mixers):
            setting = text
            if text == "stored-start":
                save_state(tmp_path / model.mixers[0].name, prefill(model, ids)[1], model, "none")
                setting = f"stored-start:file={tmp_path / model.mixers[0].name}"
            remedy = parse_remedy(setting)
            says = outcome(planned, remedy, model, TARGET_LENGTH, calibration_text())
            where = f"{text} on {model.mixers[0].name} ({kind})"
            assert says == row[kind].replace("no effect", "yes"), f"{where}: {says}"
            if says == "yes":
                check_effect(remedy, model, ids, row[kind] == "no effect", where)


@torch.no_grad()
def check_effect(remedy, model, ids, none, where):
    """Where it is said to have none, only gates change, and no number. Elsewhere such a change moves some."""
    changes = set().union(*(p.changes for p in planned(remedy, model, TARGET_LENGTH, calibration_text()).policies))
    of_gates = bool(changes) and changes <= OF_GATES
    assert of_gates or not none, f"{where}: of {changes or 'no policy'} it is not for logits to say"
    if of_gates:
        before = model.logits(model(ids))
        with mitigate(model, remedy, target_length=TARGET_LENGTH, text=calibration_text()):
            off = float((model.logits(model(ids)) - before).abs().max())
        assert (off <= 1e-12) if none else (off > 1e-9), f"{where} changes logits by {off:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("family", ADOPTED)
def test_an_adopted_model_takes_what_its_kind_takes(family, tmp_path):
    """Each remedy, in the last of its settings, moves the logits after a prompt, or says the page's reason."""
    model, ids = model_of_family(family), torch.randint(1, 256, (1, TARGET_LENGTH))
    last = {row_of(text): text for text in SETTINGS}
    save_state(tmp_path / "state", prefill(model, ids)[1], model, "none")
    last["stored-start"] = f"stored-start:file={tmp_path / 'state'}"
    before = read_by_us(model, ids)
    for label, row in REMEDY_ROWS.items():
        remedy, where = parse_remedy(last[label]), f"{last[label]} on {family}"
        says = outcome(planned, remedy, model, TARGET_LENGTH, calibration_text())
        assert says == row[ADOPTED[family]], f"{where}: {says}"
        if says == "yes":
            with mitigate(model, remedy, target_length=TARGET_LENGTH, text=calibration_text()):
                off = float((read_by_us(model, ids) - before).abs().max())
            assert (off == 0.0) if label == "none" else (off > 1e-6), f"{where} changes logits by {off:.1e}"


def read_by_us(model, ids):
    """The logits after a prompt, by this library's scan with a remedy and without, so that rounding is the same."""
    for mixer in model.mixers:
        mixer.continue_stream(True)
    return prefill(model, ids)[0]


@pytest.mark.parametrize("family", ADOPTED)
def test_nothing_is_folded_into_an_adopted_model(family):
    """Where no weight scales the log-decays alone that is the reason, and elsewhere whose the weights are."""
    for label, row in FOLDED_ROWS.items():
        why = "no: weight" if row[ADOPTED[family]] == "no: weight" else "no: library"
        assert outcome(fold, model_of_family(family), fold_of(label)) == why


@pytest.mark.parametrize("label", FOLDED_ROWS)
def test_what_can_be_folded_is_what_the_page_says(label, models):
    text = fold_of(label)
    for kind, mixers in KINDS.items():
        for mixer in mixers:
            model = copy.deepcopy(models[mixer])
            says = outcome(fold, model, text, calibration_text())
            assert says == FOLDED_ROWS[label][kind], f"{text} into {mixer}: {says}"


def fold_of(label):
    """A setting of a remedy that can be folded."""
    return {"a-scale": "a-scale:scale=1.5", "a-winsor": "a-winsor", "a-floor": f"a-floor:tokens={TRAIN_LENGTH}"}[label]


@pytest.mark.parametrize("mixer", [*(mixer for mixers in KINDS.values() for mixer in mixers), *ADOPTED])
def test_controls_of_hybrids_apply_beside_attention(mixer):
    hybrid = model_of_family(mixer, attends=True) if mixer in ADOPTED else model_of([mixer, "full-attention:heads=2"])
    for text in (f"attention-window:tokens={TRAIN_LENGTH}", f"reset-recurrence:every={TRAIN_LENGTH}"):
        planned(parse_remedy(text), hybrid, TARGET_LENGTH)
    with pytest.raises(NotApplicable):
        planned(parse_remedy("decimate"), hybrid, TARGET_LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_undoes_what_is_written_less(kind, models):
    """A factor on all writes leaves outputs behind a norm as they are, unless D x stands beside or e changes too."""
    ids = torch.randint(1, 256, (1, TARGET_LENGTH))
    for mixer in KINDS[kind]:
        model, beside = copy.deepcopy(models[mixer]), mixer.startswith("mamba")  # (D x)
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 0.0
        before = model.logits(model(ids))
        off = {}
        for text in ("rri:alpha=1,beta=0.5", "rri:alpha=1,beta=0.5,erases=true"):
            if REMEDY_ROWS[row_of(str(parse_remedy(text)))][kind] == "yes":
                with mitigate(model, text):
                    off[text] = float((model.logits(model(ids)) - before).abs().max())
        writing_less, *erasing_less = off.values()
        if erasing_less:  # then, as nothing is lost by writing less, it is less erasing
            with mitigate(model, "rri:alpha=1,beta=0.5,erases=true"):
                both = model.logits(model(ids))
            with mitigate(model, "erase:scale=0.5"):
                assert float((model.logits(model(ids)) - both).abs().max()) < 1e-8
        if not REMEDY_ROWS["a-scale"][kind].startswith("no:"):
            with mitigate(model, "delta-scale:scale=0.7"):
                scaled = model.logits(model(ids))
            with mitigate(model, "a-scale:scale=0.7"):
                off_decay = float((model.logits(model(ids)) - scaled).abs().max())
            assert (off_decay > 1e-6) == beside, (mixer, off_decay)
        if beside:
            assert writing_less > 1e-6
        else:
            assert writing_less < 1e-8 and all(value > 1e-6 for value in erasing_less), (mixer, off)


def left_of(start, decay, *, erase, read=None, along=None, key=None, decay_first=True):
    """What the delta rule leaves of a state start (H, P, N) where nothing is written."""
    length, heads = erase.shape[1:]
    zeros = torch.zeros(1, length, heads, start.shape[1], dtype=torch.float64)
    inputs = ScanInputs(zeros, key, key)
    gates = DeltaGates(decay, torch.zeros_like(erase), erase, read, along, decay_first)
    return DELTA.scan(inputs, gates, policy=ScanPolicy(start=start))[1].state[0]


def unit_keys(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_one_decay_a_head_bounds_what_is_left():
    T, H, P, N = 12, 6, 4, 5
    start, key = torch.randn(H, P, N, dtype=torch.float64), unit_keys(1, T, H, N)
    decay, erase = -0.3 * torch.rand(1, T, H).double(), 2 * torch.rand(1, T, H).double()
    norms = left_of(start, decay, erase=erase, key=key).flatten(1).norm(dim=1)
    assert (norms <= decay.sum(1)[0].exp() * start.flatten(1).norm(dim=1) * (1 + 1e-12)).all()
    assert (norms < 0.99 * decay.sum(1)[0].exp() * start.flatten(1).norm(dim=1)).any(), "erasing takes away as well"


def test_a_decay_a_channel_is_bounded_by_the_largest_alone():
    """Channel 0 is erased into channel 1 before it decays to nothing: of its decays exp(-40) would be left."""
    far, key = -40.0, torch.full((1, 2, 1, 2), 0.5**0.5, dtype=torch.float64)
    decay = torch.tensor([[[[0.0, far]], [[far, 0.0]]]], dtype=torch.float64)
    erase = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)
    left = left_of(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64), decay, erase=erase, key=key)
    assert left.norm() > 0.4 and decay.sum(1).exp().max() < 1e-17
    T, H, P, N = 12, 6, 4, 5
    start, decay = torch.randn(H, P, N, dtype=torch.float64), -torch.rand(1, T, H, N).double()
    norms = left_of(start, decay, erase=torch.rand(1, T, H).double(), key=unit_keys(1, T, H, N)).flatten(1).norm(dim=1)
    assert (norms <= decay.amax(-1).sum(1)[0].exp() * start.flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("rule", ["RWKV-7", "GDN-2"])
def test_a_state_may_grow_where_what_is_read_is_not_what_is_erased(rule):
    def growth(key, gate):
        """The largest factor on a state's norm in a token, where nothing decays: of (n, N) keys and gates."""
        n, N = key.shape
        gated = (gate * key)[None, None]
        read, along = (key[None, None], gated) if rule == "RWKV-7" else (gated, key[None, None])
        zeros, ones = torch.zeros(1, 1, n, N, dtype=torch.float64), torch.ones(1, 1, n, dtype=torch.float64)
        eye = torch.eye(N, dtype=torch.float64).expand(n, N, N)
        first = rule == "GDN-2"
        matrix = left_of(eye, zeros, erase=ones, read=read, along=along, key=key[None, None], decay_first=first)
        return torch.linalg.matrix_norm(matrix, 2)

    worst = growth(torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).sqrt(), torch.tensor([[1.0, 0.0]]).double())
    assert float(worst) == pytest.approx(2 / 3**0.5, rel=1e-9)
    assert (growth(unit_keys(200, 4), torch.rand(200, 4).double()) <= 2 / 3**0.5 + 1e-12).all()
