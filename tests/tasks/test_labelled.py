"""Texts with labels from files."""

from __future__ import annotations

import os

import numpy as np
import pytest

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.base import TooShort
from rnn_longctx.tasks.labelled import Labelled

BYTES = ByteTokenizer()


def written(tmp_path, name: str, text: str) -> str:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    return str(tmp_path / name)


def test_a_text_its_question_and_its_label(tmp_path, seed):
    """Short texts stand behind newlines, long ones lose their ends."""
    rows = {"good": "what a, film", "bad": "long " * 30}
    file = written(tmp_path, "films.csv", "id,label,text\n" + "".join(f'1,{k},"{v}"\n' for k, v in rows.items()))
    task, seen = Labelled(file), set()
    for i in range(60):
        example = task.example(50, 0, 1, np.random.default_rng([seed, i]), BYTES)
        text, label = bytes(example.ids.astype(np.uint8)).decode().split("\nLabel: ")
        room = 50 - len(label) - len("\nLabel: ")
        assert text == rows[label][:room].rjust(room, "\n")
        assert BYTES.decode(example.ids[example.answers]) == f" {label}"
        seen.add(label)
    assert seen == set(rows) and task.chance == 0.5 and task.label == "labelled-films"
    with pytest.raises(TooShort):
        task.example(11, 0, 1, np.random.default_rng(seed), BYTES)


def test_files_of_lra_are_read_and_a_file_that_changes_is_read_again(tmp_path):
    file = written(tmp_path, "listops.tsv", "Source\tTarget\n( ( [MAX 1 ) 2 ] )\t2\n[MIN 0 4 ]\t0\n")
    task = Labelled(file)
    assert task.table.texts == ["( ( [MAX 1 ) 2 ] )", "[MIN 0 4 ]"] and task.table.labels == ["2", "0"]
    before = task.text
    written(tmp_path, "listops.tsv", "Source\tTarget\n[MIN 0 4 ]\t0\nNA\tnull\n")
    os.utime(file, ns=(1, 1))
    assert task.table.labels == ["0", "null"] and task.table.texts[1] == "NA" and task.text != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "expected columns text and label, got a, b"),
        ("text,label\n", "expected rows that all have a label"),
        ("text,label\nx,\n", "expected rows that all have a label"),
        ("", "is no table"),
        ("text,label\n\xe4\xff,1\n", "is no table"),
        ("text,label\na,b,c,d\ne,f\n1,2,3,4,5,6\n", "is no table"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        Labelled(written(tmp_path, "wrong.csv", content))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"labelled: cannot read .*nowhere\.csv: No such file"):
        Labelled(str(tmp_path / "nowhere.csv"))
