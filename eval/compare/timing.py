"""Seconds, bytes and joules of reading one length: what a comparison of growth measures, and of a trained model the
section `costs` of a comparison.

A row's keys are `what`, `length`, `segment` (None: one call), `seconds`, `tokens_per_second`, `joules` (NaN where they
cannot be read: `rnn_longctx.eval.energy`), `peak_bytes` (the most that was held at once beyond weights and inputs),
`carry_bytes` (what a row keeps for the next token), `parameters`, `operations` and `floor_seconds` (those of the matrix
products, where they are counted, and what they take at the rate of a large product on this device), `dtype`, `device`,
`versions`, and `note`: why nothing else is known.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnn_longctx.eval.bench.base import environment
from rnn_longctx.eval.bench.train import matrix_rate
from rnn_longctx.eval.energy import Meter
from rnn_longctx.models.checkpoint.weights import stored_dtype
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.span import WHOLE

Row = dict[str, Any]

REPEATS = 3  # of which the median counts
ENOUGH = 10.0  # seconds after which nothing is repeated
NO_MEMORY = "out of memory"


@dataclass(frozen=True)
class ReadingConfig:
    """What is read, and how.

    Attributes:
        what: "mixers": of the model the mixer of its first layer alone.
        segment: tokens of a call; None: all in one.
        tokens: how many are generated after a prompt.
    """

    model: ModelConfig
    what: Literal["mixers", "models"]
    segment: int | None
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds, the median; joules, the mean; the most bytes held at once beyond those before."""

    seconds: float
    joules: float
    peak_bytes: int


def rows_at(reading: ReadingConfig, length: int, device: torch.device) -> Iterator[Row]:
    """Yield the rows of one length: "forward" of a mixer; "prefill" and "decode" of a model."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about = {"length": length, "segment": reading.segment, "dtype": str(dtype).removeprefix("torch."), **environment()}
    about["device"] = about["device"] if device.type == "cuda" else "cpu"
    measure, due = {"mixers": (_of_mixer, ["forward"]), "models": (_of_model, ["prefill", "decode"])}[reading.what]
    try:
        for row in measure(reading, length, device, dtype):
            due.remove(row["what"])
            yield about | {"operations": None, "floor_seconds": math.nan, "note": ""} | row
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        unknown = dict.fromkeys(
            ("seconds", "tokens_per_second", "joules", "peak_bytes", "carry_bytes", "floor_seconds"), math.nan
        )
        yield about | unknown | {"what": due[0], "parameters": None, "operations": None, "note": NO_MEMORY}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory did not suffice. (On a CPU PyTorch has no error of its own for that.)"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _of_mixer(reading: ReadingConfig, length: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    mixer = _placed(_made(reading.model, device).layers[0].mixer, dtype)
    segment = min(reading.segment or length, length)
    u = torch.randn(1, segment, reading.model.d_model, device=device, dtype=dtype)

    def read() -> Any:
        carry = None
        for t in range(0, length, segment):
            _, carry = mixer(u[:, : length - t], carry, WHOLE)
        return carry

    cost, carry = timed(read, device)
    operations = mixer.operations(length) if hasattr(mixer, "operations") else None
    floor = math.nan if operations is None else operations / _rate(device, dtype)
    parameters = sum(p.numel() for p in mixer.parameters())
    yield {
        "what": "forward",
        **vars(cost),
        "tokens_per_second": length / cost.seconds,
        "carry_bytes": carried_bytes(carry),
        "parameters": parameters,
        "operations": operations,
        "floor_seconds": floor,
    }


def _of_model(reading: ReadingConfig, length: int, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    model = _placed(_made(reading.model, device), dtype)
    yield from model_rows(model, length, reading.segment or length, reading.tokens)


def model_rows(model: LanguageModel, length: int, segment: int, tokens: int) -> Iterator[Row]:
    """Yield what it takes a model to read a prompt of random tokens up to the logits of its last one ("prefill"), and
    to generate a token after it ("decode"), of `tokens` that are generated."""
    device = model.device
    ids = torch.randint(model.vocab_size, (1, length), device=device)
    parameters = sum(p.numel() for p in model.parameters())

    def prefill() -> tuple[Any, Tensor]:
        cache = model.new_cache()
        for hidden in model.stream(ids, cache, segment):
            last = hidden[:, -1]
        return cache, model.logits(last).argmax(-1)

    cost, (cache, token) = timed(prefill, device)
    carry = {"carry_bytes": carried_bytes(cache.layers), "parameters": parameters}
    yield {"what": "prefill", **vars(cost), "tokens_per_second": length / cost.seconds, **carry}
    if isinstance(model, LM) and Decoder.refuses(model, cache) is None:
        step: Callable[[Tensor], Tensor] = Decoder(model, cache)
    else:

        def step(token: Tensor) -> Tensor:
            return model.logits(model(token[:, None], cache)[:, -1])

    def decode() -> None:
        last = token
        for _ in range(tokens):
            last = step(last).argmax(-1)

    cost, _ = timed(decode, device)
    cost = Cost(cost.seconds / tokens, cost.joules / tokens, cost.peak_bytes)
    yield {"what": "decode", **vars(cost), "tokens_per_second": 1 / cost.seconds, **carry}


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Cost, Any]:
    """Return what a run takes once kernels are compiled and tuned for its length, and what it returned."""
    with nullcontext() if device.type == "cuda" else _Held() as held:
        run()
    _synchronize(device)
    before = _forget_peak(device)
    times: list[float] = []
    meter = Meter(device)
    while not times or (len(times) < REPEATS and sum(times) < ENOUGH):
        result = None  # (what is held of the run before is no part of the next one's peak)
        began = time.perf_counter()
        result = run()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    joules = meter.joules(sum(times)) / len(times)
    peak = torch.cuda.max_memory_allocated(device) - before if held is None else held.most
    return Cost(median(times), joules, peak), result


class _Held(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still held, and the most there were at once: what PyTorch
    counts of a GPU's memory by itself, but without what an operation takes while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in given and place not in self._known:
                    self._known.add(place)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, place, size)
        return made

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def carried_bytes(value: Any) -> int:
    """Return the bytes of all tensors in a carry, or in a list of carries."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(carried_bytes(getattr(value, f.name)) for f in fields(value))
    return sum(map(carried_bytes, value)) if isinstance(value, list | tuple) else 0


def _made(config: ModelConfig, device: torch.device) -> LM:
    with device:
        return LM(config).eval()


def _placed(module: Any, dtype: torch.dtype) -> Any:
    """Return the module with weights as a checkpoint of this type has them: rates and the like stay float32."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(stored_dtype(name, dtype))
    return module


@lru_cache
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    return matrix_rate(device, dtype)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> int:
    """Let a GPU count from here on; return the bytes of it that are held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
