"""What a folder or file that is no checkpoint of a known layout holds instead, and the line that makes one of it."""

from __future__ import annotations

import json
from pathlib import Path

_CONFIG = "and the model's config.json goes beside it"
_SHAPE = "weights without a config.json, which says their shape"
# How a file is called, what it is, and the line that helps.
_FILES = [
    ("adapter_config.json", "a PEFT adapter{base} without its model",
     "python -c \"import peft; peft.AutoPeftModelForCausalLM.from_pretrained('{folder}').merge_and_unload()"
     ".save_pretrained('OUT')\" writes one model of both; --tokenizer names a tokenizer that lies here"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint",
     f"python {{file}} {{folder}} pytorch_model.bin makes weights of it, {_CONFIG}"),
    ("*_optim_states.pt", "a part of a DeepSpeed checkpoint", "its zero_to_fp32.py makes weights of all parts"),
    ("*.distcp", "a part of a distributed checkpoint of PyTorch (FSDP)",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} pytorch_model.bin joins all parts, "
     f"{_CONFIG}"),
    ("*.gguf", "a GGUF model",
     "python -c \"import transformers; transformers.AutoModelForCausalLM.from_pretrained('{folder}', "
     "gguf_file='{name}').save_pretrained('OUT')\" writes a checkpoint, where transformers knows the architecture"),
    ("*.onnx", "an ONNX export", "name the checkpoint that it was made from"),
    ("tf_model.h5", "a TensorFlow checkpoint",
     "transformers 4 reads it: AutoModelForCausalLM.from_pretrained('{folder}', from_tf=True).save_pretrained('OUT')"),
    ("flax_model.msgpack", "a Flax checkpoint",
     "transformers 4 reads it: "
     "AutoModelForCausalLM.from_pretrained('{folder}', from_flax=True).save_pretrained('OUT')"),
    ("*.ckpt.index", "a TensorFlow checkpoint", "transformers 4 has converters for some architectures"),
    ("*.ckpt", "a Lightning checkpoint",
     "python -c \"import torch; w = torch.load('{file}', map_location='cpu')['state_dict']; "
     "torch.save({{k.removeprefix('model.'): v for k, v in w.items()}}, 'pytorch_model.bin')\" takes its weights out, "
     f"{_CONFIG}"),
]  # fmt: skip
_LESS = [  # what these are is said where there is none of the above
    ("*.safetensors", _SHAPE, "copy it from the model that they are of"),
    ("optimizer.*", "an optimizer's state and no model", "name the folder with the weights"),
    ("*.pt*", "weights or a state of training without a config.json", "name the folder that holds both"),
    ("results.parquet", "results of an evaluation and no model", "rnn-longctx plot draws them"),
    ("tokenizer.json", "a tokenizer and no model", "it goes to --tokenizer"),
]


def held_instead(folder: Path) -> str | None:
    """Return what a folder holds that lacks a config.json, or weights beside it, in words that follow its name; None
    where nothing is known of what it holds."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    models = [p.name for p in inside if (p / "config.json").is_file()]
    for places, kinds in (([folder], _FILES), (inside, _FILES[:4]), ([folder], _LESS)):
        if kinds is _LESS and models:
            return f"holds no config.json, but folders that do: name one of {', '.join(models[:5])}"
        for pattern, what, helps in kinds:
            for file in (f for place in places for f in sorted(place.glob(pattern))):
                return f"holds {_sentence(file, what, helps)}"
    return None


def file_instead(file: Path) -> str | None:
    """Return what a file is that was named in the place of a folder, in words that follow its name, or None."""
    return next((f"is {_sentence(file, what, helps)}" for name, what, helps in _FILES if file.match(name)), None)


def _sentence(file: Path, what: str, helps: str) -> str:
    base = _base(file) if "{base}" in what else ""
    return f"{what.format(base=base)} ({file.name}): {helps.format(folder=file.parent, file=file, name=file.name)}"


def _base(adapter: Path) -> str:
    """Return " of MODEL", where an adapter's config names it."""
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return f" of {base}" if base else ""
