from __future__ import annotations

import hashlib
import sys
import sysconfig
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from rnn_longctx.data import ByteTokenizer, HFTokenizer, Text, load_text, tokens
from rnn_longctx.data import text as module
from rnn_longctx.errors import InputError


def random_text(n: int) -> str:
    rng = np.random.default_rng()
    return "".join(rng.choice(list("abcd efg\né漢🙂"), n))


class Characters(HFTokenizer):
    """A stand-in whose tokens are characters: no tokenizer file needed."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.eos_id = "characters", 1 << 21, None

    def encode_with_bytes(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        characters = data.decode("utf-8")  # fails when a block is cut inside a character
        sizes = [len(c.encode()) for c in characters]
        return np.array([ord(c) for c in characters], dtype=np.int64), np.array(sizes, dtype=np.int64)


def test_hash_and_documents() -> None:
    documents = [b"one", b"", b"three"]
    text = Text("t", b"\0".join(documents))
    assert text.hash == hashlib.sha256(text.data).hexdigest()[:16]
    assert list(text.documents()) == documents and len(text) == 10


def test_slices_are_circular_and_start_at_characters() -> None:
    text = Text("t", random_text(5000).encode())
    ring = (text.data + b"\0") * 2
    for i in np.random.default_rng().integers(0, 10_000, 50).tolist():
        whole = text.slice(i, len(text))
        start = text.start(i)
        assert whole == ring[start : start + len(text)]
        assert whole[0] & 0xC0 != 0x80, "a slice starts at a character"
        share = (0.5 + i * 0.6180339887498949) % 1
        assert int(len(text) * share) <= start <= int(len(text) * share) + 3
        assert text.slice(i, 100) == whole[:100]
    assert text.start(0) in range(len(text) // 2, len(text) // 2 + 4)


def test_how_many_slices_lie_apart() -> None:
    rng, text = np.random.default_rng(), Text("t", b"x" * 10_007)
    assert text.distinct(len(text), 9) == 1 and text.distinct(1, 9) == 9
    for size in rng.integers(5, 3000, 40).tolist():
        n = text.distinct(size, 500)
        starts = sorted(text.start(i) for i in range(n))
        assert n == 1 or np.diff([*starts, starts[0] + len(text)]).min() >= size
        starts = sorted(text.start(i) for i in range(n + 1))
        assert n == 500 or np.diff([*starts, starts[0] + len(text)]).min() < size + 6, "one more would have fitted"


def test_slice_starts_are_spread() -> None:
    text = Text("t", b"x" * 100_000)
    starts = sorted(text.start(i) for i in range(20))
    gaps = np.diff([*starts, starts[0] + len(text)])
    assert gaps.min() > 0.4 * len(text) / 20


def test_a_slice_longer_than_the_text() -> None:
    with pytest.raises(InputError, match="text t has 10 bytes; a slice of 11"):
        Text("t", b"x" * 10).slice(0, 11)
    with pytest.raises(InputError, match="text t has 10 bytes"):
        tokens(Text("t", b"x" * 10), ByteTokenizer(), 0, 11)


def test_tokens_of_bytes() -> None:
    text = Text("t", random_text(1000).encode())
    ids, nbytes = tokens(text, ByteTokenizer(), 3, 700)
    assert bytes(ids.tolist()) == text.slice(3, 700) and (nbytes == 1).all() and len(nbytes) == 700


@pytest.mark.parametrize("newlines", [True, False])
def test_tokens_in_blocks_do_not_depend_on_how_many(newlines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    raw = random_text(3000)
    text = Text("t", (raw if newlines else raw.replace("\n", "x")).encode())
    tokenizer = Characters()
    for i in range(8):
        with pytest.raises(InputError, match="text t has") as error:
            tokens(text, tokenizer, i, 10_000)
        most = int(str(error.value).split()[3])
        all_ids, all_bytes = tokens(text, tokenizer, i, most)
        ring = text.slice(i, len(text))
        read = "".join(map(chr, all_ids.tolist())).encode()
        assert ring.startswith(read) and len(ring) - len(read) <= 3
        for n in (1, 99, 101, most - 1):
            ids, nbytes = tokens(text, tokenizer, i, n)
            assert (ids == all_ids[:n]).all() and (nbytes == all_bytes[:n]).all() and len(nbytes) == n


def test_file_and_directory(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "b" / ".hidden").mkdir(parents=True)
    (folder / "z.txt").write_bytes(b"last")
    (folder / "b" / "a.md").write_bytes("first é".encode())
    (folder / "b" / "binary").write_bytes(b"x\0y")
    (folder / "b" / "empty").write_bytes(b"")
    (folder / ".secret").write_bytes(b"no")
    (folder / "b" / ".hidden" / "x").write_bytes(b"no")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    text = load_text(folder)
    assert (text.name, text.data) == ("dir:books", "first é\0last".encode())
    raw = "é raw\0bytes".encode()
    (tmp_path / "f.bin").write_bytes(raw)
    for spec in (tmp_path / "f.bin", f"file:{tmp_path / 'f.bin'}"):
        text = load_text(spec)
        assert (text.name, text.data) == ("file:f.bin", raw)


def test_missing_and_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for spec, word in [(tmp_path / "no.txt", "no text at"), (tmp_path / "empty.txt", "is empty"), ("stdlbi", "stdlib")]:
        with pytest.raises(InputError, match=word):
            load_text(spec)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="dir:folder is empty"):
        load_text(tmp_path / "folder")


def test_stdlib_without_tests() -> None:
    text = load_text("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = set(text.documents())
    assert text.name == "stdlib" and len(text) > 5_000_000
    assert (root / "argparse.py").read_bytes() in documents
    assert (root / "json" / "decoder.py").read_bytes() in documents
    assert text.data == b"\0".join(text.documents()) and b"\0\0" not in text.data
    for name in ("test/test_argparse.py", "idlelib/idle_test/test_config.py", "unittest/test/test_case.py"):
        if (root / name).is_file():
            assert (root / name).read_bytes() not in documents
    for found in root.glob("_sysconfigdata*.py"):
        assert found.read_bytes() not in documents


def test_site_packages_are_decontaminated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of stdlib code, duplicates, small, large and binary files and this package are left out."""
    known = [f"def a_standard_library_line_{i}(self): pass" for i in range(100)]
    other = [f"def something_entirely_else_{i}(x): return x" for i in range(100)]
    lib, site = tmp_path / "lib", tmp_path / "site"

    def put(name: str, data: bytes | list[str]) -> bytes:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = data if isinstance(data, bytes) else "\n".join(data).encode()
        path.write_bytes(raw)
        return raw

    lib.mkdir()
    (lib / "std.py").write_text("\n".join(known))
    own = put("b/own.py", other)
    put("c/duplicate.py", other)
    put("b/vendored.py", ["    " + line for line in known])
    put("b/mixed_21.py", known[:21] + other[:79])
    mixed = put("a/mixed_19.py", known[:19] + other[:81])
    put("b/small.py", b"x = 1\n")
    put("b/large.py", b"# y\n" * 300_000)
    put("b/binary.py", b"\xff" * 300)
    put("b/text.txt", [*other, "x"])
    put("rnn_longctx/mine.py", [*other, "y"])
    put("__editable___rnn_longctx_finder.py", [*other, "z"])
    put("b/__pycache__/c.py", [*other, "w"])
    paths = {"stdlib": str(lib), "purelib": str(site), "platlib": str(site)}
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [str(site)])
    text = load_text("site-packages")
    assert text.name == "site-packages" and list(text.documents()) == [mixed, own]


def test_hf_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Rows(list):
        column_names: ClassVar = ["text", "body"]
        num_shards = 2

        def shard(self, n: int, i: int) -> Rows:
            return Rows(self[i::n])

    def load_dataset(name: str, *config: str, split: str, streaming: bool) -> Rows:
        assert config == (("en",) if name == "owner/many" else ())
        if name == "gone":
            raise ConnectionError("offline\nreally")
        assert streaming
        return Rows({"text": text, "body": "b"} for text in (f"{split} one", "two\0", "", None))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    text = load_text("hf:owner/set")
    assert (text.name, text.data) == ("hf:owner/set:train:text", b"train one\0two")
    assert load_text("hf:owner/set:validation:body").name == "hf:owner/set:validation:body"
    assert load_text(f"hf:{tmp_path}").name == f"hf:{tmp_path.name}:train:text", "never a path"
    assert load_text("hf:owner/many/en").name == "hf:owner/many/en:train:text"
    with pytest.raises(InputError, match="no column 'x'"):
        load_text("hf:owner/set::x")
    with pytest.raises(InputError, match="cannot load text hf:gone: offline really"):
        load_text("hf:gone")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the datasets package"):
        load_text("hf:owner/set")
