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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from rnn_longctx.config import format_length, parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness.model import HarnessLM
from rnn_longctx.eval.harness.ruler import TooShort, draw_from, is_ruler, maker, restored
from rnn_longctx.eval.results import Results, write_atomic
from rnn_longctx.mitigations import active, mitigate, parse_remedy
from rnn_longctx.models.checkpoint.tokenizer import LazyTokenizer
from rnn_longctx.models.precision import computes_as

# tokens_read: of a prompt (before its answer), the mean over the prompts of a task, and their least and most
COLUMNS = ("task", "length", "tokens_read", "tokens_read_min", "tokens_read_max", "metric", "value", "stderr", "n",
           "mitigation", "model", "weights_hash", "dtype", "state_dtype", "seed")  # fmt: skip
NEAR = 0.95  # of a length: prompts that are shorter on average say nothing of it
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


def lm_eval_table(model: Any, tasks: Sequence[str], lengths: Sequence[int | str] | str = "4k",
                  mitigations: Sequence[str] = ("none",), *, limit: int | None = None, include_path: str | None = None,
                  data: str | None = None, out: str | None = None, batch: int = 8, max_length: int | None = None,
                  add_bos_token: bool | None = None, seed: int = 0,
                  progress: bool = False) -> pd.DataFrame:  # fmt: skip
    """Run lm-eval's tasks; one row a task, length, metric and remedy, with the columns of COLUMNS.

    Args:
        model: this library's, or one of another library, which is adopted.
        tasks: names that lm-eval knows (tasks, groups, tags), this library's, or those of `include_path`.
        lengths: tokens, for tasks that make data of a given length. Remedies get it as their target length; for tasks
            of a fixed length they get the greatest.
        limit: the most documents of a task, at every length. None: all.
        include_path: a folder with more task files.
        data: a JSONL file, for the tasks that read one (rnn_longctx_qa, rnn_longctx_summary).
        batch: the most rows of equal length side by side.
        max_length: the most tokens a request may read; longer ones are refused. None: no limit.
        add_bos_token: whether prompts begin with BOS; None: where the tokenizer begins with it.
        seed: of the data that tasks make of a length, and of sampling.
    Raises:
        InputError: unknown tasks (with the nearest names) or remedies, bad lengths, tasks whose data or packages are
            missing here (of a group they are named in a warning and left out; so is any that does not fit into one
            of the lengths), a request longer than `max_length`.
    """
    wanted = sorted(set(parse_lengths(list(lengths) if not isinstance(lengths, str) else lengths)))
    remedies = list({str(r): r for r in map(parse_remedy, mitigations)}.values())
    names = list(dict.fromkeys(tasks))
    if not names or not remedies:
        raise InputError("lm-eval needs at least one task and one mitigation")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 document, got {limit}")
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include-path: no folder at {include_path}")
    if data is not None and not Path(data).is_file():
        raise InputError(f"data: no file at {data}")
    if out:
        out = str(Results(out).directory)  # an unwritable folder shows now
    paths = [str(TASKS), *([str(include_path)] if include_path else [])]
    harness = HarnessLM(
        model, max_length=max_length, batch_size=batch, add_bos_token=add_bos_token, seed=seed, progress=progress
    )
    model, weights = harness.model, harness.model.weights_hash
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(model.tokenizer, Path(folder))
        shared = {"tokenizer": folder, "data": data, "limit": limit, "seed": seed}
        metadata = {k: v for k, v in shared.items() if v is not None}
        for length, loaded, manager in _Tasks(names, wanted, paths, metadata, harness).by_length():
            for remedy in remedies:
                with mitigate(model, remedy, target_length=length or wanted[-1]):
                    mitigation = active(model, weights)[0]
                    harness.tokens_read.clear()
                    results = _evaluate(harness, loaded, manager, limit)
                about = {"mitigation": mitigation, "model": model.name, "weights_hash": weights,
                         "dtype": computes_as(model),
                         "state_dtype": model.state_dtype and str(model.state_dtype)[6:], "seed": seed}  # fmt: skip
                read = {str(task): _read(tokens) for task, tokens in harness.tokens_read.items()}
                rows += [{"length": length} | row | read.get(row["task"], {}) | about for row in _rows(results, length)]
                runs.append({"length": length, "begin": harness.text.begin, "tokens_read": read} | about
                            | _kept(results, folder))  # fmt: skip
                if length and remedy is remedies[0]:
                    _say_shorter(read, length)
                whole = ["length", "tokens_read_min", "tokens_read_max", "n"]
                frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(whole, "Int64"))
                if out:  # after every run: a long one that is stopped has left what it had
                    write_atomic(Path(out) / "lm_eval.json", (json.dumps(runs, indent=1, default=str) + "\n").encode())
                    write_atomic(Path(out) / "lm_eval.csv", frame.to_csv(index=False, lineterminator="\n").encode())
    return frame


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer as files that transformers reads: RULER's tasks measure their prompts with it. Bytes become a
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
    """The tasks that were asked for. What cannot be had here, or not at a length, is named and left out; InputError
    where one that was asked for by its own name cannot be had at all, and where nothing can."""

    names: list[str]
    lengths: list[int]
    paths: list[str]
    shared: dict[str, Any]
    harness: HarnessLM
    gone: set[str] = field(default_factory=set)  # tasks that no length brings back

    def by_length(self) -> Iterator[tuple[int | None, list[Any], Any]]:
        """(length, its tasks, their manager); those of a fixed length first, with None. A length's data is made when
        its turn comes."""
        known = self._manager(self.lengths[0])
        self._check(known)
        members = {name: _members(known, name) for name in self.names}
        first, refused = self._load(known, members, self.lengths[0])
        some = False
        if fixed := [task for each in first.values() for task in each if not _by_length(task)]:
            some = True
            yield None, fixed, known
        self.gone |= {member for member, each in first.items() if not any(map(_by_length, each))}
        members = {name: left for name, each in members.items() if (left := [m for m in each if m not in self.gone])}
        for length in self.lengths if members else ():
            here, loaded = known, first
            if length != self.lengths[0]:
                here = self._manager(length)
                loaded, refused = self._load(here, members, length)
            if made := [task for each in loaded.values() for task in each if _by_length(task)]:
                some = True
                yield length, made, here
        if not some:
            raise InputError(refused)

    def _manager(self, length: int) -> Any:
        from lm_eval.tasks import TaskManager

        metadata = {"max_seq_lengths": [length], **self.shared}
        own = TaskManager(include_path=self.paths, include_defaults=False, metadata=metadata)
        # reading all of lm-eval's own task files takes seconds
        known = set(self.names) <= set(own.all_tasks)
        return own if known else TaskManager(include_path=self.paths, metadata=metadata)

    def _check(self, manager: Any) -> None:
        for name in self.names:
            if name not in manager.all_tasks:
                raise InputError(f"lm-eval knows no task {name!r}{_own(name) or _near(name, manager.all_tasks)}")
            if _own(name):
                logging.getLogger(__name__).warning("%s is a task of lm-eval's own%s", name, _own(name))

    def _load(self, manager: Any, members: dict[str, list[str]], length: int) -> tuple[dict[str, list[Any]], str]:
        """The tasks that can be had, by their names, and the last reason why one cannot."""
        loaded: dict[str, list[Any]] = {}
        why = ""
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
                        raise
                within = "" if each == [name] else f"{name} goes without one of its tasks: "
                logging.getLogger(__name__).warning("%s%s", within, why)
        return loaded, why

    def _one(self, manager: Any, name: str, length: int) -> list[Any]:
        """A task, or what a tag or group stands for that changes its tasks' settings."""
        spec: Any = name
        if is_ruler(name, manager.task_index[name].yaml_path):
            count = lambda text: len(self.harness.tok_encode(text))  # noqa: E731
            made = maker(name, length, count, self.shared.get("limit"), self.shared["seed"])
            spec = {"group": f"one_{name}", "task": [{"task": name, "custom_dataset": made}]}
        try:
            with restored():
                draw_from(self.shared["seed"], name)
                return list(manager.load([spec])["tasks"].values())
        except InputError:
            raise
        except Exception as error:  # data sets, downloads and packages of some 14000 tasks fail in many ways
            cause = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"task {name} cannot be had here: {cause[:300]}{_own(name)}") from None


def _members(manager: Any, name: str) -> list[str]:
    """The tasks of a group or tag by their names; what changes its tasks' settings is taken as a whole."""
    entry = manager.task_index[name]
    if entry.tags and entry.kind.name == "TAG":
        return sorted(entry.tags)
    plain = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(plain, list) or not all(isinstance(one, str) and one in manager.task_index for one in plain):
        return [name]
    settings = set(entry.cfg) - {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
    return [name] if settings else [one for member in plain for one in _members(manager, member)]


def _by_length(task: Any) -> bool:
    """Tasks that make their data say with `by_length: false` that it does not depend on the length."""
    return callable(task.config.custom_dataset) and (task.config.metadata or {}).get("by_length", True)


def _own(name: str) -> str:
    """Where a task of this library's goes by that name in `rnn-longctx eval`: what lm-eval knows it by."""
    own = f"rnn_longctx_{name}"
    return f"; this library's is called {own}" if (TASKS / f"{own}.yaml").is_file() else ""


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
    """What of COLUMNS says how much was read."""
    return {"tokens_read": sum(tokens) / len(tokens), "tokens_read_min": min(tokens), "tokens_read_max": max(tokens)}


def _say_shorter(read: dict[str, dict[str, float]], length: int) -> None:
    """Warn of tasks whose prompts are shorter than the length that they were made for."""
    for task, each in read.items():
        if each["tokens_read"] < NEAR * length:
            logging.getLogger(__name__).warning("%s at %s reads %.0f tokens: its scores are of that length", task,
                                                format_length(length), each["tokens_read"])  # fmt: skip


def _stderr(samples: list[Any], value: float) -> float | None:
    """Of a mean over documents, where lm-eval does not know that the metric is one."""
    if len(samples) < 2 or not all(isinstance(s, int | float) for s in samples):
        return None
    mean, n = sum(samples) / len(samples), len(samples)
    spread = math.sqrt(sum((s - mean) ** 2 for s in samples) / (n - 1))
    return spread / math.sqrt(n) if abs(mean - value) < 1e-9 else None


def _kept(results: Any, folder: str) -> dict[str, Any]:
    """What of lm-eval's results is written: all but the prompts, which are as long as the context."""
    whole = {k: v for k, v in results.items() if k in ("results", "versions", "n-shot", "n-samples", "config")}
    drop = ("doc", "arguments", "resps")
    whole["samples"] = {
        task: [{k: v for k, v in sample.items() if k not in drop} for sample in samples]
        for task, samples in results["samples"].items()
    }
    whole["config"] = {k: v for k, v in whole["config"].items() if k not in ("device", "model_args", "use_cache")}
    plain: Callable[[Any], Any] = lambda value: json.loads(json.dumps(value, default=str).replace(folder, ""))  # noqa: E731
    return plain(whole)
