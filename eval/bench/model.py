"""Speed of a whole model on a GPU: reading a long prompt, and stepping; here, in mamba-ssm and in transformers, each
with the same random weights, against float64 and the floor of what the device can do."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor

from rnn_longctx.config import parse_length, parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench.base import Row, bench
from rnn_longctx.eval.bench.scan import ceilings
from rnn_longctx.models.adopt.cache import cache_name
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.checkpoint.save import save
from rnn_longctx.models.decode import Decoder
from rnn_longctx.models.lm import LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

SHAPE_370M = Mamba2Config(d_model=1024, n_layer=48, vocab_size=50288, d_state=128, headdim=64)
PROMPT = 256  # tokens before the steps that are timed
CHECKED = 3001  # tokens of the prompt whose last logits are compared
Read = Callable[[Tensor], Tensor]  # ids (B, T) to the last logits (B, V)
Step = Callable[[Tensor], Tensor]  # tokens (B) to the next tokens' logits (B, V)


def _model() -> LM:
    if not torch.cuda.is_available():
        raise InputError("this benchmark needs a CUDA device")
    with torch.device("cuda"):
        return LM(SHAPE_370M).bfloat16().eval()


def exact_logits(model: LM, ids: Tensor) -> Tensor:
    """Return the last logits (B, V) in float64."""
    wide = copy.deepcopy(model).double()
    wide.use_backend("torch")
    return wide.logits(wide(ids)[:, -1])


def _error(logits: Tensor, expected: Tensor) -> float:
    return ((logits.double().view_as(expected) - expected).norm() / expected.norm()).item()


def _official(model: LM) -> Any:
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except ImportError:
        return None
    config = MambaConfig(d_model=1024, n_layer=48, vocab_size=50288, ssm_cfg={"layer": "Mamba2"})
    official = MambaLMHeadModel(config, device="cuda", dtype=torch.bfloat16).eval()
    official.load_state_dict(model.state_dict(), strict=False)  # the head is the embedding
    return official


def _transformers(model: LM) -> Any:
    """Return the same model in transformers, which takes mamba-ssm's kernels where that is installed."""
    try:
        from transformers import Mamba2ForCausalLM
        from transformers import logging as transformers_logging
    except ImportError:
        return None
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, layout="transformers")
        other: Any = Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return other.cuda().eval()


@bench("model")
def bench_model(
    *,
    lengths: Annotated[str, "Tokens of the prompts."] = "64k,1m",
    segment: Annotated[str, "Tokens read at once."] = "64k",
) -> Iterator[Row]:
    """Reading a prompt with a model of 370M parameters on a GPU, here and in mamba-ssm, where that is installed.

    Examples:
        rnn-longctx bench model --lengths 64k,1m --out runs/model.csv
    """
    return prefill_rows(parse_lengths(lengths), parse_length(segment))


@torch.inference_mode()
def prefill_rows(lengths: list[int], segment: int) -> Iterator[Row]:
    """Yield a row a length and system: seconds to read a prompt of one row to its last token's logits."""
    model = _model()
    ids = torch.randint(SHAPE_370M.vocab_size, (1, max(lengths)), device="cuda")
    expected = exact_logits(model, ids[:, :CHECKED])

    _, rate = ceilings()
    # ours first: a kernel that fails may leave the device unusable; one model at a time, for its memory's sake
    systems = {
        f"rnn-longctx, segments of {segment}": _stream(segment),
        "mamba-ssm, one call": _official_prefill,
        "transformers, one call": _transformers_prefill,
    }
    for name, make in systems.items():
        read = make(model)
        if read is None:
            continue
        for length in lengths:
            floor = {"floor_seconds": length * _operations(model) / rate, "matrix_tflop_s": rate / 1e12}
            measured = seconds(read, ids[:, :length], ids, expected)
            yield {"what": "prefill", "length": length, "system": name, **measured, **floor}
        del read
        torch.cuda.empty_cache()


def _stream(segment: int) -> Callable[[LM], Read]:
    def make(model: LM) -> Read:
        def read(ids: Tensor) -> Tensor:
            for hidden in model.stream(ids, segment=segment):
                last = hidden[:, -1]
            return model.logits(last)

        return read

    return make


def _official_prefill(model: LM) -> Read | None:
    official = _official(model)
    return None if official is None else lambda ids: official(ids, num_last_tokens=1).logits


def _transformers_prefill(model: LM) -> Read | None:
    other = _transformers(model)
    return None if other is None else lambda ids: other(ids, logits_to_keep=1).logits


def _operations(model: LM) -> int:
    """Return the operations that a token takes: the projections, and the recurrence itself."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    return 2 * weights + 4 * model.state_size().fixed["scan"]


def seconds(read: Read, prompt: Tensor, ids: Tensor, expected: Tensor) -> Row:
    try:
        error = _error(read(ids[:, :CHECKED]), expected)
        read(prompt[:, : 2**17])  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        while len(times) < 3 and sum(times) < 10:
            began = time.perf_counter()
            read(prompt)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    except (RuntimeError, ValueError) as problem:  # what another library does with this size
        torch.cuda.empty_cache()
        missing = dict.fromkeys(("seconds", "tokens_per_second", "peak_gib", "error"), math.nan)
        return {**missing, "note": str(problem).splitlines()[0][:80]}
    peak, took = torch.cuda.max_memory_allocated() / 2**30, median(times)
    return {"seconds": took, "tokens_per_second": prompt.shape[1] / took, "peak_gib": peak, "error": error, "note": ""}


@bench("decode")
def bench_decode(
    *, tokens: Annotated[int, "Tokens that are generated."] = 500, batch: Annotated[int, "Rows side by side."] = 1
) -> Iterator[Row]:
    """Tokens per second of a model of 370M parameters on a GPU, with and without a remedy.

    Examples:
        rnn-longctx bench decode --tokens 500
    """
    return decode_rows(tokens, batch)


@torch.inference_mode()
def decode_rows(tokens: int, batch: int) -> Iterator[Row]:
    """Yield a row a system and remedy: tokens per second and row after a short prompt, the error of the first."""
    model = _model()
    ids = torch.randint(SHAPE_370M.vocab_size, (batch, PROMPT + 1), device="cuda")
    rri, cap = ScanPolicy(add=math.log(0.999), gain=0.75), ScanPolicy(caps=(Cap(10.0),))
    bandwidth, _ = ceilings()
    floor = bandwidth / sum(p.numel() * p.element_size() for p in model.parameters())
    shared = {"floor_tokens_per_second": floor, "bandwidth_tb_s": bandwidth / 1e12}
    for name, policy in {"none": PLAIN, "rri": rri, "cap a token": cap}.items():
        for mixer in model.mixers:
            mixer.policy = policy
        expected, cache = exact_logits(model, ids), Cache()
        model(ids[:, :-1], cache)
        for system, step in (("graph", Decoder(model, cache.clone())), ("eager", _eager(model, cache.clone()))):
            yield {
                "what": "decode",
                "batch": batch,
                "system": f"rnn-longctx, {system}",
                "policy": name,
                **_steps(step, ids, tokens if system == "graph" else 25, expected),
                **shared,
            }
    for mixer in model.mixers:
        mixer.policy = PLAIN
    expected = exact_logits(model, ids)
    for system, make in {"mamba-ssm, graph": _official_step, "transformers, eager": _transformers_step}.items():
        try:
            step = make(model, ids[:, :-1], tokens)
        except ImportError:
            continue
        count = tokens if "graph" in system else 25
        yield {
            "what": "decode",
            "batch": batch,
            "system": system,
            "policy": "none",
            **_steps(step, ids, count, expected),
            **shared,
        }


def _steps(step: Step, ids: Tensor, count: int, expected: Tensor) -> Row:
    error = _error(step(ids[:, -1]), expected)
    token = ids[:, -1]
    for _ in range(3):
        step(token)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        token = step(token).argmax(-1)
    torch.cuda.synchronize()
    return {"tokens_per_second": count / (time.perf_counter() - began), "error": error}


def _eager(model: LM, cache: Cache) -> Step:
    return lambda token: model.logits(model(token[:, None], cache)[:, -1])


def _official_step(model: LM, prompt: Tensor, tokens: int) -> Step:
    """Return a step as `mamba_ssm.utils.generation.decode(cg=True)` makes it."""
    official = _official(model)
    if official is None:
        raise ImportError
    from mamba_ssm.utils.generation import update_graph_cache

    batch, length = prompt.shape
    most = length + tokens + 8
    graph = update_graph_cache(official, None, batch, length, most)
    params = graph.inference_params
    params.reset(most, batch)
    official(prompt, inference_params=params, num_last_tokens=1)
    params.seqlen_offset = length

    def step(token: Tensor) -> Tensor:
        position = torch.full((batch, 1), params.seqlen_offset, dtype=torch.long, device="cuda")
        logits = graph.run(token[:, None], position, params.seqlen_offset)
        params.seqlen_offset += 1
        return logits[:, -1]

    return step


def _transformers_step(model: LM, prompt: Tensor, tokens: int) -> Step:
    other = _transformers(model)
    if other is None:
        raise ImportError
    name = cache_name(other)
    cache = {name: other(prompt, use_cache=True)[name]}
    return lambda token: other(token[:, None], **cache, use_cache=True).logits[:, -1]
