"""Models of other libraries behind this library's interface: `adopt(model)`.

    model = AutoModelForCausalLM.from_pretrained(...)
    with rnn_longctx.mitigate(model, "rri:alpha=0.999,beta=0.75"):  # adopts it
        model.generate(...)
    rnn_longctx.evaluate(rnn_longctx.adopt(model, tokenizer=tokenizer, train_length=2048), ...)

The model stays as it is: its mixers, norms, masks and attention are its own. Where a policy is active, a mixer's scan
and step are ours. docs/develop/adoption.md draws how; a family of mixers is one file in
`rnn_longctx.models.adopt.families`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rnn_longctx.config import parse_length
from rnn_longctx.devices import device_of, dtype_of
from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.family import adopted_by_family
from rnn_longctx.models.adopt.library import library_model
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.adopt.stepped import SteppedAdopted
from rnn_longctx.models.adopt.wrapped import innermost, unwrapped
from rnn_longctx.models.checkpoint import fla
from rnn_longctx.models.checkpoint.json_files import read_json
from rnn_longctx.models.checkpoint.layouts import ADOPTED, DECODERS, NOT_ADOPTED
from rnn_longctx.models.checkpoint.load import load
from rnn_longctx.models.checkpoint.locate import locate
from rnn_longctx.models.checkpoint.tokenizer import fits, tokenizer_of
from rnn_longctx.models.hashing import Identified
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.retrofit.files import is_retrofitted, load_retrofitted

_KEY = "_rnn_longctx_adopted"


def adopt(
    model: nn.Module | Adopted,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    train_length: int | str | None = None,
    time_step_limit_in_decode: bool = False,
) -> Adopted:
    """Put a model of another library behind the interface that remedies, probes and evaluation use.

    Families: those of transformers with Mamba-2 mixers (Mamba2, Bamba, FalconH1, GraniteMoeHybrid, NemotronH, Zamba2),
    with Mamba-1's (Mamba, FalconMamba, Jamba), each of whose channels is a head, and with a delta rule's: Gated
    DeltaNet's (Qwen3Next, Qwen3.5, OlmoHybrid, LaraMini) and KDA's (KimiLinear, BailingHybrid, Glm5Next), or with
    lightning attention (MiniMax) or the RG-LRU (RecurrentGemma); and those of mamba_ssm with its Mamba2 or Mamba2Simple
    mixers (`rnn_longctx.models.adopt.families.mamba_ssm`).
    Adopting a model again returns the same object, with what is newly given filled in. A wrapper that only passes
    everything on is adopted as the model inside it (`rnn_longctx.models.adopt.wrapped`).

    Args:
        name: for results; None takes the one in its config.
        tokenizer: ours, a fast one of transformers, or its name: bytes, a directory, a hub id. None: the one beside it.
        train_length: tokens a context had in training (2048, "2k"), which its config does not say.
        time_step_limit_in_decode: let single-token steps respect the limits of dt. The library does not, so that a
            cached token and the same token in a prompt differ where the limits bite. Our step runs then.
    Raises:
        InputError: no model, no such mixer in it, one of this library's own, a wrapper that does more than pass
            everything on, or a transformers older than 5.15.
    """
    length = None if train_length is None else parse_length(train_length, "train_length")
    inside: Any = innermost(model)
    if not isinstance(inside, Adopted) and isinstance(inside, Identified):
        raise InputError(f"{inside.name} is this library's own and needs no adopting: give these to rnn_longctx.load")
    if not isinstance(model, Adopted | nn.Module):
        what = f"the name {model!r}" if isinstance(model, str) else f"{type(model).__name__} {model!r:.40}"
        helps = 'load one first, as in rnn_longctx.load("demo")'
        if isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, a Trainer
            helps = "give the model inside it, its .model"
        raise InputError(f"expected a model, got {what}: {helps}")
    if isinstance(model, Adopted):
        lm = model
    else:
        library_model = unwrapped(model)
        lm = adopted(library_model) or adopted_by_family(library_model)
    lm.model.__dict__[_KEY] = lm
    lm.name = name or lm.name
    lm.train_length = length or lm.train_length
    if tokenizer is not None:
        lm.tokenizer = _tokenizer(tokenizer)
    if time_step_limit_in_decode:
        for mixer in lm.mixers:
            if isinstance(mixer, SteppedAdopted):
                mixer.limit_in_decode = True
                mixer.sync()
    return lm


def load_adopted(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | None = None,
    train_length: int | str | None = None,
) -> Adopted | None:
    """Return a checkpoint that transformers reads and this library adopts, from a directory or a hub id; None where it
    is of no such family. Arguments as of `rnn_longctx.load`.

    Raises:
        InputError: it is of a family that is known and not adopted, names no tokenizer and none is given, the tokenizer
            has more tokens than the model, transformers cannot read it, or weights are missing, do not fit its config
            or are not finite.
    """
    from rnn_longctx.data import load_tokenizer

    directory, name, _ = locate(source)
    config = directory / "config.json"
    data = read_json(config) if config.is_file() else {}
    if data.get("model_type") in DECODERS:
        return load_retrofitted(source, device=device, dtype=dtype, tokenizer=tokenizer, train_length=train_length)
    if reason := NOT_ADOPTED.get(str(data.get("model_type"))):
        raise InputError(f"{name} ({data['model_type']}) is not adopted: {reason}")
    if data.get("model_type") not in ADOPTED or fla.type_of(data) is not None:
        return None
    spec: Any = tokenizer or tokenizer_of(directory)
    if spec is None:
        raise InputError(f"{name} comes without a tokenizer: name one with --tokenizer (bytes: one token a byte)")
    device, weights_dtype = device_of(device), dtype_of("float32" if dtype is None else dtype)
    loaded_tokenizer = load_tokenizer(spec)
    model = library_model(directory, name, weights_dtype).to(device)
    fits(loaded_tokenizer, model.config.get_text_config().vocab_size)
    return adopt(model.eval(), name=name, tokenizer=loaded_tokenizer, train_length=train_length)


def load_any(source: str | Path, **options: Any) -> LanguageModel:
    """Return what `rnn_longctx.load` reads, or else `load_adopted`; arguments and errors are theirs."""
    if is_retrofitted(source):
        return load_retrofitted(source, **options)
    try:
        return load(source, **options)
    except InputError:
        if (model := load_adopted(source, **options)) is None:
            raise
        return model


def adopted(model: Any) -> Adopted | None:
    """Return what `adopt` made of a model, or of the one inside a wrapper, or None if it has not been adopted."""
    inner = innermost(model)
    known = getattr(inner, "__dict__", {}).get(_KEY)
    return known if known is not None and known.model is inner else None


def as_language_model(model: Any) -> LanguageModel:
    """Return a model as this library reads it: its own as it is, also from inside a wrapper (see `adopt`), one of
    another library adopted. InputError: see `adopt`."""
    inner: Any = unwrapped(model) if isinstance(model, nn.Module) else model
    is_one = isinstance(inner, Identified)
    return inner if is_one else adopt(model)


def _tokenizer(tokenizer: Any) -> Any:
    if isinstance(tokenizer, str | Path):
        from rnn_longctx.data import load_tokenizer

        return load_tokenizer(tokenizer)
    from rnn_longctx.data.tokenizers import HFTokenizer

    return tokenizer if hasattr(tokenizer, "encode_with_bytes") else HFTokenizer(tokenizer)
