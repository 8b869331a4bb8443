"""What sparse layers read, against the attention that they pay and against gradients; what is counted of it; and the
command line."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models.checkpoint.save import save
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.restart import Crop
from rnn_longctx.models.sparse import SparseAttention
from rnn_longctx.probes.explain import explain_task, explain_text
from rnn_longctx.probes.links import held, links
from rnn_longctx.probes.reach import reach, reached
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.spec import parse
from rnn_longctx.tasks import TASKS, Example

BLOCKS = "block-sparse:heads=2,block=5,window=10,sinks=2,top=2,gate=4"
GROUPS = "two-stage:heads=4,block=4,window=4,top=3"
LENGTH = 70

pytestmark = pytest.mark.filterwarnings("ignore:longnet. more is read")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model_of(mixer: str | list[str], layers: int = 1, vocab_size: int = 256) -> LM:
    lm = LM(ModelConfig(mixer, d_model=16, n_layer=layers, vocab_size=vocab_size)).double().eval()
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    lm.train_length, lm.tokenizer, lm.name = 64, ByteTokenizer(), "tiny"
    return lm


def read_at(table: pd.DataFrame, layer: int, head: int, query: int) -> set[int]:
    rows = table[(table["layer"] == layer) & (table["head"] == head) & (table["query"] == query)]
    tokens = [t for start, stop in zip(rows["start"], rows["stop"]) for t in range(start, stop)]
    assert len(tokens) == len(set(tokens)), "a token is read twice"
    return set(tokens)


def values_read(lm: LM, layer: int, ids: torch.Tensor, query: int) -> list[set[int]]:
    """Which tokens' values each head of a layer reads by themselves for a token: those that its output has gradients
    of, where blocks' summaries have none."""
    mixer, inputs = lm.layers[layer].mixer, []
    hook = mixer.register_forward_pre_hook(lambda module, call: inputs.append(call[0].detach()))
    lm(ids)
    hook.remove()
    call, _ = mixer._call(inputs[0], None, WHOLE)
    call = replace(call, values=call.values.detach().requires_grad_(), summaries=call.summaries.detach())
    y = mixer.read(call, slice(0, LENGTH))[0, query]  # (H, D)
    grads = [torch.autograd.grad(head.sum(), call.values, retain_graph=True)[0][0] for head in y]
    return [set(grad[:, h].abs().sum(1).nonzero()[:, 0].tolist()) for h, grad in enumerate(grads)]


@pytest.mark.parametrize("mixer", [BLOCKS, GROUPS, ["gla:heads=2", GROUPS, BLOCKS]])
def test_links_are_what_attention_reads(mixer):
    """In a hybrid of the sparse layers alone, after the layers below; wherever segments end."""
    lm, ids = model_of(mixer, layers=3), torch.randint(256, (1, LENGTH))
    queries = sorted({0, 3, LENGTH - 1, *random.sample(range(LENGTH), 3)})
    table = links(lm, ids, queries, segment=random.randrange(5, 30))
    layers = [1, 2] if isinstance(mixer, list) else [0, 1, 2]
    assert sorted(table["layer"].unique()) == layers and sorted(table["query"].unique()) == queries
    for layer, query in product(layers, queries):
        expected = values_read(lm, layer, ids, query)
        assert [read_at(table, layer, head, query) for head in range(len(expected))] == expected


def test_kinds_and_scores():
    lm, ids = model_of(BLOCKS), torch.randint(256, (LENGTH,))
    table = links(lm, ids)
    assert list(table["query"].unique()) == [LENGTH - 1] and not lm.layers[0].mixer._forward_pre_hooks
    for _, rows in table.groupby("head"):
        kinds = rows["kind"].tolist()
        assert kinds == ["sink", "sink", "chosen", "chosen", "window"]
        assert rows["start"].tolist()[:2] == [0, 5] and rows["start"].tolist()[-1] == 60
        scores = rows["score"].tolist()
        assert np.isnan(scores).tolist() == [True, True, False, False, True] and scores[2] >= scores[3]
    early = links(lm, ids, [12])  # one sink is outside the window, and no block is there to choose
    assert early["kind"].tolist() == ["sink", "window"] * 2 and early["stop"].tolist() == [5, 13] * 2


@torch.no_grad()
def test_memory_does_not_grow_with_the_length(monkeypatch):
    """Of a segment alone anything is worked out, and layers are asked for a query's one token."""
    lm, read, asked, kept = model_of(BLOCKS), [], [], SparseAttention.kept
    monkeypatch.setattr(
        SparseAttention, "kept", lambda self, u, *more: asked.append(u.shape[1]) or kept(self, u, *more)
    )
    lm.layers[0].mixer.register_forward_pre_hook(lambda module, call: read.append(call[0].shape[1]))
    links(lm, torch.randint(256, (1, 60)), [20, 21, 50], segment=15)
    assert asked == [1, 1, 1] and read == [15, 5, 1, 1, 8, 15, 5, 1]


def brute_force(read: set[int], sources: tuple[int, ...], query: int) -> tuple[bool, float]:
    moves = range(-min(sources), query - max(sources) + 1)
    hits = [any(token + move in read for token in sources) for move in moves]
    return any(token in read for token in sources), float(np.mean(hits))


def test_shares_are_counted():
    """Against every place that the sources could stand at; of one source chance is the share that is read."""
    lm, ids = model_of([BLOCKS, GROUPS], layers=2), torch.randint(256, (1, LENGTH))
    queries = random.sample(range(20, LENGTH), 4)
    table = links(lm, ids, queries)
    sources = {query: tuple(random.sample(range(query), 1 + i % 3)) for i, query in enumerate(queries)}
    found = held(table, sources)
    assert len(found) == 4 * (2 + 4)
    for row in found.itertuples():
        read = read_at(table, row.layer, row.head, row.query)
        expected = brute_force(read, sources[row.query], row.query)
        assert row.held == expected[0] and row.chance == pytest.approx(expected[1])
    row = found[found["query"] == queries[0]].iloc[0]
    read = read_at(table, row["layer"], row["head"], queries[0])
    assert row["chance"] == pytest.approx(len(read) / (queries[0] + 1))


@pytest.mark.parametrize("name", ["passkey", "mqar:pairs=4", "planted"])
def test_a_task_of_many_examples(name):
    lm, tokenizer = model_of(BLOCKS, vocab_size=512), ByteTokenizer()
    task = parse(name, TASKS, "task")
    length, seed = 190, random.randrange(1000)
    found = explain_task(lm, task, length, n=3, seed=seed)
    rows = []
    for i in range(3):
        example = task.example(length, i, 3, task.generator(seed, length, i), tokenizer)
        answers = np.flatnonzero(example.answers)
        table = links(lm, torch.from_numpy(example.ids), answers - 1)
        for place, tokens in zip(answers.tolist(), example.sources):
            for head in range(2 if tokens else 0):
                rows.append((head, *brute_force(read_at(table, 0, head, place - 1), tokens, place - 1)))
    marked = found.links.groupby(["example", "query", "head"])["source"].any()
    assert marked.tolist() == found.held.set_index(["example", "query", "head"])["held"].sort_index().tolist()
    expected = pd.DataFrame(rows, columns=["head", "held", "chance"]).groupby("head")[["held", "chance"]].mean()
    np.testing.assert_allclose(found.shares[["held", "chance"]], expected)
    assert set(found.shares["queries"]) == {len(rows) // 2} and found.reach is None
    assert len(found.drawn) == 1 and found.sources


LONGNETS = [  # of one kind of layer, and of two with another between them
    ["longnet:heads=2,segments=4/12/48,dilations=1/2/6"],
    ["longnet:heads=4,segments=6/30,dilations=3/5,positions=none"],
    ["longnet:heads=1,segments=8/32,dilations=2/8", "gla:heads=2", "longnet:heads=2,segments=12,dilations=3"],
]


@pytest.mark.parametrize("mixer", LONGNETS, ids=str)
def test_reach_is_where_gradients_come_from(mixer):
    lm = model_of(mixer, layers=3).requires_grad_(False)
    for query in (0, 47, 48, *random.sample(range(LENGTH), 2)):
        embedded, outputs = [], {}

        def embed(module, call, out, embedded=embedded):
            embedded.append(out.requires_grad_())
            return out

        hooks = [lm.backbone.embedding.register_forward_hook(embed)]
        for i, block in enumerate(lm.layers):
            # what a layer's norm is added to, and what its mixer adds to that
            def keep(module, call, out, i=i, outputs=outputs):
                outputs[i] = out[0]

            hooks.append(block.mixer.register_forward_hook(keep))
        lm(torch.randint(256, (1, LENGTH)))
        for hook in hooks:
            hook.remove()
        found = dict(reached(lm, query))
        assert list(found) == [i for i in range(3) if mixer[i % len(mixer)].startswith("longnet")]
        for layer, tokens in found.items():
            residual = embedded[0] + sum(outputs[i] for i in range(layer + 1))  # (there are no MLPs)
            (grad,) = torch.autograd.grad(residual[0, query].sum(), embedded[0], retain_graph=True)
            expected = grad[0].abs().sum(1) != 0
            assert not expected[query + 1 :].any() and torch.equal(expected[: query + 1], tokens)


def test_the_table_of_reach():
    """Its farthest token is the first that is reached; what stands beyond it is not within."""
    lm, queries = model_of(LONGNETS[0], layers=3), [5, 47, 48, 69]
    table = reach(lm, queries, {5: (0,), 47: (0, 46), 48: (47,), 69: (47,)})
    traced = {query: dict(reached(lm, query)) for query in queries}
    assert table["reach"].tolist() == [q - int(traced[q][i].byte().argmax()) for i in range(3) for q in queries]
    last = table[table["layer"] == 2].set_index("query")
    assert last["within"].tolist() == [True, True, False, False] and last["reach"].tolist() == [5, 47, 0, 21]
    assert last["tokens"].tolist() == [int(traced[query][2].sum()) for query in queries]
    text = explain_text(lm, np.arange(LENGTH), [69])
    assert "within" not in text.reaches and text.links is None and text.reaches["reach"].iloc[-1] == 21


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("links")
    for name, mixer in (("both", ["gla:heads=2", BLOCKS, LONGNETS[0][0]]), ("neither", "gla:heads=2")):
        save(model_of(mixer, layers=3).float(), root / name, dtype=torch.float32)
    (root / "t.txt").write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 4000).tolist()))
    return root


def test_command_line(store, monkeypatch):
    monkeypatch.chdir(store)
    common = ["--device", "cpu", "--length", "200"]
    text = ["--text", "t.txt", "--at", "20", "--at", "199", "--out", "text"]
    one = CliRunner().invoke(cli.app, ["explain", "both", *text, *common])
    assert one.exit_code == 0, one.output
    assert "what each head reads" in one.output and "190-199" in one.output and "reach, in tokens" in one.output
    names = {"links.csv", "reach.csv", *(f"{kind}-{query}.png" for kind in ("links", "reach") for query in (20, 199))}
    assert {path.name for path in (store / "text").iterdir()} == names
    assert set(pd.read_csv(store / "text" / "links.csv")["query"]) == {20, 199}
    two = CliRunner().invoke(cli.app, ["explain", "both", "--task", "passkey", "--n", "2", "--out", "task", *common])
    assert two.exit_code == 0, two.output
    assert "hold the source" in two.output and "within" in two.output
    shares = pd.read_csv(store / "task" / "shares.csv")
    assert shares["layer"].tolist() == [1, 1] and shares["queries"].tolist() == [10, 10]
    for name in ("links-200.png", "reach-200.png", "held.png"):
        picture = np.asarray(Image.open(store / "task" / name).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
        assert name == "held.png" or (picture == (0xCC, 0x33, 0x11)).all(2).any(), "the source is marked"


@pytest.mark.parametrize(("model", "more", "message"), [
    ("neither", ["--task", "passkey"], "neither has no layer whose links could be shown"),
    ("neither", ["--text", "t.txt"], "neither has no layer whose links could be shown"),
    ("both", ["--task", "passkeys"], "unknown task 'passkeys'"),
    ("both", ["--task", "passkey", "--at", "4"], "leave out --at or --task"),
    ("both", ["--text", "t.txt", "--at", "200"], "positions from 0 to 199, got [200]"),
    ("both", ["--task", "passkey", "--length", "20"], "takes at least"),
    ("both", ["--task", "mqar"], "512 ids, more than the vocabulary of both, 256"),
])  # fmt: skip
def test_bad_input_is_one_line(store, monkeypatch, model, more, message, capsys):
    monkeypatch.chdir(store)
    words = ["explain", model, "--length", "200", "--device", "cpu", *more]
    monkeypatch.setattr("sys.argv", ["rnn-longctx", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in said and "\n" not in said


def test_what_cannot_be_explained():
    lm, ids = model_of(BLOCKS), torch.randint(256, (1, LENGTH))
    with pytest.raises(InputError, match=r"one row of ids \(1, T\)"):
        links(lm, ids.expand(2, -1))
    with pytest.raises(InputError, match="no layer of LongNet"):
        list(reached(lm, 5))
    with pytest.raises(InputError, match="no layer that chooses what it reads"):
        links(model_of("gla:heads=2"), ids)
    task = TASKS["passkey"]()
    with pytest.raises(InputError, match="at least 1 example, got n = 0"):
        explain_task(lm, task, 190, n=0)
    lm.restart = Crop(8, 8)
    with pytest.raises(InputError, match="take the control or reader off"):
        links(lm, ids)
    lm.restart = None

    class Silent(type(task)):
        def example(self, *words):
            return Example(np.arange(9), np.arange(9) > 7)

    with pytest.raises(InputError, match="does not say which tokens its answers come from"):
        explain_task(lm, Silent(), 190)
