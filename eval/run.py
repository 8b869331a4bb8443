"""The main job: a model, some remedies, some tasks, increasing lengths; one table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.config import format_length, parse_lengths
from rnn_longctx.data import Text, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Context, Task
from rnn_longctx.eval.jobs.loss import LanguageModel, text_of
from rnn_longctx.eval.jobs.recall import MultiKey, Passkey, Words
from rnn_longctx.eval.results import Results, Row, to_frame
from rnn_longctx.eval.search.unseen import check_unseen
from rnn_longctx.eval.tables.sheets import SETTING, alike
from rnn_longctx.mitigations import (
    NotApplicable,
    Remedy,
    active,
    diagnostics,
    handles_on,
    mitigate,
    parse_remedy,
    standard,
)
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.spec import parse

TASKS: dict[str, type[Task]] = {t.name: t for t in (LanguageModel, Passkey, MultiKey, Words)}


@dataclass(frozen=True)
class EvalConfig:
    """What `rnn-longctx eval` does; see configs/eval/demo.yaml."""

    model: str = "demo"
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384])
    tasks: list[str] = field(default_factory=lambda: ["lm", "passkey"])
    mitigations: list[str] = field(default_factory=lambda: ["none"])
    text: list[str] = field(default_factory=lambda: ["stdlib"])
    calibration_text: str | None = None  # None: what the checkpoint keeps, else the builtin text
    train_length: int | None = None  # None: what the checkpoint says
    tokenizer: str | None = None
    out: str = "runs/eval"
    batch: int = 32  # the most streams side by side
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    state_dtype: str | None = None  # None: float32, or float64 with dtype float64
    backend: str | None = None


def parse_task(text: str | Task) -> Task:
    """A task from `name:key=value,...`. Raises InputError for unknown names, parameters and bad values."""
    if isinstance(text, Task):
        return text
    if not isinstance(text, str):
        raise InputError(f"expected a task such as lm or passkey:n=100, got {text!r:.80}")
    if any(piece.strip().partition(":")[0] in TASKS for piece in text.split(",")[1:]):
        raise InputError(f'{text!r}: several tasks are a list, as in ["lm", "passkey"]; here, --task once for each')
    return parse(text, TASKS, "task")


@in_evaluation
def evaluate(model: Any, lengths: Sequence[int | str] | int | str,
             tasks: Sequence[str | Task] | str | Task = ("lm", "passkey"),
             mitigations: Sequence[str | Remedy] | str | Remedy | None = None, *,
             text: Text | str | Path | Sequence[Text | str | Path] = "stdlib",
             calibration_text: Text | str | Path | None = None, out: str | None = None, batch: int = 32, seed: int = 0,
             progress: bool = False) -> pd.DataFrame:  # fmt: skip
    """Measure a model at increasing lengths; one row a cell (DESIGN: result table).

    Args:
        model: this library's, or one of another library, which is adopted (`adopt` it to say its tokenizer and
            training length).
        lengths: in tokens; "4k" and "1m" are read too.
        tasks: lm, passkey, ..., as on the command line; one of them or several.
        mitigations: one or several; each is put on top of what is on the model already; None measures the model as it
            is; "all" stands for every remedy (`rnn_longctx.mitigations.standard`) and the controls; a warning names
            those of them that are not applicable. Where "none" is among them and the loss of a hybrid is measured
            beyond its training length, it is measured under its two controls (`mitigations.diagnostics`) too.
        text: evaluated on (`rnn_longctx.load_text`): "stdlib", a file, a directory, records; or several of them.
        calibration_text: for remedies that are calibrated; None takes what is kept with the checkpoint.
        out: a folder for cells, snapshots, results.parquet and results.csv; finished cells there are not measured
            again, and a long pass goes on from its last snapshot. None keeps nothing. The table returned then holds
            what the folder has of this model as it is now, also of earlier calls; the files hold all of the folder.
        progress: show a bar, or, where the output is no terminal, a line a task on stderr.
    Raises:
        InputError: no model, bad lengths, tasks or remedies, a text that is missing, shorter than a length or of bytes
            that the tokenizer cannot read, before anything is measured.
    """
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch must be at least 1 stream, got {batch!r}")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: expected a whole number, at least 0, got {seed!r:.40}")
    model = as_language_model(model)
    wanted = sorted(set(parse_lengths([lengths] if isinstance(lengths, int) else lengths)))
    jobs = [parse_task(t) for t in _several(tasks, str | Task, "tasks", "lm or passkey:n=100")]
    named = (
        ["none"] if mitigations is None else _several(mitigations, str | Remedy, "mitigations", "none or state-norm")
    )
    asked = [parse_remedy(w) for w in named if w != "all"]
    named = [w for name in named for w in (standard(model.train_length) if name == "all" else [name])]
    remedies = list({str(r): r for r in map(parse_remedy, named)}.values())
    if not wanted or not jobs or not remedies:
        raise InputError("evaluate needs at least one length, one task and one mitigation")
    results, now = Results(out) if out else None, model.weights_hash
    if results:
        results.relabel(model.name, now, model.train_length)
    several = text if isinstance(text, list | tuple) else [text]
    texts: dict[Any, Any] = {str(t) if isinstance(t, str | Path) else id(t): t for t in several}
    if not texts:
        raise InputError("evaluate needs at least one text")
    segment = SEGMENTS[model.device.type]
    contexts = [
        Context(model, text=t, batch=batch, seed=seed, results=results, segment=segment, _memory={"weights": now})
        for t in texts.values()
    ]
    for context in contexts:
        for job in jobs:
            if lengths_of_job := job.lengths(wanted, model.train_length):
                job.check(context, lengths_of_job)
    todo = [(remedy, jobs, remedy in asked) for remedy in remedies]
    if getattr(model, "attends", False) and 1 < (model.train_length or 0) < max(wanted, default=0):
        losses: list[Task] = [job for job in jobs if isinstance(job, LanguageModel)]
        further = map(parse_remedy, diagnostics(model.train_length) if losses else [])
        if "none" in map(str, remedies) and active(model, now)[0] == "none":
            todo += [(remedy, losses, False) for remedy in further if remedy not in remedies]
    given = calibration_text or None
    calibration = None if given is None else load_text(given)

    rows: list[Row] = []
    settings: set[tuple[str, str, int]] = set()
    with _Progress(progress) as bar:
        plan = [(contexts[0], *step) for step in _plan(model, todo, wanted, calibration, given, contexts[0])]
        for context in contexts[1:]:  # prompts hang on no text, and were asked with the first
            alone = [
                (remedy, list[Task](j for j in js if isinstance(j, LanguageModel)), ask) for remedy, js, ask in todo
            ]
            plan += [(context, *step) for step in _plan(model, alone, wanted, calibration, given, context, again=True)]
        bar.total(sum(cost for *_, cost in plan))
        for context, remedy, job, some, _ in plan:
            with _mitigated(model, remedy, max(some), calibration, context):
                on = f" of {text_of(context).name}" if len(contexts) > 1 and isinstance(job, LanguageModel) else ""
                at = f" at {format_length(*some)}" if remedy.per_length else ""  # a pass a length
                bar.say(f"{context.mitigation}, {job.name}{on}{at}")
                context.progress = bar.advance
                rows += job.run(context, some)
                settings |= {(context.mitigation, job.label, n) for n in some}
    frame = results.gather() if results else to_frame(rows)
    texts_asked = [text_of(c).hash for c in contexts] if any(isinstance(job, LanguageModel) for job in jobs) else []
    key = contexts[0].key(Task(), "", 0, "")
    frame = frame[alike(frame, {c: key.get(c) for c in SETTING})].reset_index(drop=True)
    frame.attrs["asked"] = {c: key.get(c) for c in (*SETTING, "seed")} | {"texts": texts_asked,
                                                                        "settings": sorted(settings)}  # fmt: skip
    return frame


def _several(given: Any, one: Any, what: str, such_as: str) -> list[Any]:
    """Return one of something, or several, as a list. InputError for what is neither."""
    if given is None or isinstance(given, one):
        return [] if given is None else [given]
    if not isinstance(given, Iterable):
        raise InputError(f"{what}: expected one such as {such_as}, or a list of them; got {given!r:.60}")
    return list(given)


def _plan(model: Mamba2LM, todo: list[tuple[Remedy, list[Task], bool]], lengths: list[int], calibration: Any,
          named: Any, context: Context,
          again: bool = False) -> Iterator[tuple[Remedy, Task, list[int], int]]:  # fmt: skip
    """What is to be run, with its cost in tokens. Putting every remedy on once shows what is wrong before it counts;
    one that was not asked for by its name may be not applicable. again: on a further text, so this was said."""
    for remedy, jobs, asked in todo:
        try:
            with _mitigated(model, remedy, max(lengths), calibration, context):
                if any(isinstance(job, LanguageModel) for job in jobs):
                    check_unseen(handles_on(model), text_of(context), context.text, named)
                if model.reader is not None and not any(job.asks for job in jobs):
                    raise NotApplicable(f"{remedy} reads prompts, and has no loss of a text: give one like passkey")
        except NotApplicable as error:
            if again:
                continue
            if asked:
                raise
            logging.getLogger(__name__).warning("%s is not applicable: %s", remedy, error)
            continue
        for job in jobs:
            mine = job.lengths(lengths, model.train_length)
            for some in [[n] for n in mine] if remedy.per_length else [mine] if mine else []:
                with _mitigated(model, remedy, max(some), calibration, context):
                    if model.reader is None or job.asks:  # it has no loss of tokens that it does not read
                        yield remedy, job, some, job.cost(context, some)


@contextmanager
def _mitigated(model: Mamba2LM, remedy: Remedy, target: int, calibration: Any, context: Context) -> Iterator[None]:
    with mitigate(model, remedy, target_length=target, text=calibration):
        context.mitigation, context.calibration = active(model, context.weights_hash)
        yield


class _Progress:
    """A rich progress bar, or, where the output is no terminal, a line a task on stderr; or nothing."""

    def __init__(self, shown: bool):
        self.bar: Any = None
        self.lines, self.read, self.tokens = False, 0, 1
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                TextColumn("tokens"), TimeElapsedColumn(), Remaining())  # fmt: skip
            self.lines = not self.bar.console.is_terminal
            self.bar = None if self.lines else self.bar

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("calibrating", total=None)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()

    def total(self, tokens: int) -> None:
        self.tokens = max(1, tokens)
        if self.bar:
            self.bar.update(self.task, total=tokens)

    def say(self, text: str) -> None:
        if self.lines:
            print(f"{self.read / self.tokens:4.0%} {text}", file=sys.stderr, flush=True)
        if self.bar:
            self.bar.update(self.task, description=text)

    def advance(self, tokens: int) -> None:
        self.read += tokens
        if self.bar:
            self.bar.advance(self.task, tokens)
