"""A store against its definition: the tokens of the documents, each with its end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from rnn_longctx.data import ByteTokenizer, HFTokenizer, Shard, Source, Tokenizer, stored
from rnn_longctx.errors import InputError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rnn-longctx" / "tokens"


def tokenizer(eos: bool = True) -> HFTokenizer:
    """Four characters a token where it knows them."""
    vocab = {"<end>": 0, "?": 1} | {w: 300 + i for i, w in enumerate(["abcd", "aaaa", "a", "b", "c", "d", " "])}
    fast = Fast(models.WordLevel(vocab, unk_token="?"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return HFTokenizer(fast, "toy", 0 if eos else None)


def documents(n: int) -> list[bytes]:
    rng = np.random.default_rng()
    return [b" ".join(rng.choice([b"a", b"b", b"abcd", b"zz", b"aaaa"], rng.integers(1, 60))) for _ in range(n)]


class Shards:
    """Shards of documents, which count how often each is read, and one of which may fail."""

    def __init__(self, *parts: list[bytes]):
        self.parts, self.read, self.versions = list(parts), Counter[int](), [0] * len(parts)
        self.bad: tuple[int, BaseException] | None = None

    def source(self, where: str = "here") -> Source:
        def read(i: int) -> Iterator[bytes]:
            self.read[i] += 1
            for k, document in enumerate(self.parts[i]):
                if self.bad and self.bad[0] == i and k == len(self.parts[i]) // 2:
                    raise self.bad[1]
                yield document

        shards = [Shard(f"{i}.{v}", lambda i=i: read(i)) for i, v in enumerate(self.versions)]  # type: ignore[misc]
        return Source("text", where, shards)


def expected(shards: Shards, by: Tokenizer, least: int = 0) -> np.ndarray:
    end = [] if by.eos_id is None else [by.eos_id]
    kept = [ids for part in shards.parts for d in part if len(ids := by.encode(d).tolist()) >= least]
    return np.array([i for ids in kept for i in [*ids, *end]])


@pytest.mark.parametrize("least", [0, 25])
@pytest.mark.parametrize("by", [ByteTokenizer(), tokenizer(), tokenizer(eos=False)], ids=["bytes", "hf", "no-eos"])
def test_tokens_of_the_documents(by: Tokenizer, least: int) -> None:
    shards = Shards(documents(30), [], documents(1), documents(17))
    found = stored(shards.source(), by, least)
    assert found.tokens.dtype == (np.uint8 if by.name == "bytes" else np.int32)
    assert np.array_equal(found.tokens, expected(shards, by, least))
    kept = [d for part in shards.parts for d in part if len(by.encode(d)) >= least]
    assert (found.documents, found.bytes) == (len(kept), sum(map(len, kept)))
    assert least == 0 or 0 < len(kept) < 48
    again = stored(shards.source(), by, least)
    assert np.array_equal(again.tokens, found.tokens) and again.hash == found.hash
    assert set(shards.read.values()) == {1}, "read once"


def test_what_a_store_is_of() -> None:
    """Another tokenizer, length or place is another store; other contents have another hash."""
    shards = Shards(documents(20), documents(20))
    one = stored(shards.source(), ByteTokenizer())
    for source, by, least in [
        (shards.source(), tokenizer(), 0),
        (shards.source(), ByteTokenizer(), 30),
        (shards.source("there"), ByteTokenizer(), 0),
    ]:
        assert np.array_equal(stored(source, by, least).tokens, expected(shards, by, least))
    assert stored(shards.source("there"), ByteTokenizer()).hash == one.hash
    before = one.tokens.copy()
    shards.parts[1][7] += b" more"
    shards.versions[1] = 1
    two = stored(shards.source(), ByteTokenizer())
    assert np.array_equal(two.tokens, expected(shards, ByteTokenizer())) and two.hash != one.hash
    assert np.array_equal(one.tokens, before), "a run that maps the old one keeps it"


def test_the_beginning() -> None:
    shards = Shards(documents(30), documents(30), documents(30))
    whole = expected(shards, tokenizer())
    for most in random.sample(range(1, len(whole)), 10):
        ends = np.flatnonzero(whole == 0) + 1
        found = stored(shards.source(), tokenizer(), most=most).tokens
        assert np.array_equal(found, whole[: ends[ends >= most][0]]), "up to the document that reaches it"
    shards.read.clear()
    stored(shards.source("there"), tokenizer(), most=5)
    assert shards.read == {0: 1}, "no shard is read that is not needed"


@pytest.mark.parametrize("stop", [InputError("2.jsonl:7: not JSON"), KeyboardInterrupt()])
def test_a_build_that_was_stopped_goes_on_at_its_shard(stop: BaseException) -> None:
    shards = Shards(*(documents(20) for _ in range(5)))
    shards.bad = (2, stop)
    for _ in range(2):
        with pytest.raises(type(stop), match="2.jsonl:7" if isinstance(stop, InputError) else None):
            stored(shards.source(), ByteTokenizer())
    assert shards.read == {0: 1, 1: 1, 2: 2}
    shards.bad = None
    shards.versions[2] = 1  # mended
    shards.parts[2][3] = b"mended"
    assert np.array_equal(stored(shards.source(), ByteTokenizer()).tokens, expected(shards, ByteTokenizer()))
    assert shards.read == {0: 1, 1: 1, 2: 3, 3: 1, 4: 1}


def test_a_shard_that_changed_before_the_build_went_on() -> None:
    shards = Shards(*(documents(20) for _ in range(4)))
    shards.bad = (3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        stored(shards.source(), ByteTokenizer())
    shards.bad, shards.versions[1], shards.parts[1] = None, 1, documents(11)
    assert np.array_equal(stored(shards.source(), ByteTokenizer()).tokens, expected(shards, ByteTokenizer()))


def test_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from rnn_longctx.data import Shard, Source, ByteTokenizer, stored\n"
        "def read(i):\n"
        "    for k in range(40):\n"
        "        time.sleep(60 if (i, k, sys.argv[1]) == (19, 39, 'killed') else 0.0005)\n"
        "        yield b'%d %d ' % (i, k) * 50\n"
        "shards = [Shard(str(i), lambda i=i: read(i)) for i in range(20)]\n"
        "print(flush=True)\n"
        "print(stored(Source('t', 't', shards), ByteTokenizer()).hash, flush=True)\n"
    )

    def run(kill: bool) -> str:
        name = "killed" if kill else "whole"
        process = subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        if kill:  # long before the last document comes
            time.sleep(random.uniform(0.05, 0.3))
            process.send_signal(signal.SIGKILL)
        return process.communicate()[0].strip()

    killed = [run(True) for _ in range(2)]
    assert killed == ["", ""]
    found = run(False)
    shards = Shards(*([b"%d %d " % (i, k) * 50 for k in range(40)] for i in range(20)))
    assert found == stored(shards.source(), ByteTokenizer()).hash


def test_of_several_at_once_one_writes() -> None:
    shards = Shards(*(documents(200) for _ in range(4)))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: stored(shards.source(), tokenizer()), range(6)))
    assert all(np.array_equal(f.tokens, expected(shards, tokenizer())) for f in found)
    assert set(shards.read.values()) == {1}


def test_nothing_to_store() -> None:
    with pytest.raises(InputError, match="text text is empty"):
        stored(Shards([], []).source(), ByteTokenizer())
    with pytest.raises(InputError, match="text text is empty of documents of 99 tokens or more"):
        stored(Shards([b"short"]).source(), ByteTokenizer(), 99)


def test_no_place_to_write(root: Path) -> None:
    root.parent.mkdir(parents=True)
    root.write_text("a file")
    with pytest.raises(InputError, match="cannot keep the tokens of text in"):
        stored(Shards(documents(3)).source(), ByteTokenizer())


def test_memory_does_not_grow_with_the_text() -> None:
    import tracemalloc

    def peak(n: int) -> int:
        def read() -> Iterator[bytes]:
            return (os.urandom(5000).replace(b"\0", b"a") for _ in range(n))

        tracemalloc.start()
        stored(Source("t", str(n), [Shard(str(i), read) for i in range(2)]), ByteTokenizer())
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(4000) < 1.1 * peak(800)
