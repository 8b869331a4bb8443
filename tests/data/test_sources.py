from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from rnn_longctx.data import load_text, open_streamed
from rnn_longctx.data import text as text_module
from rnn_longctx.data.sources import open_source
from rnn_longctx.errors import InputError

ALPHABET = list("abc de\n\t\"\\'é漢🙂ß")


def random_documents(n: int) -> list[str]:
    rng = np.random.default_rng()
    return ["".join(rng.choice(ALPHABET, rng.integers(1, 90))) for _ in range(n)]


def write(path: Path, documents: list[Any], field: str = "text") -> Path:
    """As the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"n": range(len(documents)), field: documents}), path, row_group_size=7)
        return path
    raw = "".join(json.dumps({"n": i, field: d}) + "\n" for i, d in enumerate(documents)).encode()
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(raw)
    else:
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def read(spec: str | Path) -> list[str]:
    source = open_source(str(spec))
    assert source is not None
    return [d.decode() for d in source.documents()]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_records(tmp_path: Path, suffix: str) -> None:
    documents = random_documents(150)
    path = write(tmp_path / f"a{suffix}", [*documents[:90], "", None, "nul\0inside", *documents[90:]])
    expected = [*documents[:90], "nulinside", *documents[90:]]
    assert read(path) == expected, "in order; without what is empty, and without NUL"
    kind = "parquet" if suffix == ".parquet" else "jsonl"
    renamed = write(tmp_path / f"b{suffix}", documents, "body")
    assert read(f"{kind}:{renamed}:body") == documents
    text = load_text(path)
    assert text.name == f"{kind}:a{suffix}:text" and text.data == "\0".join(expected).encode()
    if kind == "jsonl":
        lines = load_text(f"file:{path}").data.decode().splitlines()
        assert json.loads(lines[5])["text"] == documents[5], "a file as it is, but unpacked"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_directory_is_its_files_in_order(tmp_path: Path, kind: str) -> None:
    documents = random_documents(30)
    suffixes = [".jsonl", ".jsonl.gz", ".ndjson.zst"] if kind == "jsonl" else [".parquet"] * 3
    names = ["a/2", "a/10", "b"]  # "a/10" sorts before "a/2"
    order = [1, 0, 2]
    for i, (name, suffix) in enumerate(zip(names, suffixes)):
        write(tmp_path / f"{name}{suffix}", documents[10 * order[i] : 10 * order[i] + 10])
    (tmp_path / "README.md").write_text("not records")
    (tmp_path / f".hidden.{kind}").write_text("nor this")
    assert read(f"{kind}:{tmp_path}") == documents
    source = open_source(f"{kind}:{tmp_path}:text")
    assert source is not None and len(source.shards) == 3 and str(tmp_path) not in source.name


def test_reading_is_a_stream(tmp_path: Path) -> None:
    """What is broken further on is not known until it is reached."""
    documents = random_documents(20_000)
    for path in (write(tmp_path / "a.jsonl", documents), write(tmp_path / "a.jsonl.gz", documents)):
        data = path.read_bytes()
        cut = len(data) * 9 // 10
        path.write_bytes(data[: data.rindex(b"\n", 0, cut) + 9] if path.suffix == ".jsonl" else data[:cut])
        source = open_source(str(path))
        assert source is not None
        found = iter(source.documents())
        assert [next(found).decode() for _ in range(5)] == documents[:5]
        with pytest.raises(InputError, match=path.name):
            list(found)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["text"]', "expected an object with the field 'text', got list"),
        (b'{"txt": "a", "id": 1}', r"no field 'text' \(fields: txt, id\)"),
        (b'{"text": 3}', "field 'text' is int, not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    good = int(np.random.default_rng().integers(0, 40))
    path.write_bytes(b'{"text": "fine"}\n' * good + b"\n" + line + b'\n{"text": "fine"}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl:{good + 2}: .*{words}") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    documents = random_documents(500)
    cases: list[tuple[Path | str, str]] = [
        (tmp_path / "no.jsonl", r"no jsonl files at .*no\.jsonl"),
        (f"parquet:{tmp_path / 'none'}", "no parquet files at"),
        (f"jsonl:{write(tmp_path / 'x.jsonl', documents)}:body", r"x\.jsonl:1: no field 'body'"),
        (
            f"parquet:{write(tmp_path / 'p.parquet', documents)}:body",
            r"p\.parquet: no column 'body' \(columns: n, text",
        ),
        (f"parquet:{tmp_path / 'p.parquet'}:n", r"p\.parquet: column 'n' is int64, not text"),
    ]
    for name, at in (("q.parquet", 0.9), ("r.jsonl.zst", 0.5), ("s.jsonl.gz", 0.5)):
        path = write(tmp_path / name, documents)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])
        cases.append((path, f"{name}: cannot be read after (line|row)"))
    for spec, words in cases:
        with pytest.raises(InputError, match=words) as error:
            read(spec)
        assert "\n" not in str(error.value)


def test_a_local_hugging_face_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    documents = random_documents(30)
    for i in range(3):
        write(tmp_path / "set" / f"train-{i}.jsonl", documents[10 * i : 10 * i + 10])
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source is not None and source.name == "hf:set:train:text" and len(source.shards) == 3
    assert [d.decode() for d in source.documents()] == documents
    assert len({shard.identity for shard in source.shards}) == 3
    (tmp_path / "set" / "train-1.jsonl").write_text('{"n": 0, "text": "x"}\n{"n": \n')
    again = open_source(f"hf:{tmp_path / 'set'}")
    assert again is not None and again.shards[0].identity != source.shards[0].identity
    with pytest.raises(InputError, match="shard 2 of 3 cannot be read after row"):
        list(again.documents())


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = random_documents(30)
    parts = {"train": documents[:20], "test": documents[20:]}
    several = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in parts.items()})
    several.save_to_disk(tmp_path / "both", num_shards={"train": 3, "test": 1})
    for split, expected in parts.items():
        source = open_source(f"hf:{tmp_path / 'both'}:{split}")
        assert source is not None and source.name == f"hf:both:{split}:text"
        assert [d.decode() for d in source.documents()] == expected
        assert len(source.shards) == (3 if split == "train" else 1)
    with pytest.raises(InputError, match=r"no split 'dev' \(splits: train, test\)"):
        open_source(f"hf:{tmp_path / 'both'}:dev")
    several["test"].save_to_disk(tmp_path / "one")
    alone = open_source(f"hf:{tmp_path / 'one'}")
    assert alone is not None and [d.decode() for d in alone.documents()] == parts["test"]
    with pytest.raises(InputError, match=r"no column 'body' \(columns: text\)"):
        open_source(f"hf:{tmp_path / 'one'}::body")


def test_a_configuration_of_a_data_set(tmp_path: Path) -> None:
    """By a third part of its name, or behind the directory that it is in."""
    pytest.importorskip("datasets")
    documents = random_documents(8)
    write(tmp_path / "set" / "a.jsonl", documents[:4])
    write(tmp_path / "set" / "b.jsonl", documents[4:])
    parts = "".join(f"- config_name: {k}\n  data_files: {k}.jsonl\n" for k in "ab")
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    for name, expected in (("a", documents[:4]), ("b", documents[4:])):
        source = open_source(f"hf:{tmp_path / 'set' / name}")
        assert source is not None and source.name == f"hf:set/{name}:train:text"
        assert [d.decode() for d in source.documents()] == expected
    with pytest.raises(InputError, match=r"cannot load text .*'c' not found"):
        open_source(f"hf:{tmp_path / 'set' / 'c'}")


def test_a_file_by_the_name_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").write_text("text")
    assert open_source("hf") is None


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the datasets package: pip install"):
        open_streamed("hf:owner/set")


def test_a_large_directory_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(40)
    for i, document in enumerate(documents):
        (tmp_path / f"{i:02}.txt").write_text(document)
    (tmp_path / "05.bin").write_bytes(b"a\0b")
    assert open_streamed(str(tmp_path)) is None
    monkeypatch.setattr(text_module, "HELD", 100)
    monkeypatch.setattr(text_module, "GROUP", 300)
    source = open_streamed(f"dir:{tmp_path}")
    held = load_text(tmp_path)
    assert source is not None and source.name == held.name and len(source.shards) > 3
    assert b"\0".join(source.documents()) == held.data == "\0".join(documents).encode()
    (tmp_path / "11.txt").write_bytes(b"latin \xe9")
    assert (
        b"\0".join(source.documents())
        == load_text(tmp_path).data
        == "\0".join(documents[:11] + documents[12:]).encode()
    )
    assert open_streamed("stdlib") is None and open_streamed(str(tmp_path / "00.txt")) is None


def test_every_kind_of_text_column(tmp_path):
    """huggingface/datasets#6892, pola-rs/polars#17945: a category of pandas or Polars is a dictionary in Arrow, and
    newer writers have views."""
    words, of_text = ["a", "", "zwei", None, "éé", "a"], []
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
             pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string())]  # fmt: skip
    kinds += [pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []
    for i, kind in enumerate(kinds):
        column = pyarrow.array(words, pyarrow.string())
        if pyarrow.types.is_dictionary(kind):
            column = column.cast(kind.value_type).dictionary_encode().cast(kind)
        else:
            column = column.cast(kind)
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{i}.parquet")
        of_text.append(load_text(tmp_path / f"{i}.parquet").data)
    assert of_text == ["a\0zwei\0éé\0a".encode()] * len(kinds)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"a", b"b"])}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="column 'text' is binary, not text"):
        load_text(tmp_path / "n.parquet")
