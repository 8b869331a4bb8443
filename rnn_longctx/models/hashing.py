"""What a model computes with: a digest of it, its tensors wherever they lie, and the type that they compute in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnn_longctx.devices import DTYPES
from rnn_longctx.errors import InputError
from rnn_longctx.models.patches import patches
from rnn_longctx.models.precision import computes_as
from rnn_longctx.spec import left_out

BLOCK = 2**16  # words of 64 bits under one pair of sums
AT_ONCE = 128  # blocks, where launches count (64 MiB, and twice as much in between); on a CPU one a thread

_MODULE = frozenset(vars(nn.Module()))  # what every module has: its parts, hooks and mode
# No part of the function: names, labels, versions, where things lie and how they were loaded, what only training or
# generation reads, what is a remedy's or stands in a result's key by itself.
_LABELS = frozenset((
    "name", "name_or_path", "_name_or_path", "_commit_hash", "architectures", "auto_map", "model_type",
    "transformers_version", "tokenizer_class", "problem_type", "id2label", "label2id", "task_specific_params",
    "rnn_longctx", "dtype", "torch_dtype", "_use_kernels", "_weight_conversions", "_is_hf_initialized",
    "_post_init_done", "_is_torch_compile", "hf_device_map", "_hf_device_map", "warnings_issued",
    "gradient_checkpointing", "use_cache", "return_dict", "output_hidden_states", "output_attentions",
    "_output_attentions", "generation_config", "train_length", "tokenizer", "eos_token_id", "provenance",
    "_calibration", "_measured", "_remedies", "restart", "reader", "reading_hook", "spread", "policy", "observer",
    "backend", "tap", "yarn",
    "state_dtype", "A_init", "A_log_uniform", "dt_init", "tie_embeddings",
))  # fmt: skip
_PREFIXES = ("_attn_implementation", "_experts_implementation")


class Identified:
    """A model that says what it is: this library's own, and one that was adopted.

    Attributes:
        name: what results call it.
        module: its weights.
        tied: whether `lm_head.weight` of the module is another of its tensors.
    """

    name: str
    module: Any

    @property
    def tied(self) -> bool:
        return False

    @property
    def weights_hash(self) -> str:
        """The `digest` of the model as it is now. It reads all weights: ask once for what belongs together."""
        return digest(self.module, *self.settings())

    def settings(self) -> list[str]:
        """Return what the model computes with that does not lie in its module."""
        return []

    @property
    def calibration(self) -> dict | None:
        """The calibration that was given to the model, as long as it computes what it did then; else None."""
        value, weights = vars(self).get("_calibration", (None, None))
        return value if value is not None and weights == self.weights_hash else None

    @calibration.setter
    def calibration(self, value: dict | None) -> None:
        vars(self)["_calibration"] = (value, None if value is None else self.weights_hash)

    def measured(self, what: str) -> dict[Any, Any]:
        """Return a memo of what was measured on the model as it is now; of its former selves nothing is kept. (The
        tokenizer and what it computes and keeps its states in, which a measurement hangs on too, are no part of the
        digest.)"""
        model: Any = self
        now: str = self.weights_hash
        memo: Any = vars(self).get("_measured")
        if memo is None or memo[0] != now:
            memo = vars(self)["_measured"] = (now, {})
        hangs_on = (getattr(model.tokenizer, "name", None), computes_as(model), model.state_dtype)
        return memo[1].setdefault((what, *hangs_on), {})


@torch.no_grad()
def digest(module: nn.Module, *more: str) -> str:
    """Return 16 hex digits that stand for the function which a module computes now: its tensors, wherever they lie, and
    the settings in its modules and config. `more`: settings that lie elsewhere.

    Tensors are the state_dict's, buffers that are no part of it, and plain attributes; a tied head of this library's
    counts once. They are hashed where they lie, as one row of 64-bit words: for every block of them the sums, modulo
    2^64, of word * w and of (word >> 32) * w' with fixed random w and w' (Carter and Wegman's multilinear hash: two
    blocks that differ have the same pair with a chance of 2^-33 at most), and a sha256 over names, types, shapes, sums
    and settings. Sums of integers are exact in any order, so that no device, thread count or layout enters.

    Raises InputError for a tensor that is neither there nor kept by accelerate.
    """
    tensors = sorted(_tensors(module).items())
    lines = [f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors] + sorted(_settings(module)) + sorted(more)
    hashed = hashlib.sha256("\n".join(lines).encode())
    hashed.update(_sums([_words(t) for _, t in tensors if t.numel()]))
    return hashed.hexdigest()[:16]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every tensor by its name; of one made of others (quantised weights) those."""
    tensors = {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    for path, m in module.named_modules():
        beside = {n: b for n, b in m._buffers.items() if b is not None}
        beside |= {n: v for n, v in vars(m).items() if isinstance(v, Tensor)}
        tensors |= {name: t for n, t in beside.items() if (name := f"{path}.{n}" if path else n) not in tensors}
    if isinstance(module, Identified) and module.tied:
        del tensors["lm_head.weight"]
    plain: dict[str, Tensor] = {}
    for name, t in tensors.items():
        plain |= _parts(name, offloaded(module, name) if t.is_meta else t)
    return plain


def _parts(name: str, t: Tensor) -> dict[str, Tensor]:
    if not hasattr(t, "__tensor_flatten__"):
        return {name: t}
    return {k: v for part in t.__tensor_flatten__()[0] for k, v in _parts(f"{name}.{part}", getattr(t, part)).items()}


def _words(t: Tensor) -> Tensor:
    """Return a tensor's bytes as (n) int64, in the order of its indices, with zeros up to a whole word."""
    data = t.detach().contiguous().view(-1).view(torch.uint8)
    if rest := len(data) % 8:
        data = F.pad(data, (0, 8 - rest))
    elif data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _sums(rows: list[Tensor]) -> bytes:
    """Return two sums a block of the words of the rows, on the devices where they lie: of every row's whole blocks,
    which need no copy, then of what is left of each, one after the other."""
    ends = [len(row) // BLOCK * BLOCK for row in rows]
    rows = [row[:end] for row, end in zip(rows, ends)] + [row[end:] for row, end in zip(rows, ends)]
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    room: dict[torch.device, Tensor] = {}
    for chunk in _chunks(rows):
        device = max(chunk, key=len).device
        words = chunk[0] if len(chunk) == 1 else torch.cat([part.to(device) for part in chunk])
        if rest := len(words) % BLOCK:
            words = F.pad(words, (0, BLOCK - rest))
        blocks, (low, high) = words.view(-1, BLOCK), _random(device)
        if device not in room or len(room[device]) < len(blocks):
            room[device] = torch.empty_like(blocks)
        products = room[device][: len(blocks)]
        sums[0].append(torch.mul(blocks, low, out=products).sum(1))
        torch.bitwise_right_shift(blocks, 32, out=products)
        sums[1].append(products.mul_(high).sum(1))
    every = [*sums[0], *sums[1]]
    return torch.cat([s.to(every[0].device) for s in every]).cpu().numpy().astype("<i8").tobytes() if every else b""


def _chunks(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield views of the rows in their order, whole blocks together but for the last."""
    chunk: list[Tensor] = []
    room = 0
    for row in rows:
        while len(row):
            if not chunk:
                room = BLOCK * (torch.get_num_threads() if row.device.type == "cpu" else AT_ONCE)
            chunk.append(row[:room])
            room, row = room - len(chunk[-1]), row[len(chunk[-1]) :]
            if not room:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


@lru_cache(maxsize=16)
def _random(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return twice (BLOCK) random int64, the same in every version of everything."""
    with torch.inference_mode(False):
        raw = bytearray(hashlib.shake_256(b"rnn-longctx").digest(2 * 8 * BLOCK))
        low, high = torch.frombuffer(raw, dtype=torch.int64).to(device).view(2, BLOCK)
        return low, high


def _settings(module: nn.Module) -> Iterator[str]:
    """Yield a line a module: its type, of its attributes and config what is plain and no label, and what was put around
    it (`rnn_longctx.models.patches`)."""
    configs: dict[int, str] = {}
    for path, m in module.named_modules():
        texts = []
        # what transformers notes on a whole model: plans to load it by, hooks that were installed
        notes = ("_",) if hasattr(type(m), "config_class") else _PREFIXES
        for name, value in vars(m).items():
            if name in _MODULE or name in _LABELS or name.startswith(notes):
                continue
            if _is_config(value):
                if id(value) not in configs:
                    configs[id(value)] = hashlib.sha256(_config(value).encode()).hexdigest()
                texts.append(f"{name}={configs[id(value)]}")
            elif (text := _plain(value)) is not None:
                texts.append(f"{name}={text}")
        kind = vars(type(m)).get("digested_as", type(m).__qualname__)
        yield " ".join([path, kind, *sorted(texts), *patches(m)])


def _is_config(value: Any) -> bool:
    """Return whether a value is a config of this library, of mamba_ssm or peft, or of transformers."""
    return (is_dataclass(value) and not isinstance(value, type)) or hasattr(type(value), "model_type")


def _config(config: Any) -> str:
    lines, silent = [], left_out(config) if is_dataclass(config) else ()
    for name, value in vars(config).items():
        if name in silent or name in _LABELS or name.startswith(_PREFIXES) or name.endswith("_token_id"):
            continue
        text = _config(value) if _is_config(value) else _plain(value)
        if text is not None:
            lines.append(f"{name}={text}")
    return "{" + ", ".join(sorted(lines)) + "}"


def _plain(value: Any) -> str | None:
    """Return one text for equal values (2 is 2.0, a list is a tuple); None for what is not plain."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    if isinstance(value, Mapping):
        items = [f"{k!r}: {text}" for k, v in value.items() if (text := _plain(v)) is not None]
        return "{" + ", ".join(sorted(items)) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        texts = [text for v in value if (text := _plain(v)) is not None]
        return "[" + ", ".join(sorted(texts) if isinstance(value, set | frozenset) else texts) + "]"
    return None


# --- weights that accelerate keeps elsewhere (device_map, cpu_offload, disk_offload), and brings in for a forward


def offloaded(module: nn.Module, name: str) -> Tensor:
    """Return a tensor by its name, from where accelerate keeps it. Raises InputError where it is nowhere."""
    path = name.split(".")
    for depth in range(len(path)):
        holder = module.get_submodule(".".join(path[: len(path) - 1 - depth]))
        for weights in _maps(holder):
            try:
                return weights[".".join(path[len(path) - 1 - depth :])]
            except KeyError:
                continue
    raise InputError(f"{name} of {type(module).__name__} is nowhere (device meta): load the model's weights first")


def held(module: nn.Module, name: str) -> Tensor:
    """Return a module's own parameter or buffer, wherever it lies."""
    t = getattr(module, name)
    return offloaded(module, name) if t.is_meta else t


def computed_on(module: nn.Module, t: Tensor) -> torch.device:
    """Return the device that a module's tensor is computed on."""
    if not t.is_meta:
        return t.device
    where = [h.execution_device for h in _hooks(module) if getattr(h, "execution_device", None) is not None]
    return torch.device(where[0]) if where else t.device


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return getattr(hook, "hooks", (hook,))


def _maps(module: nn.Module) -> list[Mapping[str, Tensor]]:
    return [h.weights_map for h in _hooks(module) if getattr(h, "weights_map", None) is not None]


def computes_in(weight: Any) -> torch.dtype | None:
    """Return the type of a weight, or None where that is how it is packed (bytes, 8-bit floats) or there is none."""
    dtype = getattr(weight, "dtype", None)
    return dtype if dtype in DTYPES.values() else None
