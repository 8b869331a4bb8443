"""What files hold is told by their bytes: what can be text is read alike, the rest is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save
from tokenizers import Tokenizer, models

from rnn_longctx.data import ByteTokenizer, content, load_text, open_streamed
from rnn_longctx.data import text as text_module
from rnn_longctx.data.arrivals import Arrivals
from rnn_longctx.data.content import as_text, not_utf8
from rnn_longctx.data.sources import open_source
from rnn_longctx.errors import InputError


def words(n: int) -> str:
    rng = np.random.default_rng()
    return "".join(rng.choice(list("abc de\n\t\"\\'é漢🙂ß"), n))


def arrow(codec: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    return pack


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": arrow("zstd"), "lz4": arrow("lz4"),
}  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a"])
@pytest.mark.parametrize("packing", [None, *PACK])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_one_text_has_one_hash_however_it_was_saved(tmp_path: Path, name: str, packing: str, encoding: str) -> None:
    text = words(int(np.random.default_rng().integers(1, 4000)))
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(PACK[packing](raw) if packing else raw)
    assert load_text(tmp_path / name).data == load_text(tmp_path).data == text.encode()


@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("bits", [16, 32])
def test_both_byte_orders(order: str, bits: int) -> None:
    text, encoding = words(300), f"utf-{bits}-{order}"
    assert as_text(f"\ufeff{text}".encode(encoding), "x") == text.encode()
    with pytest.raises(InputError, match=r"x (looks like UTF-16 or UTF-32 without a byte order mark|is not UTF-8)"):
        as_text(text.encode(encoding), "x")
    with pytest.raises(InputError, match=r"x looks like UTF-16 or UTF-32 without a byte order mark; .*iconv"):
        as_text(("plain words " * 9).encode(encoding), "x")
    with pytest.raises(InputError, match=rf"x begins as UTF-{bits} text and is none from byte \d+ on"):
        as_text(f"\ufeff{text}".encode(encoding)[:-1], "x")


@pytest.mark.parametrize("packing", PACK)
def test_packed_twice_in_two_members_and_cut_short(packing: str) -> None:
    pack, text = PACK[packing], words(5000).encode()
    assert as_text(gzip.compress(pack(text)), "x") == text
    assert as_text(pack(text) + pack(b"more"), "x") == text + b"more"
    with pytest.raises(InputError, match=f"x: its {packing} is damaged or cut short"):
        as_text(pack(text)[:-20], "x")


def packed_files(**files: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return sink.getvalue()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return sink.getvalue()


def written(save: Callable[[io.BytesIO], object]) -> bytes:
    sink = io.BytesIO()
    save(sink)
    return sink.getvalue()


TABLE = pyarrow.table({"text": ["one", "two"]})
REFUSED: dict[str, tuple[bytes, str]] = {
    "PDF": (b"%PDF-1.7\n1 0 obj\n<< >>\n", "a PDF; pdftotext"),
    "docx": (packed_files(**{"[Content_Types].xml": b"", "word/document.xml": b"<x/>"}), "a Word document"),
    "EPUB": (packed_files(**{"mimetype": b"application/epub+zip", "META-INF/container.xml": b""}), "an EPUB"),
    "ZIP": (packed_files(**{"a.txt": b"hello"}), "a ZIP archive; unpack it"),
    "torch": (written(lambda f: torch.save({"a": torch.ones(2)}, f)), "a PyTorch file; a model's weights are loaded"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "an image"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "an image"),
    "pickle": (pickle.dumps({"a": [1, 2]}), "a Python pickle; nothing in it was run"),
    "safetensors": (save({"a": torch.zeros(4)}), "safetensors; a model's weights are loaded"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 32, "a GGUF model"),
    "NumPy": (written(lambda f: np.save(f, np.zeros(3))), "a NumPy array"),
    "tar": (tar(), "a tar archive; unpack it"),
    "gzipped tar": (gzip.compress(tar()), "unpacked from gzip, looks like a tar archive; unpack it"),
    "Parquet": (written(lambda f: parquet.write_table(TABLE, f)), r"Parquet; parquet:PATH\[:column\] reads it"),
    "SQLite": (b"SQLite format 3\0" + b"\x10\0" * 20, "an SQLite database"),
    "program": (b"\x7fELF\x02\x01\x01" + b"\0" * 30, "a program"),
    "tokenizer": (Tokenizer(models.BPE()).to_str(pretty=True).encode(), "a tokenizer.json; that goes to --tokenizer"),
    "Latin-1": ("gut für".encode("latin1"), r"not UTF-8 text at byte 5 \(0xfc\); .*iconv -f latin1 -t utf-8"),
    "cut short": ("漢字".encode()[:-1], "ends inside a character, at byte 3; iconv -c"),
    "noise": (b"\x01\xfe" * 30, r"not UTF-8 text at byte 1 \(0xfe\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    data, said = REFUSED[kind]
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"a.txt.* {said}|a.txt, {said}") as error:
        load_text(f"file:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("begins", ["MZ", "GGUF", "PAR1", "BM", "ID3", "GIF89a", "RIFF", "Rar!", "BZh9", "%PDF-1.4 is"])
def test_a_text_may_begin_like_anything(begins: str) -> None:
    text = f"{begins} and then it goes on, for some more than 40 bytes of text: {words(40)}".encode()
    assert as_text(text, "x") == text
    assert as_text(b"one\0two and three\0" + text, "x") == b"one\0two and three\0" + text, "documents"


def test_the_byte_that_is_not_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK", 7)
    rng = np.random.default_rng()
    for _ in range(60):
        data = bytearray(words(30).encode())
        assert not_utf8(bytes(data)) is None
        data[rng.integers(len(data))] = 0xFF
        with pytest.raises(UnicodeDecodeError) as error:
            data.decode()
        assert not_utf8(bytes(data)) == error.value.start


def test_what_a_directory_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name, (data, _) in REFUSED.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    (tmp_path / "nul").write_bytes(b"one\0two and three")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    texts = {f"{i}.txt": words(30).encode() for i in range(5)}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "3.gz").write_bytes(gzip.compress(texts.pop("3.txt")))
    (tmp_path / "3.txt").unlink()
    expected = [texts[f"{i}.txt"] if i != 3 else gzip.decompress((tmp_path / "3.gz").read_bytes()) for i in range(5)]
    assert list(load_text(tmp_path).documents()) == expected
    (said,) = caplog.messages
    count = len(REFUSED) + 2
    assert f"{count} of {count + 5} files are left out: " in said and f"; and {count - 3} more" in said
    assert "EPUB.txt looks like an EPUB" in said and str(tmp_path) not in said
    monkeypatch.setattr(text_module, "HELD", 0)
    source = open_streamed(str(tmp_path))
    assert source is not None and list(source.documents()) == expected
    assert len(caplog.messages) == 2


def test_a_directory_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(REFUSED["PNG"][0])
    with pytest.raises(InputError, match=r"text dir:.* is empty"):
        load_text(tmp_path)
    assert "1 of 1 files are left out: a.txt looks like an image" in caplog.text
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(REFUSED["safetensors"][0])
    with pytest.raises(InputError, match=r"is a model \(config.json, model.safetensors\), not text"):
        load_text(tmp_path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packing", [None, *PACK])
def test_records_under_any_name(tmp_path: Path, packing: str, encoding: str) -> None:
    documents = [words(20) for _ in range(30)]
    raw = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents).encode(encoding)
    for name in ("a.jsonl", "a.txt", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(PACK[packing](raw) if packing else raw)
        source = open_source(f"jsonl:{tmp_path / name}")
        assert source is not None and [d.decode() for d in source.documents()] == documents


def test_parquet_under_another_name(tmp_path: Path) -> None:
    parquet.write_table(TABLE, tmp_path / "a.txt")
    text = load_text(tmp_path / "a.txt")
    assert (text.name, text.data) == ("parquet:a.txt:text", b"one\0two")
    with pytest.raises(InputError, match=r"a\.txt looks like Parquet; parquet:PATH"):
        load_text(f"jsonl:{tmp_path / 'a.txt'}")


def test_json_lines_as_plain_text_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert load_text(path).data == path.read_bytes() and f"jsonl:{path}[:field]" in caplog.text
    caplog.clear()
    path.write_text('{"a": 1,\n"b": 2}\n')
    assert load_text(path).data == path.read_bytes() and not caplog.text
    path.write_text("[" * 100_000)
    assert len(load_text(path)) == 100_000 and not caplog.text


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            "packed by gzip, and a file that may grow is read as it is: unpack it",
        ),
        ("a.jsonl", lzma.compress(b"{}\n"), "packed by xz, and a file that may grow is read as it is: unpack it"),
        ("a.txt", "text".encode("utf-16"), "UTF-16, not UTF-8 text: convert it"),
        ("a.txt", REFUSED["PDF"][0], "looks like a PDF; pdftotext FILE.pdf FILE.txt makes text of it"),
        ("a.jsonl", REFUSED["Parquet"][0], "looks like Parquet; parquet:PATH[:column] reads it"),
    ],
)
def test_what_arrives_and_is_no_text(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt").write_bytes("\ufeffmarked".encode())
    (tmp_path / "c.jsonl").write_bytes('\ufeff{"text": "too"}\n'.encode())
    arrivals = Arrivals(tmp_path, ByteTokenizer())
    arrival = arrivals.take(10)
    assert arrival is not None and bytes(arrival.ids.astype(np.uint8)) == b"marked\0too\0"
    assert arrivals.skipped == {name: reason} and arrival.spans == [("b.txt", 0, 9), ("c.jsonl", 0, 19)]


def test_questions_for_lm_eval(tmp_path: Path) -> None:
    """Its --data is read by content too."""
    utils = pytest.importorskip("rnn_longctx.eval.harness.lm_eval_tasks.utils")
    row = {"context": "é", "question": "q", "answers": "a"}
    raw = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-16")
    path = tmp_path / "qa.jsonl"
    for data in (raw, gzip.compress(raw)):
        path.write_bytes(data)
        assert utils.questions(str(path))["test"][0] == row | {"answers": ["a"]}
    for data, said in [
        (REFUSED["Parquet"][0], "qa.jsonl looks like Parquet"),
        ("é".encode("latin1") + b"\n", "qa.jsonl, line 1: expected a JSON object with context"),
        (gzip.compress(raw * 500, mtime=0)[:-30], "qa.jsonl cannot be read after line"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=said):
            utils.questions(str(path))
