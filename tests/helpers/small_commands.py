"""The commands of the pages, made small: what stands for a person's model, text and files is tiny, and what says how
much is read, asked or trained says little. The rules are these tables: nothing else of a command is changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from decoders import decoder
from evaluated import make_model
from pages import ROOT
from report_folders import eval_folder

from rnn_longctx.data import ByteTokenizer
from rnn_longctx.models import checkpoint
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.sensors.plants import Plant, make_plant

# ---- words of a command line

# Names of models, and what stands for a file or folder of one's own.
NAMES = {
    **dict.fromkeys(["MODEL", "demo", "demo-long", "RUN", "DIR", "runs/mine/model", "runs/train/mine/model"], "tiny"),
    "FILE": "text.py",
    "stdlib": "text.py",
    "FOLDER_OR_FILE": "runs/before",
    "FILE.html": "page.html",
}
# Models of other commands: those that show links, and those with full attention.
OTHERS = {"explain": {"MODEL": "sparse"}, "yarn": {"RUN": "attention"}, "plot": {"DIR": "runs/before"},
          "retrofit": {"DIR": "decoder"}, "capacity advise": {"runs/study": "benchmarks/results/capacity"}}  # fmt: skip
# Options whose value says how much.
OPTIONS: dict[str, str | Callable[[str], str]] = {
    "--lengths": lambda value: ",".join(str(128 << i) for i in range(min(3, len(value.split(","))))),
    "--stages": "64,128", "--gaps": "64,128", "--length": "256", "--limit": "256", "--target": "256",
    "--train-length": "64", "--slices": "2", "--n": "2", "--at": "100", "--jobs": "1",
    "--parallel": "1", "--device": "cpu", "--repeats": "1",
}  # fmt: skip
# Parameters of a task that say how much.
COUNTS = {"slices": "1", "n": "2", "max": "512", "tokens": "1"}
VOCABULARY = {"pairs": "4", "vocab_size": "64"}  # of a task that the tiny model, which reads bytes, is asked
# Tasks that say nothing of how much, in an evaluation.
TASKS = {"lm": "lm:slices=1,tokens=0", "passkey": "passkey:n=2"}
# What else a command has to be given to take seconds; and what cannot be had without a network.
MORE = {
    "eval": ["--lengths", "128,256", "--task", "lm:slices=1,tokens=0"], "pilot": ["--lengths", "64,128"],
    "probe": ["--every", "32"], "capacity": ["--slices", "1", "--width", "0.4"],
    "retrofit": ["--steps", "2", "--batch", "256", "--tokenizer", "bytes"], "sensors make": ["--rows", "5000"],
    "sensors fit": ["--schedule", "64:4"], "bench cpu": ["--length", "256", "--repeats", "1", "--batch", "1"],
    "bench delta-cpu": ["--length", "128", "--repeats", "1"], "generate": ["--max-new-tokens", "4"],
}  # fmt: skip
HUB = ("niah_single_1", "lambada_openai")  # tasks of lm-eval, whose texts come from a hub

# ---- keys of a config, and of --set

VALUES: dict[str, Any] = {
    "init": "tiny", "model": "tiny", "steps": 2, "warmup": 1, "batch_size": 2, "batch": 8, "train_length": 128,
    "segment": 64, "every": 32, "slices": 1, "passkeys": 2, "samples": 2, "seeds": 1, "n_layer": 1, "parallel": 1,
    "poll": 0.05, "width": 0.4, "limit": 512, "fit_from": 128, "held_out": 0.1, "device": "cpu", "amp": False,
    "length": 256, "text": "text.py", "source": "builtin", "checkpoint_every": 2, "mask_first": False,
}  # fmt: skip
LISTS: dict[str, list[Any]] = {
    "learning_rates": [1e-3], "train_lengths": [256], "forget": [], "pairs": [4], "texts": ["text.py"],
    "text": ["text.py"],
}  # fmt: skip
TRAINED, MEASURED = [120, 128], [128, 256]  # lengths of what is mixed into a training, and of what is measured
ATTENTION = "full-attention:heads=2"
FEW = {"entries": 1, "names": 1, "shapes": 1, "tasks": 2, "mitigations": 2}  # that are left of a config's


def small(words: list[str]) -> list[str]:
    """Return the arguments of a command, made small."""
    line, words = [], list(words)
    twofold = words[0] in ("sensors", "bench") or words[1:2] in (["train"], ["plot"], ["advise"])
    command, option = " ".join(words[: 1 + twofold]), ""
    names = NAMES | OTHERS.get("yarn" if "yarn" in words else command, {})
    while command == "compare" and "--only" in words:  # one entry is left of a comparison
        at = words.index("--only")
        del words[at : at + 2]
    for word in words:
        if option in OPTIONS and not word.startswith("--"):
            rule = OPTIONS[option]
            word = rule if isinstance(rule, str) else rule(word)
        elif option == "--task":
            usual = TASKS.get(word) if command == "eval" else None
            word = usual or _counted(word, COUNTS | VOCABULARY)
        elif option == "--tasks":
            word = ",".join(name for name in word.split(",") if name not in HUB)
        elif "=" in word and re.match(r"[\w.]+=", word) and command == "train":
            word = _setting(word)
        else:
            word = names.get(word, word)
        option = word if word.startswith("--") else option if option == "--set" else ""
        line.append(word)
    if "--config" in line:
        return line
    given = [more for more in zip(MORE.get(command, [])[::2], MORE.get(command, [])[1::2]) if more[0] not in line]
    return [*line, *(word for more in given for word in more)]


def _counted(task: str, counts: dict[str, str]) -> str:
    parts = []
    for part in task.split(","):
        head, _, value = part.rpartition("=")
        name = head.rpartition(":")[2]
        zero = name == "tokens" and value == "0"
        parts.append(f"{head}={counts[name]}" if name in counts and not zero else part)
    return ",".join(parts)


def _setting(word: str) -> str:
    key, _, value = word.partition("=")
    name = key.rpartition(".")[2]
    if key == "data" or name == "text":
        return f"{key}=[text.py]" if value.startswith("[") else f"{key}=text.py"
    return f"{key}={VALUES[name]}" if name in VALUES else word


def shrunk(value: Any, key: str = "", trains: bool = False) -> Any:
    """Return what a config says, made small. trains: it stands under `data`, where lengths are those of a training."""
    if key == "lengths" and isinstance(value, list):
        return TRAINED if trains else MEASURED
    if isinstance(value, dict):
        return {k: shrunk(v, k, trains or key == "data") for k, v in value.items()}
    if isinstance(value, list):
        if trains and key == "text":
            return ["builtin"]
        if key in LISTS:
            return LISTS[key]
        if key == "mix":
            value = [one for one in value if not one["task"].startswith("multikey")]  # takes 328 tokens at least
        if key in FEW:
            value = [one for one in value if one != "all"][: FEW[key]]
        return [shrunk(one, key, trains) for one in value]
    if key in ("tasks", "task") and isinstance(value, str):
        return _counted(value, COUNTS)
    if key == "train_length" and ":" in str(value):
        return "120:1,128:1"
    if key == "d_model" and value > 256:
        return 64
    if key == "tokens" and isinstance(value, str | int) and value != 0:
        return 3000 if str(value).endswith("k") else 2
    return VALUES[key] if key in VALUES and value is not None else value


# ---- a folder to run them in


def prepare(folder: Path) -> None:
    """Write what the pages take for granted: models, documents, results, and the configs of the repository, small."""
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("*.xz", "*.png"))
    for path in (ROOT / "configs").rglob("*.yaml"):
        to = folder / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(yaml.safe_dump(shrunk(yaml.safe_load(path.read_text()))))
    checkpoint.save(make_model(), folder / "tiny", dtype=torch.float32)
    for name, mixer in (("sparse", "block-sparse:heads=2,block=8,window=16,sinks=1,top=2"), ("attention", ATTENTION)):
        lm = LM(ModelConfig(mixer=mixer, d_model=32, n_layer=2)).eval()
        lm.train_length, lm.tokenizer, lm.name = 128, ByteTokenizer(), name
        checkpoint.save(lm, folder / name, dtype=torch.float32)
    decoder("qwen3").float().save_pretrained(folder / "decoder")
    eval_folder(folder / "runs" / "before")
    eval_folder(folder / "runs" / "after", remedy="rri:alpha=0.99,beta=1")
    (folder / "runs" / "leaderboard" / "prose").mkdir(parents=True)
    board = folder / "benchmarks" / "results" / "leaderboard.csv"
    shutil.copy(board, folder / "runs" / "leaderboard" / "prose")
    plant = make_plant(Plant(5000, 100, every=100))
    plant.log.to_parquet(folder / "other.parquet", index=False)
    plant.events.to_csv(folder / "other.csv", index=False)
    rng = np.random.default_rng()
    text = "\n".join(f"def {''.join(rng.choice(list('abcdefgh'), 6))}(x):\n    return x + {i}\n" for i in range(400))
    for name in ("text.py", "train.txt", "doc.txt", "my_documents/a.txt", "my_documents/b.txt", "texts/a.txt",
                 "texts/prose-eval/a.txt", "texts/prose-train/a.txt", "texts/logs/a.log", "incoming/a.txt",
                 "docs/results/README"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "incoming" / "STOP").touch()
    question = {"document": "It rained.", "question": "Did it?", "answer": "Yes"}
    (folder / "questions.jsonl").write_text((json.dumps(question) + "\n") * 2)
    rows = [{"text": "good " * 9, "label": 1}, {"text": "bad " * 9, "label": 0}]
    pd.DataFrame(rows).to_csv(folder / "texts" / "reviews_test.csv", index=False)
