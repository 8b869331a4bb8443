"""lm-eval's tasks on this library's models, at chosen lengths and with remedies: one table, one JSON file.

A task that makes its data from metadata (`custom_dataset`: RULER's, this library's passkey) is run once a length; any
other is run once, as it is. Out come OUT/lm_eval.json (lm-eval's own results, and what was said to each document) and
OUT/lm_eval.csv (the columns of COLUMNS).
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from rnn_longctx.config import parse_lengths
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness import HarnessLM
from rnn_longctx.eval.results import Results, write_atomic
from rnn_longctx.eval.ruler import check_it_ends
from rnn_longctx.mitigations import active, mitigate, parse_remedy
from rnn_longctx.models.precision import computes_as

COLUMNS = ("task", "length", "metric", "value", "stderr", "n", "mitigation", "model", "weights_hash",
           "dtype", "state_dtype")  # fmt: skip
TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


def lm_eval_table(model: Any, tasks: Sequence[str], lengths: Sequence[int | str] | str = "4k",
                  mitigations: Sequence[str] = ("none",), *, limit: int | None = None, include_path: str | None = None,
                  data: str | None = None, out: str | None = None, batch: int = 8, max_length: int | None = None,
                  seed: int = 0, progress: bool = False) -> pd.DataFrame:  # fmt: skip
    """Run lm-eval's tasks; one row a task, length, metric and remedy, with the columns of COLUMNS.

    Args:
        tasks: names that lm-eval knows (tasks, groups, tags), this library's, or those of `include_path`.
        lengths: tokens, for tasks that make data of a given length. Remedies get it as their target length; for tasks
            of a fixed length they get the greatest.
        limit: the most documents of a task, at every length. None: all.
        include_path: a folder with more task files.
        data: a JSONL file, for the tasks that read one (rnn_longctx_qa, rnn_longctx_summary).
        batch: the most rows of equal length side by side.
        max_length: the most tokens a request may read; longer ones are refused. None: no limit.
    Raises:
        InputError: unknown tasks (with the nearest names) or remedies, bad lengths, tasks whose data or packages are
            missing here (of a group they are named in a warning and left out), a request longer than `max_length`.
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
        Results(out)  # an unwritable folder shows now
    paths = [str(TASKS), *([str(include_path)] if include_path else [])]
    harness = HarnessLM(model, max_length=max_length, batch_size=batch, seed=seed, progress=progress)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(model.tokenizer, Path(folder))
        shared = {"tokenizer": folder, "data": data, "limit": limit, "seed": seed}
        metadata = {k: v for k, v in shared.items() if v is not None}
        count = lambda text: len(model.tokenizer.encode(text))  # noqa: E731
        for length, loaded, manager in _loaded(names, wanted, paths, metadata, count):
            for remedy in remedies:
                with mitigate(model, remedy, target_length=length or wanted[-1]):
                    mitigation = active(model)[0]
                    results = _evaluate(harness, loaded, manager, limit)
                about = {"mitigation": mitigation, "model": model.name, "weights_hash": model.weights_hash,
                         "dtype": computes_as(model),
                         "state_dtype": model.state_dtype and str(model.state_dtype)[6:]}  # fmt: skip
                rows += [{"length": length} | row | about for row in _rows(results, length)]
                runs.append({"length": length} | about | _kept(results, folder))
                frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"length": "Int64", "n": "Int64"})
                if out:  # after every run: a long one that is stopped has left what it had
                    write_atomic(Path(out) / "lm_eval.json", (json.dumps(runs, indent=1, default=str) + "\n").encode())
                    write_atomic(Path(out) / "lm_eval.csv", frame.to_csv(index=False, lineterminator="\n").encode())
    return frame


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer as files that transformers reads: RULER's tasks measure their prompts with it. Bytes become a
    byte-level BPE without merges, which counts the same."""
    fast = getattr(tokenizer, "_fast", None)
    if fast is None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _loaded(
    names: list[str], lengths: list[int], paths: list[str], shared: dict[str, Any], count: Callable[[str], int]
) -> Iterator[tuple[int | None, list[Any], Any]]:
    """(length, its tasks, their manager); those of a fixed length first, with None. A length's data is made when its
    turn comes. Of a group what cannot be had here is named and left out."""
    from lm_eval.tasks import TaskManager

    def manager(length: int) -> Any:
        metadata = {"max_seq_lengths": [length], **shared}
        own = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
        # reading all of lm-eval's own task files takes seconds
        return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=paths, metadata=metadata)

    known = manager(lengths[0])
    for name in names:
        if name not in known.all_tasks:
            raise InputError(f"lm-eval knows no task {name!r}{_own(name) or _near(name, known.all_tasks)}")
        if _own(name):
            logging.getLogger(__name__).warning("%s is a task of lm-eval's own%s", name, _own(name))
    first: dict[str, list[Any]] = {}
    for name in names:
        members, refused = _members(known, name), []
        for member in members:
            try:
                first[member] = _load(known, member, lengths[0], count)
            except InputError as error:
                refused.append(str(error))
                if len(refused) == len(members):
                    raise InputError(refused[0]) from None
        for why in refused:
            logging.getLogger(__name__).warning("%s goes without one of its tasks: %s", name, why)
    if fixed := [task for some in first.values() for task in some if not _by_length(task)]:
        yield None, fixed, known
    again = [name for name, some in first.items() if any(map(_by_length, some))]
    for length in lengths if again else ():
        here = known if length == lengths[0] else manager(length)
        some = [task for name in again for task in (first[name] if here is known else _load(here, name, length, count))]
        yield length, [task for task in some if _by_length(task)], here


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


def _load(manager: Any, name: str, length: int, count: Callable[[str], int]) -> list[Any]:
    try:
        check_it_ends(name, length, count)
        return list(manager.load([name])["tasks"].values())
    except InputError:
        raise
    except Exception as error:  # data sets, downloads and packages of some 14000 tasks fail in many ways
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"task {name} cannot be had here: {cause[:300]}{_own(name)}") from None


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
