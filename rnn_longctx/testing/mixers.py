"""What every mixer is held to on the CPU: in float64, and loosely in bfloat16.

    from rnn_longctx.testing.mixers import check_mixer
    check_mixer("mine:heads=2")  # a mixer registered in rnn_longctx.models.mixers.MIXERS, with small parameters

A check raises AssertionError with a line that says what does not hold. Nothing here needs pytest.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.weights import stored_dtype
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.span import WHOLE

VOCAB, D_MODEL = 31, 32
LENGTH = 60  # tokens of the streams that are read: more than a mixer's window or chunk should be
CLOSE = 1e-9
ROUGHLY = 0.03  # of the outputs' size: what bfloat16, whose steps are 0.4%, may be off by in a layer
AGREEING = 0.9  # of tokens, for which a layer that chooses what it reads chooses in bfloat16 what it does in float64


def check_mixer(text: str, seed: int = 0) -> None:
    """Hold a mixer, as "name:parameter=value", to all of `CHECKS`."""
    for check in CHECKS:
        check(text, seed)


def examples(name: str) -> tuple[str, ...]:
    """Return the settings of a mixer that are tried, as its class lists them; its defaults where it lists none. (A
    class that is made of another one has not that one's.)"""
    return vars(MIXERS[name]).get("examples") or (name,)


def small_model(text: str, seed: int, layers: int = 2) -> LM:
    """Return a model of such layers in float64, whose embedding is large enough for every part to matter."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = LM(ModelConfig(text, d_model=D_MODEL, n_layer=layers, vocab_size=VOCAB)).double().eval()
    nn.init.normal_(model.backbone.embedding.weight)
    return model


def check_no_gradient_from_the_future(text: str, seed: int = 0) -> None:
    mixer: Any = small_model(text, seed).layers[0].mixer
    u = torch.randn(1, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    for t in (0, LENGTH // 2, random.randrange(LENGTH - 1)):
        y, _ = mixer(u, None, WHOLE)
        (gradient,) = torch.autograd.grad(y[0, t].square().sum(), u)
        sizes = gradient[0].abs().sum(-1)
        assert not sizes[t + 1 :].any(), f"{text}: the output of token {t} hangs on a token after it"
        assert sizes[t] > 0, f"{text}: the output of token {t} does not hang on the token itself"


def check_a_later_token_changes_nothing_before(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(2)
    t = random.randrange(1, LENGTH)
    other = ids.clone()
    other[:, t] = (ids[:, t] + 1) % VOCAB
    a, b = _read(model, ids), _read(model, other)
    _same(a[:, :t], b[:, :t], f"{text}: with token {t} changed, the outputs before it")
    assert (a[:, t] - b[:, t]).abs().max() > CLOSE, f"{text}: a token changes nothing at its own place"


def check_any_cut_is_one_pass(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(2)
    whole = Cache()
    expected = _read(model, ids, cache=whole)
    for sizes in (_cut(LENGTH, 8), [1, LENGTH - 1], [LENGTH - 1, 1]):
        cache = Cache()
        _same(_read(model, ids, sizes, cache), expected, f"{text}: read in pieces of {sizes}, the outputs")
        for a, b in zip(cache.leaves(), whole.leaves(), strict=True):
            _same(a, b, f"{text}: read in pieces of {sizes}, the carry")


def check_steps_are_a_prefill(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(3)
    n = random.randrange(5, 30)
    expected = _read(model, ids)
    _same(_read(model, ids, [1] * LENGTH), expected, f"{text}: read token by token, the outputs")
    _same(_read(model, ids, [n, *[1] * (LENGTH - n)]), expected, f"{text}: stepped after {n} tokens, the outputs")


def check_a_new_carry_is_none(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(2)
    zeros = model.new_cache(2)
    _same(_read(model, ids, cache=zeros), _read(model, ids), f"{text}: from new_carry, not from None, the outputs")


def check_left_padded_rows_are_rows_alone(text: str, seed: int = 0) -> None:
    model, pads = small_model(text, seed), [0, random.randrange(1, 15), random.randrange(15, 50)]
    ids, more = _ids(len(pads)), _ids(len(pads), 7)
    mask = torch.arange(LENGTH) >= torch.tensor(pads)[:, None]
    for sizes in ([LENGTH], [15, 1, 20, LENGTH - 36]):  # (rows may be all padding at first)
        cache = Cache()
        outputs, after = _read(model, ids, sizes, cache, mask=mask), _read(model, more, [3, 4], cache)
        for i, pad in enumerate(pads):
            alone = _read(model, torch.cat([ids[i : i + 1, pad:], more[i : i + 1]], 1))
            _same(outputs[i : i + 1, pad:], alone[:, :-7], f"{text}: after {pad} tokens of padding, the outputs")
            _same(after[i : i + 1], alone[:, -7:], f"{text}: what is read after a row with {pad} tokens of padding")


def check_documents_are_documents_alone(text: str, seed: int = 0) -> None:
    model, rows = small_model(text, seed), [[20, 1, 25, 14], [7, 33, 1, 19]]
    ids, more = _ids(2), _ids(2, 5)
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, lengths in zip(reset, rows):
        row[torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    for sizes in ([LENGTH], _cut(LENGTH, 5), [20, 1, LENGTH - 21]):
        cache = Cache()
        outputs, after = _read(model, ids, sizes, cache, reset=reset), _read(model, more, cache=cache)
        for i, lengths in enumerate(rows):
            pieces = zip(ids[i].split(lengths), outputs[i].split(lengths))
            for document, output in pieces:
                _same(output, _read(model, document[None])[0], f"{text}: a document beside others, its outputs")
            alone = _read(model, torch.cat([document, more[i]])[None])[0, -5:]
            _same(after[i], alone, f"{text}: what is read on after the last of several documents")


def check_a_carry_is_cloned_saved_and_shared(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(2)
    expected, at = _read(model, ids), random.randrange(1, LENGTH)
    cache, another = Cache(), Cache()
    _read(model, ids[:, :at], cache=cache)
    clone, snapshot = cache.clone(), cache.snapshot()
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache.safetensors")
        loaded = Cache.load(Path(folder) / "cache.safetensors")
    moved = cache.to("cpu")
    for what, kept in (
        ("itself", cache),
        ("a snapshot of before", snapshot),
        ("a clone", clone),
        ("saved and loaded", loaded),
        ("moved", moved),
    ):
        _read(model, _ids(3), cache=another)  # two streams on one model
        kept = kept.clone() if kept is moved else kept
        _same(_read(model, ids[:, at:], cache=kept), expected[:, at:], f"{text}: what goes on from a carry, {what},")


def check_rows_are_reordered_and_joined(text: str, seed: int = 0) -> None:
    model, ids, order = small_model(text, seed), _ids(3), [2, 0, 0, 1]
    expected, cache = _read(model, ids)[:, 40:], Cache()
    _read(model, ids[:, :40], cache=cache)
    picked = cache.rows(order)
    _same(_read(model, ids[order, 40:], cache=picked), expected[order], f"{text}: rows in another order")
    joined = Cache.concat([cache.rows([1]), cache.rows([2, 0])], [1, 2, 0])
    _same(_read(model, ids[:, 40:], cache=joined), expected, f"{text}: rows put together again")
    ragged = []
    for row, length in enumerate((40, 3, 17)):  # rows that have read unequally much
        ragged.append(Cache())
        _read(model, ids[row : row + 1, 40 - length : 40], cache=ragged[-1])
    alone = torch.cat([_read(model, ids[i : i + 1, 40:], cache=c.clone()) for i, c in enumerate(ragged)])
    joined = Cache.concat(ragged, [0, 1, 2])
    _same(_read(model, ids[:, 40:], cache=joined), alone, f"{text}: rows of unequal lengths put together")


def check_gradients_flow_through_carries(text: str, seed: int = 0) -> None:
    model, ids = small_model(text, seed), _ids(2, 40)

    def gradients(sizes: list[int], cut: bool = False) -> list[Tensor]:
        model.zero_grad()
        cache, losses = Cache(), []
        for part in ids.split(sizes, 1):
            cache.restore(cache.detach() if cut else cache)
            losses.append(model(part, cache).square().sum())
        torch.stack(losses).sum().backward()
        return [p.grad.clone() for p in model.layers[0].mixer.parameters() if p.grad is not None]

    whole = gradients([40])
    for a, b in zip(gradients([1, 19, 20]), whole, strict=True):
        _same(a, b, f"{text}: through carries, the gradients", 1e-7)
    apart = zip(gradients([20, 20], cut=True), whole, strict=True)
    assert any((a - b).abs().max() > 1e-7 for a, b in apart), f"{text}: no gradient comes through a carry"


def check_state_size_is_what_a_carry_holds(text: str, seed: int = 0) -> None:
    model, rows = small_model(text, seed, layers=1), 2
    size = model.state_size()
    for length in (1, 13, LENGTH):
        cache = Cache()
        _read(model, _ids(rows, length), cache=cache)
        held = sum(t.numel() for t in _numbers(cache.layers)) // rows
        assert held == size.total(length), (
            f"{text}: state_size says {size.total(length)} numbers after {length} tokens, the carry holds {held}"
        )


def check_bfloat16_is_roughly_float64(text: str, seed: int = 0) -> None:
    """With such weights, as `rnn_longctx.load` makes them, and under autocast of float32 weights, as training does.

    A layer that chooses what it reads (see `Mixer`) chooses otherwise where two scores are nearer to each other than
    bfloat16 can tell: the one is as good as the other by then, yet what is read is another text, and the outputs differ
    by as much as texts do. That says nothing of the layer's sums. So these are compared at the tokens for which it
    chooses what it chooses in float64, and those must be most (`AGREEING`): scores that are rounded more coarsely, or
    choices that hang on where a stream is cut, agree less.
    """
    mixer: Any = small_model(text, seed, layers=1).layers[0].mixer
    u, sizes = torch.randn(2, LENGTH, D_MODEL), [size for size in _cut(LENGTH, 5) if size]
    expected, choices = _mix(mixer, u.double(), [LENGTH]), _choices(mixer, u.double(), [LENGTH])

    def compare(outputs: Tensor, kept: Tensor, what: str) -> None:
        same = (kept == choices).all(2)  # (B, T)
        share = same.double().mean().item()
        assert share >= AGREEING, f"{text}: {what}, {share:.0%} of tokens choose what they choose in float64"
        _roughly(outputs[same], expected[same], f"{text}: {what}, the outputs")

    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        compare(_mix(mixer, u, sizes), _choices(mixer, u, sizes), "under autocast to bfloat16")
    for name, p in mixer.named_parameters():
        p.data = p.data.to(stored_dtype(name, torch.bfloat16))
    u = u.bfloat16()
    outputs = _mix(mixer, u, sizes)
    assert outputs.dtype == torch.bfloat16, f"{text}: of weights in bfloat16, the outputs are {outputs.dtype}"
    compare(outputs, _choices(mixer, u, sizes), "in bfloat16")


def check_a_norm_cap_is_followed(text: str, seed: int = 0) -> None:
    """What state-norm sets: no state of a recurrent layer grows beyond it, and any cut is one pass under it, too."""
    model, ids, free, capped = small_model(text, seed), _ids(2), Cache(), Cache()
    plain = _read(model, ids, cache=free)
    followers = [mixer for mixer in model.mixers if "caps" in mixer.recurrence.follows]
    mixers: dict[int, Any] = {i: layer.mixer for i, layer in enumerate(model.layers) if layer.mixer in followers}
    if not mixers:
        return
    caps = {i: _norms(mixer, free.layers[i]).amin(0) / 2 for i, mixer in mixers.items()}  # (H)
    for i, mixer in mixers.items():
        mixer.policy = ScanPolicy(caps=(Cap(tuple(caps[i].tolist())),))
    outputs = _read(model, ids, cache=capped)
    for i, mixer in mixers.items():
        over = (_norms(mixer, capped.layers[i]) / caps[i]).max().item()
        assert over <= 1 + CLOSE, f"{text}: under a norm cap, a state's norm is {over:.3g} times the cap"
    assert (outputs - plain).abs().max() > CLOSE, f"{text}: a norm cap changes no output"
    _same(_read(model, ids, _cut(LENGTH, 8)), outputs, f"{text}: read in pieces under a norm cap, the outputs")


def check_the_hash_follows_the_weights(text: str, seed: int = 0) -> None:
    model = small_model(text, seed)
    before = model.weights_hash
    _read(model, _ids(1))
    assert model.weights_hash == before, f"{text}: reading changes the weights' hash"
    for name, p in model.layers[1].mixer.named_parameters():
        kept = p.data.clone()
        p.data.view(-1)[-1] += 1.0
        assert model.weights_hash != before, f"{text}: the weights' hash does not follow {name}"
        p.data.copy_(kept)
    assert model.weights_hash == before, f"{text}: the weights' hash is not what it was for the same weights"


CHECKS: list[Callable[..., None]] = [
    check_no_gradient_from_the_future,
    check_a_later_token_changes_nothing_before,
    check_any_cut_is_one_pass,
    check_steps_are_a_prefill,
    check_a_new_carry_is_none,
    check_left_padded_rows_are_rows_alone,
    check_documents_are_documents_alone,
    check_a_carry_is_cloned_saved_and_shared,
    check_rows_are_reordered_and_joined,
    check_gradients_flow_through_carries,
    check_state_size_is_what_a_carry_holds,
    check_bfloat16_is_roughly_float64,
    check_a_norm_cap_is_followed,
    check_the_hash_follows_the_weights,
]


def _ids(rows: int, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


def _cut(length: int, pieces: int) -> list[int]:
    """Return the lengths of the pieces of a random split; some may be empty."""
    marks = sorted(random.choices(range(length + 1), k=pieces - 1))
    return [b - a for a, b in zip([0, *marks], [*marks, length])]


@torch.no_grad()
def _read(
    model: LM, ids: Tensor, sizes: list[int] | None = None, cache: Cache | None = None, **marks: Tensor
) -> Tensor:
    """Return the hidden states of ids, read in pieces of the given sizes; marks: mask or reset."""
    cache, sizes = Cache() if cache is None else cache, sizes or [ids.shape[1]]
    pieces = zip(ids.split(sizes, 1), *(mark.split(sizes, 1) for mark in marks.values()))
    return torch.cat([model(piece, cache, **dict(zip(marks, rest))) for piece, *rest in pieces], 1)


@torch.no_grad()
def _mix(mixer: Any, u: Tensor, sizes: list[int]) -> Tensor:
    """Return what a layer gives of u (B, T, d_model), read in pieces."""
    carry, outputs = None, []
    for piece in u.split(sizes, 1):
        y, carry = mixer(piece, carry, WHOLE)
        outputs.append(y)
    return torch.cat(outputs, 1)


@torch.no_grad()
def _choices(mixer: Any, u: Tensor, sizes: list[int]) -> Tensor:
    """Return what a layer chooses to read for each token, (B, T, numbers in order); none, where it does not choose."""
    if not hasattr(mixer, "kept"):
        return torch.zeros(*u.shape[:2], 0)
    carry, choices = None, []
    for piece in u.split(sizes, 1):
        blocks = mixer.kept(piece, carry, WHOLE).blocks  # (B, H, t, K)
        choices.append(blocks.sort(3).values.transpose(1, 2).flatten(2))
        _, carry = mixer(piece, carry, WHOLE)
    return torch.cat(choices, 1)


@torch.no_grad()
def _norms(mixer: Recurrent, carry: Any) -> Tensor:
    """Return the Frobenius norm (B, H) of every head's state in a carry of a recurrent layer."""
    return mixer.scan_state(carry).flatten(2).norm(dim=2)


def _numbers(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a carry that are state: no counters, and no sums that only policies and observers read."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif is_dataclass(value):
        for f in fields(value):
            if not f.metadata.get("tally"):
                yield from _numbers(getattr(value, f.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


def _same(a: Tensor, b: Tensor, what: str, close: float = CLOSE) -> None:
    assert a.shape == b.shape, f"{what} have shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if a.numel():
        off = (a.double() - b.double()).abs().max().item()
        assert off <= close, f"{what} are off by {off:.1e}"


def _roughly(a: Tensor, b: Tensor, what: str) -> None:
    assert a.shape == b.shape, f"{what} have shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    off = ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()
    assert off <= ROUGHLY, f"{what} are off by {off:.0%} of those in float64"
