"""Attention's cache grows in place, and carries are values all the same."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare.timing import carried_bytes
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.attention import WITHOUT_CUDNN, _unplanned
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.carries import TYPES
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.models.room import STEP, extended, newest
from rnn_longctx.models.rotary import Yarn
from rnn_longctx.recurrence.span import WHOLE
from rnn_longctx.testing.remedies import TRAIN_LENGTH, model_of

FULL = ["full-attention:heads=2", "full-attention:heads=2,positions=none"]
OTHERS = ["sliding-window:window=9,heads=2", "chunk-linformer:chunk=7,rank=3,heads=2"]
GROWING = [*FULL, "block-sparse:heads=2,block=6,window=12,top=2,gate=4", "two-stage:heads=2,block=6,window=6,top=3"]


def model_with(mixer):
    return LM(ModelConfig(mixer, d_model=16, n_layer=2, vocab_size=20)).double().eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", GROWING)
@torch.no_grad()
def test_a_token_does_not_copy_the_cache(mixer):
    """Over 300 tokens the keys of a layer move a few times, as often as they double, and are right."""
    model, ids, cache, places = model_with(mixer), torch.randint(20, (2, 300)), Cache(), set()
    expected = model(ids)
    for t in range(300):
        close(model(ids[:, t : t + 1], cache), expected[:, t : t + 1])
        keys = cache.layers[1].keys
        room, _ = keys.room
        places.add(id(room.tensor))
        assert keys.shape[1] == t + 1 and keys.untyped_storage().data_ptr() == room.tensor.data_ptr()
    assert len(places) <= math.log2(300) + 1


@torch.no_grad()
def test_a_window_moves_within_its_room():
    model, ids = model_with(OTHERS[0]), torch.randint(20, (1, 200))
    expected, cache, before, copies = model(ids), Cache(), None, 0
    for t in range(200):
        close(model(ids[:, t : t + 1], cache), expected[:, t : t + 1])
        room, _ = cache.layers[0].keys.room
        copies, before = copies + (room is not before), room
        assert cache.layers[0].keys.shape[1] == min(t + 1, 8) and room.tensor.shape[1] <= 2 * 9
    assert copies <= 200 / 8 + 4


@pytest.mark.parametrize(
    "mixer", [*GROWING, "sliding-window:window=9,heads=2", "chunk-linformer:chunk=7,rank=3,heads=2"]
)
@torch.no_grad()
def test_a_carry_goes_on_twice(mixer):
    """Branches of one prompt, token by token in turn, read what each would alone; so does the prompt's own carry, last
    of all."""
    model, prompt = model_with(mixer), torch.randint(20, (1, 40))
    branches, cache = torch.randint(20, (3, 1, 12)), Cache()
    for token in prompt.split(1, 1):
        model(token, cache)
    caches = [cache.snapshot() for _ in branches]
    outputs = [torch.cat(y, 1) for y in zip(*([model(b[:, t : t + 1], c) for b, c in zip(branches, caches)]
                                              for t in range(12)))]  # fmt: skip
    for branch, output in zip(branches, outputs, strict=True):
        close(output, model(torch.cat([prompt, branch], 1))[:, 40:])
    close(model(branches[0], cache), outputs[0])


@pytest.mark.parametrize("mixer", GROWING)
def test_with_gradients_nothing_is_written_in_place(mixer):
    layer, u = model_with(mixer).layers[0].mixer, torch.randn(1, 50, 16, dtype=torch.float64)
    with torch.no_grad():
        _, carry = layer(u[:, :30], None, WHOLE)
        _, carry = layer(u[:, 30:31], carry, WHOLE)
    room, end = carry.keys.room
    written = room.tensor.clone()
    y, after = layer(u[:, 31:32], carry, WHOLE)
    assert torch.equal(written[:, :end], room.tensor[:, :end]) and room.filled == end == 31
    assert after.keys.grad_fn is not None and not hasattr(after.keys, "room")
    with torch.no_grad():
        layer(u[:, 33:34], carry, WHOLE)  # writes behind it, between forward and backward
        expected = layer(u, None, WHOLE)[0]
    z, _ = layer(u[:, 32:], after, WHOLE)
    (y.sum() + z.sum()).backward()
    close(torch.cat([y, z], 1).detach(), expected[:, 31:])


def test_a_carry_goes_from_inference_mode_to_others():
    model, ids, cache = model_with(FULL[0]), torch.randint(20, (1, 30)), Cache()
    expected = model(ids).detach()
    for t in range(30):
        mode = (torch.inference_mode, torch.no_grad, torch.enable_grad)[t // 2 % 3]
        with mode():
            close(model(ids[:, t : t + 1], cache).detach().clone(), expected[:, t : t + 1])


@torch.no_grad()
def test_positions_scaled_in_the_middle_of_a_stream(tmp_path):
    """The tokens after are read as if all had been read so, in a layer whose keys do not hang on what was read before;
    of joined rows each was read in its own way."""
    model = model_of(FULL[0])
    layer, u = model.layers[0].mixer, torch.randn(2, 60, model.d_model, dtype=torch.float64)
    ways = [None, Yarn(4.0, TRAIN_LENGTH), Yarn(1.5, TRAIN_LENGTH)]
    expected = {}
    for layer.yarn in ways:
        expected[layer.yarn] = layer(u, None, WHOLE)[0]
    assert (expected[ways[0]] - expected[ways[1]])[:, 20:].abs().max() > 1e-4
    carry = None
    for t, piece in enumerate(u.split(1, 1)):
        layer.yarn = ways[t // 5 % 3]
        before = carry
        y, carry = layer(piece, carry, WHOLE)
        close(y, expected[layer.yarn][:, t : t + 1])
        assert before is None or before.scaling == ways[(t - 1) // 5 % 3], "the carry before is what it was"
    parts = []
    for row, layer.yarn in enumerate(ways[:2]):
        parts.append(Cache([layer(u[row : row + 1, row * 7 : 50], None, WHOLE)[1]], torch.tensor([50])))
    joined = Cache.concat(parts, [0, 1])
    joined.save(tmp_path / "cache.safetensors")
    layer.yarn = ways[2]
    for cache in (joined, Cache.load(tmp_path / "cache.safetensors")):
        y, _ = layer(u[:, 50:], cache.layers[0], WHOLE)
        close(y[:1], expected[ways[2]][:1, 50:])
        close(y[1:], layer(u[1:, 7:], None, WHOLE)[0][:, 43:])


@torch.no_grad()
def test_yarn_on_and_off_while_tokens_are_generated():
    model, ids, cache, plain = model_of(FULL[0]), torch.randint(20, (1, 50)), Cache(), Cache()
    model(ids[:, :30], cache)
    model(ids[:, :30], plain)
    before = cache.snapshot()
    with mitigate(model, "yarn:factor=4"):
        scaled = model(ids[:, 30:40], cache)
    assert (scaled - model(ids[:, 30:40], plain)).abs().max() > 1e-4
    close(model(ids[:, 30:], before)[:, 10:], model(ids[:, 40:], plain))


@torch.no_grad()
def test_a_room_is_not_much_larger_than_what_is_in_it():
    x = torch.randn(2, 3 * STEP, 4)
    held = x[:, :0]
    for piece in x.split([1, STEP, 7, 2 * STEP - 8], 1):
        held = extended(held, piece)
        used = held.shape[1]
        assert held.room[0].tensor.shape[1] <= used + min(used, STEP) and carried_bytes(held) == used * 2 * 4 * 4
    assert torch.equal(held, x) and torch.equal(newest(held, 50), x[:, -50:])
    assert newest(held, 50).untyped_storage().nbytes() == 50 * 2 * 4 * 4, "a window does not keep the text before it"
    assert newest(held, 2 * STEP).data_ptr() == held[:, STEP:].data_ptr()


@torch.no_grad()
def test_what_is_made_of_a_view_is_copied_when_it_grows():
    held = extended(torch.randn(2, 3, 4), torch.randn(2, 1, 4))
    new, rest = torch.randn(2, 1, 4), held.room[0].tensor[:, 4:].clone()
    for other in (held.clone(), held[:, 1:], held[[1, 0]], held.to(torch.float64)):
        assert torch.equal(extended(other, new), torch.cat([other.to(new.dtype), new], 1))
        assert torch.equal(extended(other, new.double()), torch.cat([other.double(), new.double()], 1))
    assert torch.equal(held.room[0].tensor[:, 4:].nan_to_num(), rest.nan_to_num()) and held.room[0].filled == 4


@torch.no_grad()
def test_two_threads_may_go_on_from_one_carry():
    def goes_on(held, new, begin):
        begin.wait()
        return extended(held, new)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            held, begin = extended(torch.zeros(1, 4, 2), torch.zeros(1, 1, 2)), Barrier(2)
            jobs = [pool.submit(torch.no_grad()(goes_on), held, torch.full((1, 1, 2), i), begin) for i in (1.0, 2.0)]
            assert [float(job.result()[0, 5, 0]) for job in jobs] == [1.0, 2.0]


@torch.no_grad()
def test_tokens_of_fewer_rows_are_not_spread_over_all():
    held = extended(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"cannot add tokens of \(1, 1, 4\) to \(2, 4, 4\)"):
        extended(held, torch.ones(1, 1, 4))


def test_a_saved_state_of_another_version_says_so(tmp_path, monkeypatch):
    model = model_with(FULL[0])
    cache = model.new_cache()
    with torch.inference_mode():
        model(torch.randint(20, (1, 5)), cache)
    cache.save(tmp_path / "cache")

    @dataclass
    class Narrower:
        keys: torch.Tensor

    monkeypatch.setitem(TYPES, type(cache.layers[0]).__name__, Narrower)
    with pytest.raises(InputError, match="cache was written by another version, whose WindowKeys kept other things"):
        Cache.load(tmp_path / "cache")


def test_one_query_leaves_the_choice_of_kernels_as_it_was():
    """And a person's own choice holds inside."""
    known = [is_on() for is_on in (*WITHOUT_CUDNN.values(), torch.backends.cuda.cudnn_sdp_enabled)]
    with _unplanned():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert [is_on() for is_on in (*WITHOUT_CUDNN.values(), torch.backends.cuda.cudnn_sdp_enabled)] == known
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]), _unplanned():
        assert [kernel for kernel, is_on in WITHOUT_CUDNN.items() if is_on()] == [SDPBackend.MATH]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), _unplanned():
        assert torch.backends.cuda.cudnn_sdp_enabled(), "nothing else is left"


@pytest.mark.gpu
@torch.inference_mode()
def test_a_token_waits_for_no_plan_of_cudnn():
    """Which is made anew for every number of keys."""
    model = LM(ModelConfig("full-attention:heads=2", d_model=128, n_layer=2, vocab_size=20)).cuda().bfloat16().eval()
    cache, ids = model.new_cache(), torch.randint(20, (1, 70), device="cuda")
    model(ids[:, :64], cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for t in range(64, 70):
            model(ids[:, t : t + 1], cache)
    kernels = [event.key for event in profile.key_averages() if "attention" in event.key]
    assert kernels and not any("cudnn" in kernel for kernel in kernels), kernels
