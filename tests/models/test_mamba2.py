"""A context is a stream: how it is cut, padded, packed, stored or shared changes no result. In float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rnn_longctx.errors import InputError
from rnn_longctx.models import losses
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM, Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

VOCAB, HEADS, HEADDIM, D_STATE = 61, 6, 8, 8  # of the models that `make` makes
TOLERANCE = {"rtol": 0, "atol": 1e-10}
POLICIES = ["plain", "gates", "cap 16", "cap 1", "window 13", "window 70", "start", "all", "window, rest"]
RESTARTS = [Restart(17, 5), Restart(16, 16), Restart(9)]
STREAMS = [(p, None) for p in POLICIES if p not in ("gates", "start", "plain")] + [
    ("plain", RESTARTS[0]),
    ("all", RESTARTS[1]),
    ("window 13", RESTARTS[0]),
]


def per_head(low: float, high: float) -> tuple[float, ...]:
    return tuple(torch.empty(HEADS).uniform_(low, high).tolist())


def policy(name: str) -> ScanPolicy:
    """A fresh one for every layer."""
    gates = ScanPolicy(mul=per_head(0.5, 1.5), add=per_head(-0.1, 0), gain=per_head(0.5, 1), min_dt=per_head(0, 0.2))
    start = ScanPolicy(start=torch.randn(HEADS, HEADDIM, D_STATE))
    return {
        "plain": PLAIN,
        "gates": gates,
        "cap 16": ScanPolicy(caps=(Cap(per_head(0.1, 0.5), 16),)),
        "cap 1": ScanPolicy(caps=(Cap(per_head(0.1, 0.5)),)),
        "window 13": ScanPolicy(window=13),
        "window 70": ScanPolicy(window=70),
        "start": start,
        "all": replace(gates, reset=37, start=start.start, caps=(Cap(0.9, 33), Cap(per_head(0.1, 0.5), 40))),
        "window, rest": replace(gates, reset=31, window=13),
    }[name]


@pytest.fixture
def build(make):
    def build(name: str, restart: Restart | None = None) -> Mamba2LM:
        model = make(torch.float64)
        for mixer in model.mixers:
            mixer.policy = policy(name)
        model.restart = restart
        return model

    return build


@pytest.fixture(params=POLICIES)
def model(request, build):
    return build(request.param)


@pytest.fixture(params=STREAMS, ids=lambda p: f"{p[0]}, {p[1]}" if p[1] else p[0])
def stream(request, build):
    return build(*request.param)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape)


def cut(length: int, pieces: int = 6) -> list[int]:
    """Lengths of segments of a random split; some are empty, some one token."""
    marks = sorted(random.choices(range(length + 1), k=pieces - 1))
    return [b - a for a, b in zip([0, *marks], [*marks, length])]


@torch.no_grad()
def read(model: Mamba2LM, ids: torch.Tensor, sizes: list[int] | None = None, cache: Cache | None = None, **marks):
    """Hidden states of ids, read in segments of the given sizes."""
    cache = cache if cache is not None else Cache()
    sizes = sizes or [ids.shape[1]]
    parts = zip(ids.split(sizes, 1), *(m.split(sizes, 1) for m in marks.values()))
    return torch.cat([model(part, cache, **dict(zip(marks, rest))) for part, *rest in parts], 1)


@pytest.fixture(autouse=True)
def _python_random(seed):
    random.seed(seed)


def test_one_pass_is_the_definition(model):
    ids = tokens(1, 75)
    expected = read(model, ids)
    model.use_backend("reference")
    torch.testing.assert_close(expected, read(model, ids), **TOLERANCE)
    if model.mixers[0].policy != PLAIN:  # and the policy does something
        for mixer in model.mixers:
            mixer.policy, mixer.backend = PLAIN, None
        assert (read(model, ids) - expected).abs().max() > 1e-3


def test_any_split_is_one_pass(stream):
    ids = tokens(2, 110)
    cache = Cache()
    expected = read(stream, ids, cache=cache)
    for sizes in (cut(110, 12), [1, 109]):
        again = Cache()
        torch.testing.assert_close(read(stream, ids, sizes, again), expected, **TOLERANCE, msg=str(sizes))
        assert torch.equal(again.position, cache.position)
        for a, b in zip(again.layers, cache.layers):
            torch.testing.assert_close(a.scan.state, b.scan.state, **TOLERANCE)
            torch.testing.assert_close(a.scan.log_decay, b.scan.log_decay, **TOLERANCE)
            torch.testing.assert_close(a.conv, b.conv, **TOLERANCE)
            assert torch.equal(a.scan.position, b.scan.position)


def test_steps_are_prefill(stream):
    ids = tokens(3, 45)
    n = random.randrange(20, 30)
    expected = read(stream, ids)
    torch.testing.assert_close(read(stream, ids, [n, *[1] * (45 - n)]), expected, **TOLERANCE)
    torch.testing.assert_close(read(stream, ids[:, :14], [1] * 14), expected[:, :14], **TOLERANCE)


def test_a_cache_is_cloned_saved_and_loaded(stream, tmp_path):
    ids = tokens(2, 60)
    expected = read(stream, ids)
    for at in (0, 26, random.randrange(1, 60)):
        cache = Cache()
        read(stream, ids[:, :at], cache=cache)
        clone = cache.clone()
        cache.save(tmp_path / "cache.safetensors", {"ids": ids}, {"at": at})
        loaded, extra, note = Cache.load_with(tmp_path / "cache.safetensors")
        assert torch.equal(extra["ids"], ids) and note == {"at": at}
        for other in (cache, clone, loaded):
            rest = read(stream, ids[:, at:], cut(60 - at, 3), other)
            torch.testing.assert_close(rest, expected[:, at:], **TOLERANCE)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_cache_file_that_is_none(tmp_path):
    (tmp_path / "cache").write_bytes(b"junk")
    damaged = "cache is not a state that generate --save-state wrote, or it is damaged"
    for name, message in (
        ("cache", damaged),
        ("nothing", "nothing: no such file"),
        (".", ": a folder, not a saved state"),
    ):
        with pytest.raises(InputError, match=f"{message}$"):
            Cache.load(tmp_path / name)


def test_two_streams_on_one_model(stream):
    a, b = tokens(2, 70), tokens(3, 70)
    cache_a, cache_b, out_a, out_b = Cache(), Cache(), [], []
    for part_a, part_b in zip(a.split(cut(70), 1), b.split(cut(70), 1)):
        out_a.append(read(stream, part_a, cache=cache_a))
        out_b.append(read(stream, part_b, cache=cache_b))
    torch.testing.assert_close(torch.cat(out_a, 1), read(stream, a), **TOLERANCE)
    torch.testing.assert_close(torch.cat(out_b, 1), read(stream, b), **TOLERANCE)


def test_rows_reorder_and_copy(stream):
    """Beam search: rows of a cache taken in any order, with repeats, and put together again."""
    ids, order = tokens(3, 50), [2, 0, 0, 1]
    cache = Cache()
    read(stream, ids[:, :31], cache=cache)
    expected = read(stream, ids)[:, 31:]
    picked = cache.rows(order)
    torch.testing.assert_close(read(stream, ids[order, 31:], cut(19), picked), expected[order], **TOLERANCE)
    whole = Cache.concat([cache.rows([1]), cache.rows([2, 0])], [1, 2, 0])
    torch.testing.assert_close(read(stream, ids[:, 31:], cache=whole), expected, **TOLERANCE)


@pytest.mark.parametrize("cuts", ["one pass", "a row is all padding at first"])
def test_left_padded_rows_are_rows_alone(cuts, stream):
    length, pads = 70, [0, random.randrange(1, 15), random.randrange(15, 50), 0, 31]
    ids, more = tokens(len(pads), length), tokens(len(pads), 7)
    mask = torch.arange(length) >= torch.tensor(pads)[:, None]
    sizes = {"one pass": [length], "a row is all padding at first": [15, 25, 1, *cut(29, 3)]}[cuts]
    cache = Cache()
    try:
        hidden = read(stream, ids, sizes, cache, mask=mask)
    except InputError:  # these rows' windows stand at different places: refused, as long as it says so
        assert stream.restart and stream.mixers[0].policy.window
        return
    assert cache.position.tolist() == [length - pad for pad in pads]
    after = read(stream, more, [3, 0, 1, 3], cache)
    for i, pad in enumerate(pads):
        alone = read(stream, torch.cat([ids[i : i + 1, pad:], more[i : i + 1]], 1))
        torch.testing.assert_close(hidden[i : i + 1, pad:], alone[:, :-7], **TOLERANCE, msg=f"row {i}")
        torch.testing.assert_close(after[i : i + 1], alone[:, -7:], **TOLERANCE, msg=f"row {i}, after")


def test_packed_documents_are_documents_alone(model):
    rows = [[33, 1, 1, 45, 20], [7, 60, 12, 21]]
    ids = tokens(2, 100)
    reset = torch.zeros(2, 100, dtype=torch.bool)
    for i, lengths in enumerate(rows):
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        reset[i, starts] = True
        if random.random() < 0.5:
            reset[i, 0] = False  # a row begins anyway
    for sizes in ([100], [33, 1, 1, *cut(65, 3)]):
        cache = Cache()
        hidden = read(model, ids, sizes, cache, reset=reset)
        for i, lengths in enumerate(rows):
            for part, out in zip(ids[i].split(lengths), hidden[i].split(lengths)):
                torch.testing.assert_close(out[None], read(model, part[None]), **TOLERANCE, msg=str(sizes))
        last = Cache()
        read(model, ids[:1, -20:], cache=last)
        for a, b in zip(cache.layers, last.layers):
            torch.testing.assert_close(a.scan.log_decay[:1], b.scan.log_decay, **TOLERANCE)
            assert int(a.scan.position[0]) == 20


@pytest.mark.parametrize("restart", RESTARTS, ids=str)
@pytest.mark.parametrize("name", ["plain", "all", "window 13"])
def test_a_restart_is_what_it_says(name, restart, build):
    ids, model = tokens(2, 75), build(name)
    expected = []
    for start in range(0, 75, restart.every):
        again = min(restart.overlap, start)
        expected.append(read(model, ids[:, start - again : start + restart.every])[:, again:])
    model.restart = restart
    hidden = read(model, ids)
    torch.testing.assert_close(hidden, torch.cat(expected, 1), **TOLERANCE)

    # who wants the end alone may begin at its block, with the overlap at hand
    for length in (75, restart.every * 3, restart.every * 3 + 1):
        at = restart.block_start(length)
        cache = Cache(position=torch.full((2,), at), tail=ids[:, max(0, at - restart.overlap) : at])
        end = read(model, ids[:, at:length], cut(length - at, 3), cache)
        torch.testing.assert_close(end, hidden[:, at:length], **TOLERANCE)
        assert cache.position.tolist() == [length] * 2


def test_losses_and_stream(make, monkeypatch):
    model = make(torch.float64)
    ids, targets = tokens(3, 40), tokens(3, 40)
    with torch.no_grad():
        hidden = model(ids)
        expected = F.cross_entropy(model.logits(hidden).mT, targets, reduction="none")
        assert expected.shape == (3, 40)
        torch.testing.assert_close(model.losses(hidden, targets), expected, **TOLERANCE)
        monkeypatch.setattr(losses, "LOGITS", 7 * VOCAB)
        torch.testing.assert_close(model.losses(hidden, targets), expected, **TOLERANCE)
        torch.testing.assert_close(torch.cat(list(model.stream(ids, segment=17)), 1), hidden, **TOLERANCE)


def test_gradients_flow_through_segments(model):
    """Truncated back-propagation cuts where it wants to: by itself a stream is not cut."""

    def gradients(sizes: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        cache = Cache()
        sum(model(part, cache).square().sum() for part in ids.split(sizes, 1)).backward()
        return [p.grad.clone() for n, p in model.named_parameters() if n != "lm_head.weight"]

    ids = tokens(2, 40)
    for a, b in zip(gradients([40]), gradients([1, 19, 20])):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_state_sizes(make):
    model, cache = make(d_conv=3), Cache()
    read(model, tokens(1, 5), cache=cache)
    assert sum(c.scan.state.numel() for c in cache.layers) == model.config.scan_state_elements
    assert sum(c.conv.numel() for c in cache.layers) == model.config.conv_state_elements


def test_initial_gates():
    config = Mamba2Config(d_model=256, n_layer=2, A_init=(1e-3, 1.0), A_log_uniform=True, dt_init=(1e-3, 1e-1))
    model = Mamba2LM(config)
    for mixer in model.mixers:
        dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
        assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1 and A.min() > 0.99e-3 and A.max() < 1.01


def test_what_is_refused(make):
    model = make(torch.float64)
    cache = Cache()
    read(model, tokens(2, 5), cache=cache)
    with pytest.raises(InputError, match="holds 2 rows, the ids 3"):
        read(model, tokens(3, 5), cache=cache)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3] = False
    with pytest.raises(InputError, match="left padding"):
        read(model, tokens(2, 5), mask=mask)
    model.mixers[1].policy = ScanPolicy(window=4)
    with pytest.raises(InputError, match="mid-stream"):
        read(model, tokens(2, 5), cache=cache)
    model.restart = Restart(4)
    with pytest.raises(InputError, match="document boundaries"):
        read(model, tokens(2, 5), reset=torch.zeros(2, 5, dtype=torch.bool))
    for every, overlap in ((0, 0), (4, 5), (4, -1)):
        with pytest.raises(InputError, match="overlap"):
            Restart(every, overlap)
    for shape in ({"d_model": 100}, {"headdim": 128, "d_model": 64, "ngroups": 2}):
        with pytest.raises(InputError):
            Mamba2Config(**shape)
    with pytest.raises(InputError, match="backend"):
        model.use_backend("fast")


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "cap 16", "window 13"])
def test_states_of_fewer_bits_are_rounded_between_calls(make, name):
    model, ids = make(), tokens(2, 90)
    for mixer in model.mixers:
        mixer.policy = policy(name)
    whole, sizes = read(model, ids), [40, *[1] * 10, 40]
    plain = read(model, ids, sizes)
    model.use_state_dtype("float32")
    assert model.state_dtype is None and torch.equal(read(model, ids, sizes), plain)

    cache, expected = Cache(), []
    for part in ids.split(sizes, 1):  # by hand
        expected.append(model(part, cache))
        for c in cache.layers:
            for holder, names in ((c.scan, ["state"]), (c.scan.window, ["x", "B", "x_before", "B_before", "after"])):
                for n in names if holder else ():
                    setattr(holder, n, getattr(holder, n).to(torch.bfloat16).float())
            if c.scan.window:
                c.scan.window.block = c.scan.state
    model.use_state_dtype("bfloat16")
    kept = Cache()
    found = read(model, ids, sizes, kept)
    assert model.state_dtype == torch.bfloat16 and torch.equal(found, torch.cat(expected, 1))
    assert (found - plain).abs().max() > 1e-4 and torch.equal(read(model, ids), whole)  # one call hands nothing on
    assert all(c.scan.state.dtype == torch.bfloat16 for c in kept.layers)
    assert all(torch.equal(a.scan.state.float(), b.scan.state) for a, b in zip(kept.layers, cache.layers))
    model.use_state_dtype(None)
    assert torch.equal(read(model, ids, sizes), plain)
    read(model, ids[:, :5], cache=kept)  # a state kept in fewer bits is gone on from
    assert all(c.scan.state.dtype == torch.float32 for c in kept.layers)


@torch.no_grad()
def test_the_precision_of_states(make):
    model = make()
    model.use_state_dtype(torch.float64)
    assert model.backend == "torch"
    cache = Cache()
    read(model, tokens(1, 9), [4, 5], cache)
    assert all(c.scan.state.dtype == torch.float64 for c in cache.layers)
    with pytest.raises(InputError, match="a state is kept in float32, bfloat16, float16, float64, not in 'bflot16'"):
        model.use_state_dtype("bflot16")
    wide = make(torch.float64)
    wide.use_state_dtype("float64")
    assert wide.state_dtype is None
    wide.use_state_dtype("float32")
    assert wide.state_dtype == torch.float32


def test_a_layers_text_says_what_its_rates_are_drawn_from():
    def rates(text: str) -> torch.Tensor:
        return -LM(ModelConfig(text, d_model=64, n_layer=2)).mixers[0].A.detach()

    low, high = (rates(f"mamba2:headdim=4,A_low={a},A_high={b}") for a, b in ((2, 3), (5, 6)))
    assert ((low > 1.99) & (low < 3.01)).all() and ((high > 4.99) & (high < 6.01)).all()
    slow = rates("mamba2:headdim=1,A_low=1e-6,A_high=1,A_draw=log-uniform")
    assert (slow < 1.01).all() and 0.2 < (slow < 1e-3).double().mean() < 0.8, "half of 128, on a logarithmic scale"
    with pytest.raises(InputError, match="A_init: expected a range above 0"):
        ModelConfig("mamba2:headdim=4,A_low=2,A_high=1", d_model=64)
