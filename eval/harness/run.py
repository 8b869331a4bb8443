"""lm-eval's tasks on this library's models, at chosen lengths and with remedies: one table, one JSON file.

A task that makes its data from metadata (`custom_dataset`: RULER's, this library's passkey) is run once a length; any
other is run once, as it is. What is drawn depends on the seed, the task and the length alone, so that models and
remedies of separate runs are asked the same. Out come OUT/lm_eval.json (lm-eval's own results, and what was said to
each document) and OUT/lm_eval.csv (the columns of COLUMNS).
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from rnn_longctx.config import format_length, parse_lengths
from rnn_longctx.devices import dtype_name
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.eval.harness.model import HarnessLM
from rnn_longctx.eval.harness.ruler import TooShort, draw_from, is_ruler, maker, restored
from rnn_longctx.eval.results import Results
from rnn_longctx.files import write_atomic
from rnn_longctx.mitigations import Remedy, active, mitigate, parse_remedy
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.precision import computes_as
from rnn_longctx.plain import csv_text

# tokens_read: of a prompt (before its answer), the mean over the prompts of a task, and their least and most
COLUMNS = (
    *("task", "length", "tokens_read", "tokens_read_min", "tokens_read_max", "metric", "value", "stderr", "n"),
    *("mitigation", "model", "weights_hash", "dtype", "state_dtype", "seed"),
)
WHOLE = ("length", "tokens_read_min", "tokens_read_max", "n")  # columns of whole numbers, some of them missing
NEAR = 0.95  # of a length: prompts that are shorter on average say nothing of it
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


@dataclass(frozen=True)
class HarnessConfig:
    """What is asked of a model, how much of it, and where the table goes.

    Attributes:
        tasks: names that lm-eval knows (tasks, groups, tags), this library's, or those of `include_path`.
        lengths: tokens, for tasks that make data of a given length. Remedies get it as their target length; for tasks
            of a fixed length they get the greatest.
        limit: the most documents of a task, at every length. None: all.
        include_path: a folder with more task files.
        data: a JSONL file, for the tasks that read one (rnn_longctx_qa, rnn_longctx_summary).
        out: a folder for lm_eval.json and lm_eval.csv. None: the table is returned alone.
        batch: the most rows of equal length side by side.
        max_length: the most tokens a request may read; longer ones are refused. None: no limit.
        add_bos_token: whether prompts begin with BOS; None: where the tokenizer begins with it.
        seed: of the data that tasks make of a length, and of sampling.
    """

    tasks: Sequence[str]
    lengths: Sequence[int | str] | str = "4k"
    mitigations: Sequence[str] = ("none",)
    limit: int | None = None
    include_path: str | None = None
    data: str | None = None
    out: str | None = None
    batch: int = 8
    max_length: int | None = None
    add_bos_token: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for what no model could be asked."""
        if not self.names or not self.remedies or not self.sizes:
            raise InputError("lm-eval needs at least one task and one mitigation")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit: expected at least 1 document, got {self.limit}")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"include-path: no folder at {self.include_path}")
        if self.data is not None and not Path(self.data).is_file():
            raise InputError(f"data: no file at {self.data}")

    @cached_property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.tasks))

    @cached_property
    def sizes(self) -> list[int]:
        """The lengths in tokens, in order."""
        return sorted(set(parse_lengths(self.lengths)))

    @cached_property
    def remedies(self) -> list[Remedy]:
        return list({str(remedy): remedy for remedy in map(parse_remedy, self.mitigations)}.values())


def lm_eval_table(model: Any, config: HarnessConfig, progress: bool = False) -> pd.DataFrame:
    """Run lm-eval's tasks; one row a task, length, metric and remedy, with the columns of COLUMNS.

    Args:
        model: this library's, or one of another library, which is adopted.
    Raises:
        InputError: unknown tasks (with the nearest names) or remedies, bad lengths, tasks whose data or packages are
            missing here (of a group they are named in a warning and left out; so is any that does not fit into one
            of the lengths), a request longer than `max_length`.
    """
    out = None if config.out is None else Results(config.out).directory  # an unwritable folder shows now
    harness = HarnessLM(
        model,
        max_length=config.max_length,
        batch_size=config.batch,
        add_bos_token=config.add_bos_token,
        seed=config.seed,
        progress=progress,
    )
    lm, weights = harness.model, harness.model.weights_hash
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(lm.tokenizer, Path(folder))
        for length, tasks, manager in _Tasks(config, harness, folder).by_length():
            for remedy in config.remedies:
                harness.tokens_read.clear()
                with mitigate(lm, remedy, target_length=length or config.sizes[-1]):
                    mitigation = active(lm, weights)[0]
                    results = _evaluate(harness, tasks, manager, config.limit)
                about = {"mitigation": mitigation, "weights_hash": weights} | _about(lm, config.seed)
                read = {str(task): _read(tokens) for task, tokens in harness.tokens_read.items()}
                rows += [{"length": length} | row | read.get(row["task"], {}) | about for row in _rows(results, length)]
                run = {"length": length, "begin": harness.text.begin, "tokens_read": read}
                runs.append(run | about | _without_prompts(results, folder))
                if length and remedy is config.remedies[0]:
                    _warn_of_shorter(read, length)
                frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(WHOLE, "Int64"))
                if out:  # after every run: a long one that is stopped has left what it had
                    write_atomic(out / "lm_eval.json", (json.dumps(runs, indent=1, default=str) + "\n").encode())
                    write_atomic(out / "lm_eval.csv", csv_text(frame).encode())
    return frame


def _about(model: LanguageModel, seed: int) -> dict[str, Any]:
    """Return what rows say of a model beside its weights and remedy."""
    state = None if model.state_dtype is None else dtype_name(model.state_dtype)
    return {"model": model.name, "dtype": computes_as(model), "state_dtype": state, "seed": seed}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as files that transformers reads: RULER's tasks measure their prompts with it. Bytes become a
    byte-level BPE without merges, which counts the same."""
    tokenizer = tokenizer.load() if isinstance(tokenizer, LazyTokenizer) else tokenizer
    fast = getattr(tokenizer, "_fast", None)
    if fast is None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@dataclass
class _Tasks:
    """The tasks of a config, loaded.

    What cannot be had here, or not at a length, is named and left out. Raises InputError, before anything is read,
    where some that the config names itself cannot be had at all, and where nothing can.

    Attributes:
        folder: holds the model's tokenizer.
        gone: tasks that no length brings back.
    """

    config: HarnessConfig
    harness: HarnessLM
    folder: str
    gone: set[str] = field(default_factory=set)

    def by_length(self) -> Iterator[tuple[int | None, list[Any], Any]]:
        """Yield (length, its tasks, their manager); those of a fixed length first, with None. A length's data is made
        when its turn comes."""
        lengths = self.config.sizes
        known = self._manager(lengths[0])
        self._check(known)
        members = {name: _members(known, name) for name in self.config.names}
        first, refused = self._load(known, members, lengths[0])
        any_task = False
        if fixed := [task for each in first.values() for task in each if not _by_length(task)]:
            any_task = True
            yield None, fixed, known
        self.gone |= {member for member, each in first.items() if not any(map(_by_length, each))}
        members = {name: left for name, each in members.items() if (left := [m for m in each if m not in self.gone])}
        for length in lengths if members else ():
            here, loaded = known, first
            if length != lengths[0]:
                here = self._manager(length)
                loaded, refused = self._load(here, members, length)
            if tasks := [task for each in loaded.values() for task in each if _by_length(task)]:
                any_task = True
                yield length, tasks, here
        if not any_task:
            raise InputError(refused)

    def _manager(self, length: int) -> Any:
        from lm_eval.tasks import TaskManager

        c = self.config
        paths = [str(TASKS), *([str(c.include_path)] if c.include_path else [])]
        metadata = {"max_seq_lengths": [length], "tokenizer": self.folder, "seed": c.seed}
        metadata |= {key: value for key, value in (("data", c.data), ("limit", c.limit)) if value is not None}
        small = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        # reading all of lm-eval's own task files takes seconds
        known = set(c.names) <= set(small.all_tasks)
        return small if known else TaskManager(include_path=paths, metadata=metadata)

    def _check(self, manager: Any) -> None:
        for name in self.config.names:
            if name not in manager.all_tasks:
                raise InputError(f"lm-eval knows no task {name!r}{_here(name) or _near(name, manager.all_tasks)}")
            if _here(name):
                logging.getLogger(__name__).warning("%s is a task of lm-eval's own%s", name, _here(name))

    def _load(self, manager: Any, members: dict[str, list[str]], length: int) -> tuple[dict[str, list[Any]], str]:
        """Return the tasks that can be had, by their names, and the last reason why one cannot."""
        loaded: dict[str, list[Any]] = {}
        why, gone = "", {}
        for name, each in members.items():
            missing = 0
            for member in each:
                try:
                    loaded[member] = self._one(manager, member, length)
                    continue
                except TooShort as error:
                    why = str(error)
                except InputError as error:
                    why, missing = str(error), missing + 1
                    self.gone.add(member)
                    if missing == len(each):
                        gone[name] = why
                        continue
                within = "" if each == [name] else f"{name} goes without one of its tasks: "
                logging.getLogger(__name__).warning("%s%s", within, why)
        if gone:
            others = ",".join(name for name in members if name not in gone)
            without = f"; the others run with --tasks {others}" if others else ""
            raise InputError("; ".join(gone.values()) + without)
        return loaded, why

    def _one(self, manager: Any, name: str, length: int) -> list[Any]:
        """Return a task, or what a tag or group stands for that changes its tasks' settings."""
        spec: Any = name
        if is_ruler(name, manager.task_index[name].yaml_path):
            count = lambda text: len(self.harness.tok_encode(text))  # noqa: E731
            prompts = maker(name, length, count, self.config.limit, self.config.seed)
            spec = {"group": f"one_{name}", "task": [{"task": name, "custom_dataset": prompts}]}
        try:
            with restored():
                draw_from(self.config.seed, name)
                return list(manager.load([spec])["tasks"].values())
        except InputError:
            raise
        except Exception as error:  # data sets, downloads and packages of some 14000 tasks fail in many ways
            helps = _how_to_get(manager.task_index[name].cfg or {}, error)
            raise InputError(f"task {name} cannot be had here: {one_line(error, 300)}{helps}{_here(name)}") from None


def _members(manager: Any, name: str) -> list[str]:
    """Return the tasks of a group or tag by their names; what changes its tasks' settings is taken as a whole."""
    entry = manager.task_index[name]
    if entry.tags and entry.kind.name == "TAG":
        return sorted(entry.tags)
    plain = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(plain, list) or not all(isinstance(one, str) and one in manager.task_index for one in plain):
        return [name]
    settings = set(entry.cfg) - {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
    return [name] if settings else [one for member in plain for one in _members(manager, member)]


def _by_length(task: Any) -> bool:
    """Return whether a task makes its data of a length; one says with `by_length: false` that it does not."""
    return callable(task.config.custom_dataset) and (task.config.metadata or {}).get("by_length", True)


def _here(name: str) -> str:
    """Return what lm-eval knows a task by that goes by this name in `rnn-longctx eval`, or nothing."""
    full = f"rnn_longctx_{name}"
    return f"; this library's is called {full}" if (TASKS / f"{full}.yaml").is_file() else ""


def _how_to_get(settings: Mapping[str, Any], error: Exception) -> str:
    """Return what a person can do about a task that fails to load, or nothing."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"; it needs a package: pip install {error.name.partition('.')[0]}"
    data = settings.get("dataset_path")
    if not isinstance(data, str) or "/" not in data or Path(data).exists():
        return ""
    return f"; it reads {data} of the Hugging Face hub: run it once where the hub can be reached, which keeps the data"


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; the nearest: {', '.join(close)}" if close else "; `lm-eval ls tasks` lists them"


def _evaluate(harness: HarnessLM, tasks: list[Any], manager: Any, limit: int | None) -> Any:
    import lm_eval

    # lm-eval asks git for the folder's commit, which is not kept here; in no repository git would complain
    with patch("lm_eval.evaluator.get_git_commit_hash", create=True):
        # with the manager at hand lm-eval does not read its thousands of task files again
        return lm_eval.simple_evaluate(harness, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=1000)


def _rows(results: Any, length: int | None) -> Iterator[dict[str, Any]]:
    for task, measured in results["results"].items():
        n = results["n-samples"][task]["effective"]
        samples = results["samples"][task]
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # RULER's tasks call a metric after the length, and the lengths they were not asked for are -1
            if metric.isdigit() and int(metric) != length:
                continue
            stderr = measured.get(f"{metric}_stderr,{kind}")
            if not isinstance(stderr, int | float):
                stderr = _stderr([s[metric] for s in samples if s["filter"] == kind and metric in s], value)
            name = "score" if metric.isdigit() else metric
            name += "" if kind == "none" else f",{kind}"
            yield {"task": task, "metric": name, "value": float(value), "stderr": stderr, "n": n}


def _read(tokens: list[int]) -> dict[str, float]:
    """Return the columns that say how much was read."""
    return {"tokens_read": sum(tokens) / len(tokens), "tokens_read_min": min(tokens), "tokens_read_max": max(tokens)}


def _warn_of_shorter(read: dict[str, dict[str, float]], length: int) -> None:
    """Warn of tasks whose prompts are shorter than the length that they were made for."""
    for task, each in read.items():
        if each["tokens_read"] < NEAR * length:
            logging.getLogger(__name__).warning(
                "%s at %s reads %.0f tokens: its scores are of that length",
                task,
                format_length(length),
                each["tokens_read"],
            )


def _stderr(samples: list[Any], value: float) -> float | None:
    """Return the standard error of a mean over documents, where lm-eval does not know that the metric is one."""
    if len(samples) < 2 or not all(isinstance(s, int | float) for s in samples):
        return None
    mean, n = sum(samples) / len(samples), len(samples)
    spread = math.sqrt(sum((s - mean) ** 2 for s in samples) / (n - 1))
    return spread / math.sqrt(n) if abs(mean - value) < 1e-9 else None


def _without_prompts(results: Any, folder: str) -> dict[str, Any]:
    """Return lm-eval's results as they are written: without the prompts, which are as long as the context."""
    whole = {k: v for k, v in results.items() if k in ("results", "versions", "n-shot", "n-samples", "config")}
    drop = ("doc", "arguments", "resps")
    whole["samples"] = {
        task: [{k: v for k, v in sample.items() if k not in drop} for sample in samples]
        for task, samples in results["samples"].items()
    }
    whole["config"] = {k: v for k, v in whole["config"].items() if k not in ("device", "model_args", "use_cache")}
    plain: dict[str, Any] = json.loads(json.dumps(whole, default=str).replace(folder, ""))
    return plain
