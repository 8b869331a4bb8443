"""Speed of models of the delta rule on a GPU: reading a long prompt here, watched and capped too, and in fla."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from rnn_longctx.config import parse_length, parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.bench.base import Row, bench
from rnn_longctx.eval.bench.model import CHECKED, Read, exact_logits, seconds
from rnn_longctx.models.checkpoint.save import save
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy

EVERY = 256  # tokens between two looks at a state, or two caps of it
SHAPE: dict[str, Any] = {"d_model": 1024, "n_layer": 24, "vocab_size": 32000, "mlp": 2.75, "tie_embeddings": True}
MIXERS = {  # 370M parameters with the shape above, by fla's proportions
    "gated-deltanet": "gated-deltanet:heads=6,head_dim=128,expand_v=2",
    "kda": "kda:heads=8,head_dim=128,expand_v=1",
}


class _Watch:
    every, whole = EVERY, False

    def __call__(self, statistics: Any) -> None:
        self.last = statistics


@bench("delta")
def bench_delta(
    *,
    lengths: Annotated[str, "Tokens of the prompts."] = "64k,1m",
    segment: Annotated[str, "Tokens read at once."] = "64k",
    mixers: Annotated[str, "Which of gated-deltanet and kda."] = "gated-deltanet,kda",
) -> Iterator[Row]:
    """Reading a prompt with models of 370M parameters of the delta rule on a GPU, here and in fla.

    Examples:
        rnn-longctx bench delta --lengths 64k --out runs/delta.csv
    """
    return delta_rows(parse_lengths(lengths), parse_length(segment), named(mixers))


def named(mixers: str) -> list[str]:
    """Return the names in "gated-deltanet,kda". Raises InputError for one that is not measured."""
    names = [name for name in mixers.split(",") if name]
    if unknown := [name for name in names if name not in MIXERS]:
        raise InputError(f"mixers: expected {' or '.join(MIXERS)}, got {unknown[0]!r}")
    return names


def model_of(name: str, device: str = "cuda", **changed: Any) -> LM:
    """Return a model of random weights, bfloat16 but for what fla keeps in float32. changed: fields of its config."""
    with torch.device(device):
        model = LM(ModelConfig(MIXERS[name], **SHAPE | changed)).bfloat16().eval()
    for mixer in model.mixers:
        mixer.A_log.data = mixer.A_log.data.float()
        mixer.dt_bias.data = mixer.dt_bias.data.float()
    return model


@torch.inference_mode()
def delta_rows(lengths: list[int], segment: int, names: list[str]) -> Iterator[Row]:
    """Yield a row a mixer, system and length: seconds to read a prompt of one row to its last token's logits."""
    if not torch.cuda.is_available():
        raise InputError("this benchmark needs a CUDA device")
    for name in names:
        model = model_of(name)
        ids = torch.randint(model.vocab_size, (1, max(lengths)), device="cuda")
        expected = exact_logits(model, ids[:, :CHECKED])
        caps = tuple(_caps(model, ids[:, :4096]))
        systems: dict[str, Callable[[], Read | None]] = {  # (a run that is cut off has the first ones)
            "plain": partial(_reader, model, segment),
            f"statistics every {EVERY}": partial(_reader, model, segment, watched=True),
            f"cap every {EVERY}": partial(_reader, model, segment, policies=caps),
            "fla, one call": partial(_fla, model),
        }
        for system, make in systems.items():
            read = make()
            if read is None:
                continue
            for length in lengths:
                capped = system.startswith("cap")
                if system.startswith("fla"):
                    _tuned(read, ids[:, :length])
                row = seconds(read, ids[:, :length], ids, expected)
                yield {"what": "prefill", "mixer": name, "length": length, "system": system, **row} | (
                    {"error": float("nan")} if capped else {}
                )
            del read
            torch.cuda.empty_cache()


def _caps(model: LM, ids: Tensor) -> Iterator[ScanPolicy]:
    """Return caps that half of the heads reach: each head's norm after a few tokens, or ten times that."""
    cache = model.new_cache()
    model(ids, cache)
    for i, mixer in enumerate(model.mixers):
        norms = mixer.scan_state(cache.layers[i]).float().flatten(2).norm(dim=-1)[0]
        halves = torch.arange(len(norms), device=norms.device) % 2 * 9.5 + 0.5
        yield ScanPolicy(caps=(Cap(tuple((norms * halves).tolist()), EVERY),))


def _reader(model: LM, segment: int, policies: tuple[ScanPolicy, ...] = (), watched: bool = False) -> Read:
    def read(ids: Tensor) -> Tensor:
        for i, mixer in enumerate(model.mixers):
            mixer.policy, mixer.observer = policies[i] if policies else PLAIN, _Watch() if watched else None
        try:
            for hidden in model.stream(ids, segment=segment):
                last = hidden[:, -1]
        finally:
            for mixer in model.mixers:
                mixer.policy, mixer.observer = PLAIN, None
        return model.logits(last)

    return read


def _tuned(read: Read, ids: Tensor) -> None:
    """Let kernels be tuned for this length, which they are anew beyond some."""
    with suppress(RuntimeError):  # which the measurement will say
        read(ids)


def _fla(model: LM) -> Read | None:
    theirs = fla_model(model)
    return None if theirs is None else lambda ids: theirs(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def fla_model(model: LM) -> Any:
    """Return the same model in fla, or None where that is not installed."""
    try:
        import fla.models  # noqa: F401
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, layout="fla")
        loader: Any = AutoModelForCausalLM
        theirs = loader.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    for layer in theirs.model.layers:
        layer.attn.A_log.data = layer.attn.A_log.data.float()
        layer.attn.dt_bias.data = layer.attn.dt_bias.data.float()
    return theirs
