"""Calibration never sees what is evaluated, whatever the two are called and wherever they lie."""

import shutil

import pytest
import torch

from rnn_longctx import InputError, evaluate, load_text, mitigate
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.eval.search.unseen import DIGESTS, LEAST, shared, smallest_digests
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

LM = "lm:slices=1,tokens=0"


def letters(n):
    return bytes(torch.randint(97, 123, (n,)).tolist())


@pytest.fixture
def model():
    torch.set_num_threads(1)
    lm = Mamba2LM(Mamba2Config(d_model=16, n_layer=1, headdim=16, d_state=8)).eval()
    lm.train_length, lm.tokenizer, lm.name = 150, ByteTokenizer(), "tiny"
    return lm


@pytest.fixture
def folder(tmp_path):
    """A folder of three files, one of them in a folder of its own; a copy of one elsewhere; and what is not in it."""
    top = tmp_path / "texts"
    (top / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (top / name).write_bytes(letters(3000))
    (top / "tiny.txt").write_bytes(b"# nothing\n")
    shutil.copy(top / "a.txt", tmp_path / "copy.txt")
    (tmp_path / "part.txt").write_bytes((top / "b.txt").read_bytes()[100:2500])
    (tmp_path / "holed.txt").write_bytes(letters(2500) + b"\0" + letters(500))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "o.txt").write_bytes(letters(3000))
    (tmp_path / "other" / "tiny.txt").write_bytes(b"# nothing\n")
    return tmp_path


SEEN = [("texts", "texts/a.txt"), ("texts/a.txt", "texts"), ("texts", "texts/sub"), ("texts/sub", "texts"),
        ("texts", "copy.txt"), ("copy.txt", "texts"), ("texts/a.txt", "copy.txt"), ("texts", "part.txt"),
        ("part.txt", "texts/b.txt"), ("texts", "texts")]  # fmt: skip


@pytest.mark.parametrize(("evaluated", "calibrated"), SEEN)
def test_a_text_that_shares_with_the_evaluated_one(model, folder, evaluated, calibrated):
    where = str(folder / evaluated)
    with pytest.raises(InputError, match=r"state-norm was calibrated on .*to be evaluated: that would flatter it"):
        evaluate(model, 64, LM, "state-norm", text=where, calibration_text=str(folder / calibrated))
    with mitigate(model, "state-norm", text=str(folder / calibrated)), pytest.raises(InputError, match="flatter"):
        evaluate(model, 64, LM, text=load_text(where))
    frame = evaluate(model, 64, LM, "rri", text=where, calibration_text=str(folder / calibrated))  # which reads none
    assert set(frame.mitigation) == {"rri:alpha=0.9999,beta=0.75"}


def test_a_file_in_a_folder_that_leaves_it_out(model, folder):
    """One with NUL bytes is no document of its folder: the path alone tells."""
    shutil.move(folder / "holed.txt", folder / "texts" / "holed.txt")
    inside, texts = folder / "texts" / "holed.txt", folder / "texts"
    assert not shared(load_text(inside), load_text(texts))
    with pytest.raises(InputError, match=r"file:holed\.txt, which shares text with dir:texts"):
        evaluate(model, 64, LM, "state-norm", text=str(texts), calibration_text=str(inside))


def test_what_shares_no_more_than_a_notice_is_allowed(model, folder):
    given = {"text": str(folder / "texts"), "calibration_text": str(folder / "other")}
    assert set(evaluate(model, 64, LM, "state-norm", **given).mitigation) == {"state-norm"}
    words = "passkey:n=1"  # a prompt of ours is no text of theirs
    given["calibration_text"] = str(folder / "texts" / "a.txt")
    assert len(evaluate(model, 150, words, "state-norm", **given))


@pytest.mark.parametrize(("evaluated", "calibrated"), [pair for pair in SEEN if "part.txt" not in pair])
def test_a_calibration_file_keeps_what_it_saw(model, folder, evaluated, calibrated):
    where, file = str(folder / evaluated), str(folder / "remedy.yaml")
    found = calibrate(model, "a-winsor:share=0.1", 300, folder / calibrated, slices=1, prompts=1)
    found.save(file)
    assert str(folder) not in (folder / "remedy.yaml").read_text()
    for remedy in (file, f"{file}+rri"):
        with pytest.raises(InputError, match="which is to be evaluated"):
            evaluate(model, 64, LM, remedy, text=where)
    assert len(evaluate(model, 64, LM, file, text=str(folder / "other")))


def test_the_builtin_text_is_known_by_its_documents(model, folder):
    source = next(d for d in load_text("builtin").documents() if len(d) > LEAST)
    (folder / "texts" / "ours.py").write_bytes(source)
    with pytest.raises(InputError, match="builtin, which shares text with dir:texts"):
        evaluate(model, 64, LM, "state-norm", text=str(folder / "texts"))


def test_a_large_folder_is_kept_in_part():
    text = Text("many", b"\0".join(b"%06d" % i * 40 for i in range(DIGESTS + 100)))
    assert len(smallest_digests(text)) == DIGESTS == len(set(smallest_digests(text)))
