"""Conversations on one cache, where answers end, prompts side by side, and text as it is made."""

from __future__ import annotations

import itertools

import pytest
import torch
from adopted_families import POLICIES, VOCAB, put
from torch.multiprocessing.reductions import StorageWeakRef

from rnn_longctx import generate, generate_stream, mitigate
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.models import generate as module
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.recurrence import triton
from rnn_longctx.recurrence.policy import PLAIN

NEAR = {"rtol": 0, "atol": 2e-3}  # of logits of ten and more, read in other pieces


@pytest.fixture(params=["own", "mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2", "mamba",
                        "falcon_mamba", "jamba"])  # fmt: skip
def lm(request, make, build):
    """A model of this library or one that it adopted, without a tokenizer; `ends` is told to it by its config."""
    return make(vocab_size=VOCAB) if request.param == "own" else _adopted(build(request.param))


@pytest.fixture
def talker(make):
    """A model of bytes that says printable ones, and nothing that ends an answer unless it is told to."""
    lm = make(vocab_size=256, tie_embeddings=False)
    lm.tokenizer = ByteTokenizer()
    lm.tokenizer.eos_id = None
    with torch.no_grad():
        lm.lm_head.weight[32:127] *= 300
    return lm


def _adopted(model):
    found = adopt(model, time_step_limit_in_decode=True)
    found.tokenizer = None
    return found


def end_with(lm, ids):
    if hasattr(lm, "model"):
        lm.model.generation_config.eos_token_id = ids
    else:
        lm.eos_token_id = ids


@torch.no_grad()
def after(lm, rows):
    """Logits after each of several rows, read alone and in one piece."""
    return torch.cat([lm.logits(lm(torch.as_tensor(row)[None])[:, -1]) for row in rows])


@torch.no_grad()
def goes_on(lm, cache, rows):
    """The cache is as if each row had been read alone: the logits after one token more say so, and the positions."""
    more = torch.randint(32, VOCAB, (len(rows),))
    logits = lm.logits(lm(more[:, None], cache)[:, -1])
    wanted = after(lm, [[*row, token] for row, token in zip(rows, more.tolist())])
    torch.testing.assert_close(logits, wanted, **NEAR)
    assert cache.position.tolist() == [len(row) + 1 for row in rows]


def is_greedy(lm, before, said):
    """Each token is the likeliest after those before it, to within rounding. said: (n,)."""
    with torch.no_grad():
        logits = lm.logits(lm(torch.tensor([[*before, *said]])))[0, len(before) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(-1), **NEAR)


# --- one cache, several turns


@pytest.mark.parametrize("turns", [2, 3, 10])
def test_a_conversation_is_one_prompt(lm, turns):
    cache, whole = lm.new_cache(), [[], []]
    for turn in range(turns):
        prompt = torch.randint(VOCAB, (2, turn % 3 + 1))
        said = generate(lm, prompt, (turn + 1) % 4, cache=cache)
        for row in range(2):
            whole[row] += prompt[row].tolist()
            if said.shape[1]:
                is_greedy(lm, whole[row], said[row].tolist())
            whole[row] += said[row].tolist()
    goes_on(lm, cache, whole)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["own", "mamba2", "bamba", "mamba"])
def test_a_conversation_under_a_policy_in_rows_that_end_apart(kind, policy, make, build):
    lm = make(vocab_size=VOCAB) if kind == "own" else _adopted(build(kind))
    put(lm, POLICIES[policy])
    talk(lm)


def test_rows_that_end_apart(lm):
    talk(lm)


def talk(lm):
    """Two turns of three rows of unequal lengths, drawn at random; every row's state is of what that row said alone."""
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (5, 2, 9)]
    free = generate(lm, prompts, 12, temperature=9.0, seed=3)
    ends, lengths = apart(free)
    end_with(lm, ends)
    cache = lm.new_cache()
    said = generate(lm, prompts, 12, temperature=9.0, seed=3, cache=cache)
    rows = []
    for row, n in enumerate(lengths):
        assert said[row].tolist() == [*free[row, :n].tolist(), *[ends[0]] * (said.shape[1] - n)]
        rows.append([*prompts[row], *free[row, :n].tolist()])
    assert said.shape[1] == max(lengths)
    goes_on(lm, cache.clone(), rows)
    end_with(lm, None)
    again = [torch.randint(VOCAB, (n,)).tolist() for n in (1, 4, 1)]  # unequal once more, after rows at three places
    said = generate(lm, again, 3, cache=cache)
    for row in range(3):
        is_greedy(lm, [*rows[row], *again[row]], said[row].tolist())
    goes_on(lm, cache, [[*a, *b, *c] for a, b, c in zip(rows, again, said.tolist())])


def apart(free):
    """Two ids that end rows at different places, and the rows' lengths then."""
    for ends in itertools.combinations(sorted(set(free.flatten().tolist())), 2):
        at = [[t in ends for t in row].index(True) + 1 if set(ends) & set(row) else len(row) for row in free.tolist()]
        if len(set(at)) == 3:
            return list(ends), at
    raise AssertionError("rows drawn at random do not end at three places")


def test_a_conversation_under_a_control(make):
    """Whose rows begin anew every few tokens, at different times."""
    lm = make(vocab_size=VOCAB)
    for control in ("reset:every=7,overlap=3", "recompute:last=8", "reset:every=5"):
        with mitigate(lm, control):
            end_with(lm, None)
            talk(lm)


def test_a_cache_costs_one_step_and_none_costs_nothing(make, monkeypatch):
    lm, read = make(vocab_size=VOCAB), []
    own = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, *more: read.append(ids.shape[1]) or own(ids, *more))
    generate(lm, [1, 2, 3], 4)
    assert read == [3, 1, 1, 1]
    read.clear()
    generate(lm, [1, 2, 3], 4, cache=lm.new_cache())
    assert read == [3, 1, 1, 1, 1]


def test_a_stream_left_early_leaves_what_was_said(talker):
    said, cache = generate(talker, "ab", 9)[0].tolist(), talker.new_cache()
    for i, _ in enumerate(generate_stream(talker, "ab", 9, cache=cache)):
        if i == 3:
            break
    goes_on(talker, cache, [[*b"ab", *said[:4]]])


@pytest.mark.parametrize("where", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_decoders_state_comes_back(where, make, monkeypatch):
    """A decoder steps in buffers of its own."""
    pytest.importorskip("triton")
    if where == "interpreter":
        if not triton.interpreted():
            pytest.skip("Triton compiles here")
        monkeypatch.setattr(module, "triton", type("Compiled", (), {"interpreted": staticmethod(lambda: False)}))
    lm, made, device = make(vocab_size=VOCAB), [], "cuda" if where == "cuda" else "cpu"
    monkeypatch.setattr(module.Decoder, "__init__", _counted(module.Decoder.__init__, made))
    lm = lm.to(device)
    for policy in ("gates", "cap every 7", "reset") if where == "cuda" else ("cap every 7",):
        put(lm, POLICIES[policy])
        prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (3, 5)]
        how = {"temperature": 9.0, "seed": 1}
        free = generate(lm, prompts, 3, **how).tolist()
        end_with(lm, free[0][1])
        cache, made[:] = lm.new_cache(), []
        said = generate(lm, prompts, 3, cache=cache, **how).tolist()
        assert len(made) == 1
        ends = [row.index(free[0][1]) + 1 if free[0][1] in row else 3 for row in free]
        rows = [[*p, *row[:n]] for p, row, n in zip(prompts, said, ends)]
        with torch.no_grad():
            more = torch.randint(VOCAB, (2, 1))
            logits = lm.logits(lm(more.to(device), cache)[:, -1]).cpu()
            alone = [torch.tensor([[*row, int(token)]], device=device) for row, token in zip(rows, more)]
            wanted = torch.cat([lm.logits(lm(ids)[:, -1]) for ids in alone]).cpu()
        torch.testing.assert_close(logits, wanted, **NEAR)
        assert cache.position.tolist() == [len(row) + 1 for row in rows]
        end_with(lm, None)


def _counted(function, made):
    def call(self, *given):
        made.append(self)
        function(self, *given)

    return call


def test_a_saved_conversation(lm, tmp_path):
    """Rows that stand at different places, in a file."""
    lm.name, cache = "small", lm.new_cache()
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (4, 7)]
    said = generate(lm, prompts, 5, cache=cache).tolist()
    save_state(tmp_path / "s", cache, lm)
    goes_on(lm, load_state(tmp_path / "s", lm), [[*p, *s] for p, s in zip(prompts, said)])


# --- prompts side by side


@pytest.mark.parametrize("policy", ["none", *POLICIES])
def test_prompts_of_unequal_lengths(lm, policy):
    put(lm, PLAIN if policy == "none" else POLICIES[policy])
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (1, 12, 5)]
    said = generate(lm, prompts, 4)
    assert said.shape == (3, 4)
    for prompt, row in zip(prompts, said.tolist()):
        is_greedy(lm, prompt, row)
    ids, mask = module.prompt_rows(lm, [torch.tensor(p) for p in prompts])
    torch.testing.assert_close(prefill(lm, ids, mask=mask, segment=4)[0], after(lm, prompts), **NEAR)


def test_texts_of_unequal_lengths_and_what_reads_prompts_its_own_way(make):
    lm = make(vocab_size=256)
    lm.tokenizer = ByteTokenizer()
    lm.tokenizer.eos_id = None
    texts = ["a", "some words", b"more"]
    for remedy in (
        "none",
        "reset:every=4,overlap=1",
        "chunk-select:chunk=3,query=2",
        "decimate:base=3,first=1,least=2",
    ):
        with mitigate(lm, remedy):
            logits = prefill(lm, *module.prompt_rows(lm, texts)[:1], mask=module.prompt_rows(lm, texts)[1])[0]
            alone = [prefill(lm, module.prompt_ids(lm, text))[0] for text in texts]
            torch.testing.assert_close(logits, torch.cat(alone), **NEAR)
            assert generate(lm, texts, 3).shape == (3, 3)
            if lm.reader is not None:
                with pytest.raises(InputError, match="cannot go on from what was read before"):
                    generate(lm, texts, 3, cache=lm.new_cache())


# --- where answers end


def test_ends(make):
    lm = make(vocab_size=VOCAB)
    free = generate(lm, [1, 2], 20, temperature=9.0, seed=2)[0].tolist()

    def said(**more):
        return generate(lm, [1, 2], 20, temperature=9.0, seed=2, **more)[0].tolist()

    for ends in (free[4], [free[9], free[4]]):
        lm.eos_token_id = ends
        at = min(free.index(end) for end in ([ends] if isinstance(ends, int) else ends))
        assert said() == free[: at + 1]
    lm.eos_token_id, lm.tokenizer = None, ByteTokenizer()
    lm.tokenizer.eos_id = free[3]
    assert said() == free[: free.index(free[3]) + 1]
    lm.eos_token_id = free[1]
    assert said() == free[: min(free.index(free[3]), free.index(free[1])) + 1]


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_ends_as_the_library_does(family, build):
    """What generation_config says goes, one id or several; None: nothing ends it."""
    theirs = build(family)
    lm, ids = adopt(theirs), torch.randint(2, VOCAB, (3, 6))
    lm.tokenizer = None
    free = generate(lm, ids, 12)
    for ends in (int(free[0, 3]), [int(free[1, 5]), int(free[2, 2])], None):
        theirs.generation_config.eos_token_id = ends
        theirs.generation_config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[:, 6:]
        assert torch.equal(generate(lm, ids, 12), expected)


def test_stop_strings(talker):
    lm, how = talker, {"temperature": 20.0, "seed": 5}
    free = bytes(generate(lm, "ab", 40, **how)[0].tolist()).decode()
    assert free.isprintable()
    stop = free[11:14]
    for several in (stop, [stop], ["\n", stop, free[20:28]]):
        strings = [several] if isinstance(several, str) else several
        end = min(free.index(s) + len(s) for s in strings if s in free)
        cache = lm.new_cache()
        said = generate(lm, "ab", 40, stop=several, cache=cache, **how)[0].tolist()
        assert bytes(said).decode() == free[:end] and int(cache.position) == 2 + end
        pieces = list(generate_stream(lm, "ab", 40, stop=several, **how))
        assert "".join(pieces) == free[:end] and pieces[-1].endswith(tuple(strings))  # whole, not in halves
    assert "".join(generate_stream(lm, "ab", 40, stop="\n", **how)) == free
    for wrong in ("", ["a", ""], 3, [3], None):
        with pytest.raises(InputError, match="stop: expected a string or a list of them"):
            generate(lm, "ab", 3, stop=wrong)
    lm.tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer"):
        generate(lm, [1, 2], 3, stop="a")


def test_what_is_said_beyond_an_end_is_dropped(talker, monkeypatch):
    """Where a GPU runs ahead, ends are looked for now and then alone."""
    lm, prompts, how = talker, ["ab", "cde", "f"], {"temperature": 20.0, "seed": 5}
    free = generate(lm, prompts, 40, **how)
    lm.eos_token_id = [int(free[0, 4]), int(free[1, 22])]
    stop, looks = bytes(free[2, 7:9].tolist()).decode(), []
    expected = [generate(lm, prompts, n, stop=s, **how) for n in (40, 7) for s in ((), stop)]
    monkeypatch.setattr(module.Continuation, "runs_ahead", True)
    monkeypatch.setattr(module, "LOOK", 6)
    look = module.Answer._look
    monkeypatch.setattr(module.Answer, "_look", lambda answer: looks.append(len(answer._said)) or look(answer))
    for before, n, s in zip(expected, (40, 40, 7, 7), ((), stop) * 2):
        assert torch.equal(generate(lm, prompts, n, stop=s, **how), before)
    assert looks[0] == 6 and all(n % 6 == 0 or n in (7, 40) for n in looks)
    looks.clear()
    lm.eos_token_id = None
    assert "".join(generate_stream(lm, "ab", 9, **how)) and looks[:3] == [1, 2, 3]
    generate(lm, "ab", 3, cache=lm.new_cache(), **how)
    assert looks[-3:] == [1, 2, 3]


def test_text_comes_without_what_ends_it(talker):
    lm, how = talker, {"temperature": 20.0, "seed": 5}
    free = generate(lm, "ab", 40, **how)[0].tolist()
    lm.tokenizer.eos_id = free[17]
    end = free.index(free[17])
    cache = lm.new_cache()
    assert "".join(generate_stream(lm, "ab", 40, cache=cache, **how)) == bytes(free[:end]).decode()
    assert int(cache.position) == 2 + end + 1  # it was said, all the same
    with pytest.raises(InputError, match="one prompt at a time, got 2"):
        generate_stream(lm, ["a", "b"], 3)


# --- rows of the vocabulary that stand for no token


def test_rows_without_a_token_are_never_said(make):
    lm = make(vocab_size=300, tie_embeddings=False)
    with torch.no_grad():
        lm.lm_head.weight[256:] *= 100
    ids = torch.randint(256, (4, 5))
    assert (generate(lm, ids, 8) >= 256).any()  # without a tokenizer nothing is known of them
    lm.tokenizer = ByteTokenizer()
    lm.tokenizer.eos_id = None
    for temperature in (0.0, 3.0):
        said = generate(lm, ids, 8, temperature=temperature)
        assert said.shape == (4, 8) and (said < 256).all()
    with torch.no_grad():  # the likeliest of the rest, not another
        assert torch.equal(generate(lm, ids, 1)[:, 0], lm.logits(lm(ids)[:, -1])[:, :256].argmax(-1))
    assert generate(lm, [299, 280], 2).shape == (1, 2)  # the model has rows for these: they are read


@pytest.mark.parametrize("remedy", ["none", "lamb:tokens=9,query=5", "chunk-select:chunk=90,query=5"])
def test_of_a_long_prompt_one_segment_is_kept(remedy, make, monkeypatch):
    """Hidden states of every token would take more memory than the model."""
    lm, held, alive = make(vocab_size=VOCAB), [], []
    lm.train_length = 40
    stream = type(lm).stream

    def watched(self, *args, **kwargs):
        for piece in stream(self, *args, **kwargs):
            held.append(StorageWeakRef(piece.untyped_storage()))
            alive.append(sum(not storage.expired() for storage in held))
            yield piece

    monkeypatch.setattr(type(lm), "stream", watched)
    with mitigate(lm, remedy):
        prefill(lm, torch.randint(VOCAB, (1, 100)), segment=10)
    assert len(alive) >= 9 and max(alive) <= 3
