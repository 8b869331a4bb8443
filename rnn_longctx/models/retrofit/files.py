"""A retrofitted decoder on disk: what transformers writes of it, and beside that what is in the place of what, and the
new weights.

    config.json, model.safetensors, ...   the decoder's own, which transformers alone reads as full attention
    retrofit.json                         the plan, the tokenizer's name, the training length, where it came from
    retrofit.safetensors                  the weights of the parts
    ...                                   tables of whoever trained it, if there are some
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rnn_longctx.config import counted, home_path, parse_length
from rnn_longctx.data.tokenizers import load_tokenizer
from rnn_longctx.devices import device_of, dtype_of
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import to_disk
from rnn_longctx.models.adopt.library import library_model
from rnn_longctx.models.checkpoint.json_files import read_json, write_json
from rnn_longctx.models.checkpoint.locate import locate
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer, fits, tokenizer_of, tokenizer_spec, write_tokenizer

if TYPE_CHECKING:
    from rnn_longctx.models.retrofit.model import Retrofitted
    from rnn_longctx.models.retrofit.plan import Plan

PLAN, WEIGHTS = "retrofit.json", "retrofit.safetensors"
PARTS = ".self_attn.parts."  # in the names of what transformers does not know


def is_retrofitted(source: Any) -> bool:
    """Whether a source is a folder that `save_retrofitted` wrote."""
    return isinstance(source, str | Path) and (home_path(source) / PLAN).is_file()


def check_new(directory: str | Path) -> Path:
    """Return the path of a new folder, and make the folder that it will be in. Raises InputError where something is
    there already, or where no folder can be made: long training should not end so."""
    if not str(directory).strip():
        raise InputError(f"expected the name of a new folder, got {str(directory)!r}")
    path = Path(os.path.abspath(home_path(directory)))
    if os.path.lexists(path):
        raise InputError(f"{directory} exists already: name another folder, or move that one away")
    try:
        aside = _aside(path)
        aside.mkdir(parents=True)
        aside.rmdir()
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or one_line(error)}") from None
    return path


def _aside(path: Path) -> Path:
    """Return the name of a folder beside another, which is to take that one's place."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def save_retrofitted(
    model: Retrofitted,
    plan: Plan,
    directory: str | Path,
    provenance: dict[str, Any] | None = None,
    tables: Mapping[str, bytes] | None = None,
) -> None:
    """Write a retrofitted decoder into a new folder, which is there whole or not at all.

    Args:
        tables: what other files there are to hold, by their names.
    Raises:
        InputError: the folder exists, or it cannot be written.
    """
    path = check_new(directory)
    aside = _aside(path)
    state = {name: t.detach().contiguous() for name, t in model.model.state_dict().items()}
    own = {name: t for name, t in state.items() if PARTS not in name}
    new = {name: t.cpu() for name, t in state.items() if PARTS in name}
    about = {
        "format": "rnn-longctx-retrofit",
        "layers": plan.to_json(),
        "tokenizer": tokenizer_spec(model),  # type: ignore[arg-type]
        "train_length": model.train_length,
        "provenance": model.provenance if provenance is None else provenance,
    }
    try:
        aside.mkdir()
        model.model.save_pretrained(aside, state_dict=own)
        write_tokenizer(model, aside)  # type: ignore[arg-type]
        save_file(new, aside / WEIGHTS, {"format": "pt"})
        write_json(aside / PLAN, about)
        for name, data in (tables or {}).items():
            (aside / name).write_bytes(data)
        for file in aside.iterdir():
            to_disk(file)
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot write {directory}: {one_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_retrofitted(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | None = None,
    train_length: int | str | None = None,
) -> Retrofitted:
    """Return a decoder of transformers as a stream, in eval mode: a retrofitted one from the folder that
    `save_retrofitted` wrote, or one as it is, all of whose attention is its own. Arguments as of `rnn_longctx.load`.

    Raises:
        InputError: it is damaged, its weights do not fit its plan or are not finite, or it has no tokenizer and none is
            given.
    """
    # (here, since what is adopted takes torch.compile's machinery, which takes seconds to import)
    from rnn_longctx.models.retrofit.model import Retrofitted
    from rnn_longctx.models.retrofit.plan import Plan, check_kind, convert

    length = None if train_length is None else parse_length(train_length, "train_length")
    directory, name, provenance = locate(source)
    about = read_json(directory / PLAN) if (directory / PLAN).is_file() else {}
    spec: Any = tokenizer or about.get("tokenizer") or tokenizer_of(directory)
    where = device_of(device)
    config = directory / "config.json"
    check_kind(read_json(config).get("model_type") if config.is_file() else None, name)
    model = library_model(directory, name, dtype_of("float32" if dtype is None else dtype))
    if about:
        plan = Plan.from_json(about.get("layers"), str(directory / PLAN))
        convert(model, plan)
        _read_parts(model, directory / WEIGHTS)
    lm = Retrofitted(model.to(where).eval())
    size = lm.vocab_size
    lm.tokenizer = fits(load_tokenizer(spec), size) if spec else LazyTokenizer(None, name, size)
    lm.name, lm.train_length = name, length or about.get("train_length")
    lm.provenance = about.get("provenance") or provenance
    return lm


def _read_parts(model: Any, file: Path) -> None:
    """Read the weights of the parts. Raises InputError where they do not fit."""
    expected = {name: t for name, t in model.state_dict().items() if PARTS in name}
    try:
        stored = load_file(file) if expected or file.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: {one_line(error)}") from None
    if lacking := sorted(expected.keys() ^ stored.keys()):
        raise InputError(f"{file} does not fit {PLAN}: {counted(len(lacking), 'weight')}, {lacking[0]} among them")
    for name, t in stored.items():
        if t.shape != expected[name].shape:
            raise InputError(f"{file}: {name} has shape {tuple(t.shape)}, expected {tuple(expected[name].shape)}")
        if not bool(t.isfinite().all()):
            raise InputError(f"{file}: {name} is not finite: it holds NaN or infinity")
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in stored.items()}, strict=False)
