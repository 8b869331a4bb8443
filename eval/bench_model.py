"""Speed of a whole model on a GPU: reading a long prompt, and stepping, here and in mamba-ssm, with random weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.models import Cache, Mamba2Config, Mamba2LM
from rnn_longctx.models.decode import Decoder
from rnn_longctx.ssd import PLAIN, Cap, ScanPolicy

SHAPE_370M = Mamba2Config(d_model=1024, n_layer=48, vocab_size=50288, d_state=128, headdim=64)
Row = dict[str, Any]


def _model() -> Mamba2LM:
    if not torch.cuda.is_available():
        raise InputError("this benchmark needs a CUDA device")
    with torch.device("cuda"):
        return Mamba2LM(SHAPE_370M).bfloat16().eval()


def _official() -> Any:
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = MambaConfig(d_model=1024, n_layer=48, vocab_size=50288, ssm_cfg={"layer": "Mamba2"})
    return MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()


@torch.inference_mode()
def prefill_rows(lengths: list[int], segment: int) -> Iterator[Row]:
    """A row a length and system: seconds to read a prompt of one row to its last token's logits."""
    model = _model()
    ids = torch.randint(SHAPE_370M.vocab_size, (1, max(lengths)), device="cuda")

    def ours(length: int) -> None:
        for hidden in model.stream(ids[:, :length], segment=segment):
            last = hidden[:, -1]
        model.logits(last)

    official = _official()
    systems: dict[str, Callable[[int], Any]] = {f"rnn-longctx, segments of {segment}": ours}
    if official is not None:
        systems["mamba-ssm, one call"] = lambda length: official(ids[:, :length], num_last_tokens=1)
    for length in lengths:
        for name, run in systems.items():
            yield {"what": "prefill", "length": length, "system": name, **_seconds(run, length)}


def _seconds(run: Callable[[int], Any], length: int) -> Row:
    try:
        run(min(length, 2**17))  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            run(length)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    except (RuntimeError, ValueError) as problem:  # what another library does with this size
        return {"seconds": math.nan, "tokens_per_second": math.nan, "peak_gib": math.nan, "note": str(problem)[:80]}
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": median(times), "tokens_per_second": length / median(times), "peak_gib": peak, "note": ""}


@torch.inference_mode()
def decode_rows(tokens: int, batch: int) -> Iterator[Row]:
    """A row a policy: tokens per second and row of `Decoder`, after a short prompt, and of the model's own step."""
    model = _model()
    cache = Cache()
    model(torch.randint(SHAPE_370M.vocab_size, (batch, 256), device="cuda"), cache)
    rri, cap = ScanPolicy(add=math.log(0.999), gain=0.75), ScanPolicy(caps=(Cap(10.0),))
    policies = {"none": PLAIN, "rri": rri, "cap a token": cap}
    for name, policy in policies.items():
        for mixer in model.mixers:
            mixer.policy = policy
        token = torch.zeros(batch, dtype=torch.int64, device="cuda")
        for system, step in (("graph", Decoder(model, cache.clone())), ("eager", _eager(model, cache.clone()))):
            count = tokens if system == "graph" else max(1, tokens // 20)
            for _ in range(3):
                step(token)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(count):
                token = step(token).argmax(-1)
            torch.cuda.synchronize()
            took = time.perf_counter() - began
            yield {"what": "decode", "batch": batch, "system": f"rnn-longctx, {system}", "policy": name,
                   "tokens_per_second": count / took}  # fmt: skip


def _eager(model: Mamba2LM, cache: Cache) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda token: model.logits(model(token[:, None], cache)[:, -1])
