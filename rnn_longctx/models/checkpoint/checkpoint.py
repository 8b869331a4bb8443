"""Checkpoints: `load` reads three layouts and `save` writes them (see `rnn_longctx.models.checkpoint.formats`).

Weights are memory-mapped and only copied where their dtype or device must change.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rnn_longctx.config import home_path, parse_length
from rnn_longctx.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from rnn_longctx.errors import InputError, nearest
from rnn_longctx.models.checkpoint import formats
from rnn_longctx.models.checkpoint.foreign import file_instead
from rnn_longctx.models.checkpoint.formats import check_layout, one_line
from rnn_longctx.models.lm import LM

BUNDLED = Path(str(files("rnn_longctx"))) / "checkpoints"
DEMOS = ("demo", "demo-long")  # as trained at 512 tokens, and continued at 16K so that it does not collapse
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
# Rounded to 16 bits these change the decays over thousands of tokens, so mamba-ssm keeps them in float32.
_SENSITIVE = ("A_log", "D", "dt_bias")
_FILES = ["config.json", "generation_config.json", "adapter_config.json", formats.SIDE, "calibration.json",
          "*tokenizer*", "special_tokens*", "vocab.json", "merges.txt"]  # fmt: skip
_SAFE = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


class LazyTokenizer:
    """A tokenizer that is loaded when first used: a model works where its tokenizer cannot be had, and the
    InputError that says so comes only when text must be read."""

    def __init__(self, spec: str | Path | None, model: str, size: int):
        self.spec, self.model, self.size = spec, model, size
        self._tokenizer: Tokenizer | None = None
        self._missing = spec is None  # whether it was looked for in vain

    def at_hand(self) -> Tokenizer | None:
        """The tokenizer, or None where it cannot be had, which is tried once and warned of."""
        try:
            return None if self._missing else self.load()
        except InputError as error:
            self._missing = True
            warnings.warn(f"generation of {self.model} knows neither its end of text nor which rows of its vocabulary "
                          f"stand for no token: {error}", RuntimeWarning, stacklevel=2)  # fmt: skip
            return None

    def load(self) -> Tokenizer:
        if self.spec is None:
            raise InputError(
                f"model {self.model} comes with no tokenizer; name one with --tokenizer (tokenizer= of load or adopt "
                "in Python): a directory, a hub id, bytes"
            )
        if self._tokenizer is None:
            try:
                self._tokenizer = _fits(load_tokenizer(self.spec), self.size)
            except InputError as error:
                raise InputError(f"{error}; name another with --tokenizer (tokenizer= in Python)") from None
        return self._tokenizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for these
            raise AttributeError(name)
        return getattr(self.load(), name)


def tokenizer_of(source: str | Path) -> str | Path | None:
    """Where the tokenizer of a model lies that transformers read from `source`: that folder, if it holds one, or a hub
    id; None where there is none to be seen."""
    folder = home_path(source)
    if folder.is_dir():
        return (
            folder if any((folder / f"{file}.json").is_file() for file in ("tokenizer", "tokenizer_config")) else None
        )
    return str(source) if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)) else None


def load(source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None,
         tokenizer: str | None = None, train_length: int | str | None = None) -> LM:  # fmt: skip
    """A model in eval mode from a directory, a Hugging Face hub id, or "demo" or "demo-long", which come with the
    package.

    Args:
        dtype: of the weights; None is float32. A_log, D and dt_bias stay float32 in a 16-bit model.
        tokenizer: instead of the checkpoint's own: a directory, a hub id or "bytes".
        train_length: tokens (2048, "2k"), where the checkpoint does not say or is wrong.
    Returns:
        The model, with name, train_length, tokenizer, provenance and calibration.
    Raises:
        InputError: no such checkpoint, an unsupported one, one that is damaged or does not fit its config, or
            weights that are not finite. An unreachable tokenizer raises when it is used, unless named here.
    """
    target, device = _dtype(dtype), _device(device)
    given = None if train_length is None else parse_length(train_length, "train_length")
    directory, name, provenance = locate(source)
    header = formats.read_header(directory)
    with torch.device("meta"):
        model = LM(header.config)
    stored = _fitting(formats.read_weights(directory), model, str(source))
    check_finite(stored, str(source))

    state = {k: t.to(device, _kept(k, target)) for k, t in stored.items()}
    model.load_state_dict(state, assign=True, strict=False)
    if header.config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight

    model.name = name
    model.train_length = given or header.train_length
    model.provenance = header.provenance or provenance
    model.calibration = header.calibration
    model.eos_token_id = header.eos_token_id
    spec = tokenizer or header.tokenizer
    # One that was asked for by name must be there; any other may be missing until it is used.
    eager = tokenizer is not None or spec == "bytes"
    size = header.config.vocab_size
    model.tokenizer = _fits(load_tokenizer(spec), size) if eager and spec else LazyTokenizer(spec, name, size)
    return model.eval()


def save(model: LM, directory: str | Path, *, dtype: torch.dtype | str | None = None,
         provenance: dict[str, Any] | None = None, layout: str = "rnn-longctx",
         calibration: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Write weights and config.json. In a new directory a reader finds the checkpoint whole or not at all; over an
    older one, of whichever layout, files are replaced one by one, config.json last.

    Args:
        dtype: of the weights; None keeps theirs. A_log, D and dt_bias are at least float32 in a 16-bit file.
        provenance: recorded beside the shape; None: the model's own.
        layout: "rnn-longctx"; "transformers", for its AutoModelForCausalLM; or "state-spaces", for mamba-ssm's
            MambaLMHeadModel: with pytorch_model.bin, and what config.json has no place for in rnn_longctx.json.
        calibration: goes beside the weights; None: none, since it belongs to the weights it was made with.
    Raises:
        InputError: an unknown layout or dtype, a model that the layout cannot hold, or a directory that cannot be
            written.
    """
    if not isinstance(model, LM):
        raise InputError(f"{getattr(model, 'name', type(model).__name__)} is no model of this library's own: "
                         "a model of another library has its save_pretrained")  # fmt: skip
    check_layout(model.config, layout)
    target = model.dtype if dtype is None else _dtype(dtype)
    state = stored_state(model, target)
    extra: dict[str, Any] = {
        "tokenizer": _tokenizer_spec(model),
        "train_length": model.train_length,
        "provenance": model.provenance if provenance is None else provenance,
    }
    if model.eos_token_id is not None:
        extra["eos_token_id"] = model.eos_token_id
    if layout == "rnn-longctx":
        config = formats.own_config(model.config, extra)
    elif layout == "transformers":
        state["backbone.embeddings.weight"] = state.pop("backbone.embedding.weight")
        config = formats.transformers_config(model.config, target, extra)
    else:
        state.setdefault("lm_head.weight", state["backbone.embedding.weight"])  # it asks for a tied one too
        config = formats.official_config(model.config)

    directory = home_path(directory).absolute()
    aside = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write_tokenizer(model, aside)
        (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if calibration is not None:
            _write_json(aside / "calibration.json", calibration, indent=None)
        if layout == "state-spaces":
            _write_json(aside / formats.SIDE, extra)
            torch.save(state, aside / "pytorch_model.bin")
        else:
            save_file(state, aside / "model.safetensors", {"format": "pt"})
        for file in aside.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        _put(aside, directory)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save wraps the first in the second
        raise InputError(f"cannot write the checkpoint {directory}: {one_line(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def stored_state(model: LM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as a file of that dtype holds them, on the CPU, a tied one once."""
    state = {k: t.detach().to("cpu", _kept(k, dtype)).contiguous() for k, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def _fits(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """The tokenizer, or InputError where it has ids that a vocabulary of `size` has not (a padded one has more)."""
    if tokenizer.vocab_size > size:
        raise InputError(f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's vocabulary {size}")
    return tokenizer


def check_finite(tensors: dict[str, Tensor], source: str) -> None:
    """Raise InputError if one holds NaN or infinity. Mapped weights are read in place, several tensors at a time."""

    def finite(name: str) -> bool:
        tensor = tensors[name].detach()
        return not tensor.numel() or all(bool(v.isfinite()) for v in tensor.aminmax())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, fine in zip(tensors, pool.map(finite, tensors)):
            if not fine:
                raise InputError(f"{source}: {name} is not finite: it holds NaN or infinity")


def _fitting(stored: dict[str, Tensor], model: LM, source: str) -> dict[str, Tensor]:
    """The tensors that `model` asks for, each once. Raises InputError for any that does not fit."""
    expected = {k: v.shape for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        head, embedding = stored.get("lm_head.weight"), stored.get("backbone.embedding.weight")
        if head is not None and embedding is not None:
            if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
                raise InputError(f"{source}: config.json ties lm_head.weight to the embedding, but they differ")
            stored = {k: v for k, v in stored.items() if k != "lm_head.weight"}
        del expected["lm_head.weight"]
    missing, unexpected = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    problems = [f"{what} {_some(n)}" for what, n in (("missing", missing), ("unexpected", unexpected)) if n]
    if problems:
        raise InputError(f"{source}: the weights do not fit config.json: {'; '.join(problems)}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            shapes = f"{tuple(tensor.shape)}, config.json expects {tuple(expected[name])}"
            raise InputError(f"{source}: {name} has shape {shapes}")
        if tensor.dtype not in DTYPES.values():
            kind = f"{str(tensor.dtype)[6:]}, expected one of {', '.join(DTYPES)}"
            raise InputError(f"{source}: {name} is {kind}")
    return stored


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def locate(source: str | Path) -> tuple[Path, str, dict[str, Any]]:
    """Where a checkpoint lies, its name (never a whole path) and where it came from."""
    if source in DEMOS:
        if not (BUNDLED / source).is_dir():
            raise InputError(f"this installation of rnn-longctx comes without its {source} checkpoint")
        return BUNDLED / source, str(source), {}
    if not isinstance(source, str | Path):
        raise InputError(f'expected "demo", a directory or a hub id, got {type(source).__name__}')
    path = home_path(source)
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{source} is an empty directory; expected config.json and weights")
        return path, path.resolve().name, {}
    if path.exists():
        expected = "is a file; expected a checkpoint directory, such as the one it lies in"
        raise InputError(f"{source} {file_instead(path) or expected}")
    close = difflib.get_close_matches(str(source), DEMOS, n=1, cutoff=0.7)
    near = f'; did you mean "{close[0]}"?' if close else ""
    neither = f"{str(source)!r} is neither a directory nor a hub id that can be reached{near}"
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise InputError(neither)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(source, allow_patterns=_FILES + _SAFE))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(source, allow_patterns=_FILES + _PICKLED))
    except Exception as error:  # the hub client raises many kinds, its transport more
        raise InputError(f"{neither} ({one_line(error)})") from None
    return path, source, {"source": source, "revision": path.name}


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"unknown dtype {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name]


def _kept(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if name.rpartition(".")[2] in _SENSITIVE else dtype


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} is not available here: {one_line(error)}") from None


def _tokenizer_spec(model: LM) -> str | None:
    """What config.json says: a name that loads anywhere, or None where files lie beside the weights."""
    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return "bytes"
    spec = tokenizer.spec if isinstance(tokenizer, LazyTokenizer) else None
    return spec if isinstance(spec, str) and not home_path(spec).exists() else None


def _write_tokenizer(model: LM, directory: Path) -> None:
    tokenizer: Any = model.tokenizer
    if isinstance(tokenizer, LazyTokenizer) and _tokenizer_spec(model) is None:
        with contextlib.suppress(InputError):  # a model without a tokenizer is saved without one
            tokenizer = tokenizer.load()
    if not isinstance(tokenizer, HFTokenizer):
        return
    fast = tokenizer._fast
    fast.save(str(directory / "tokenizer.json"))
    eos = None if tokenizer.eos_id is None else fast.id_to_token(tokenizer.eos_id)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    theirs = tokenizer.transformers()
    for name in ("bos_token", "unk_token", "chat_template"):  # what prompts are made of
        if value := getattr(theirs, name, None):
            settings[name] = value
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, data: dict[str, Any], indent: int | None = 1) -> None:
    path.write_text(json.dumps(formats.plain(data), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def _put(aside: Path, directory: Path) -> None:
    """Finished files to their place: one rename if nothing is there, else file by file, config.json last."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        os.replace(aside, directory)
        return
    (directory / "calibration.json").unlink(missing_ok=True)  # it belongs to the weights that go
    *files, config = sorted(aside.iterdir(), key=lambda f: f.name == "config.json")
    for file in files:
        os.replace(file, directory / file.name)
    for name in (formats.SIDE, *formats.WEIGHTS, *(f"{w}.index.json" for w in formats.WEIGHTS)):
        if name not in {file.name for file in files}:  # of another layout, whose weights would be read first
            (directory / name).unlink(missing_ok=True)
    os.replace(config, directory / config.name)
