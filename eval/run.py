"""The main evaluation: a model, some remedies, some tasks, increasing lengths; one table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from rnn_longctx.config import counted
from rnn_longctx.eval.bench.base import environment
from rnn_longctx.eval.jobs.base import Job, Measuring
from rnn_longctx.eval.plan import Measurement, mitigated, plan
from rnn_longctx.eval.progress import Progress
from rnn_longctx.eval.question import Question, TextLike
from rnn_longctx.eval.results import Results, Row, to_frame
from rnn_longctx.eval.tables.sheets import SETTING, alike
from rnn_longctx.mitigations import Remedy
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.checkpoint.locate import former_name
from rnn_longctx.models.config import warn_of_unfit
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.lm import LM
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.models.segments import SEGMENTS
from rnn_longctx.plain import plain
from rnn_longctx.tasks.base import Task

if TYPE_CHECKING:
    from rnn_longctx.eval.claims import Claims


@in_evaluation
def evaluate(
    model: Any,
    lengths: Sequence[int | str] | int | str,
    tasks: Sequence[str | Task | Job] | str | Task | Job = ("lm", "passkey"),
    mitigations: Sequence[str | Remedy] | str | Remedy | None = None,
    *,
    text: TextLike | Sequence[TextLike] = "stdlib",
    calibration_text: TextLike | None = None,
    out: str | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
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
    question = Question.of(lengths, tasks, mitigations, text, calibration_text, batch, seed)
    return answer(as_language_model(model), question, out, progress)


@in_evaluation
def answer(
    model: LanguageModel,
    question: Question,
    out: str | None = None,
    progress: bool = False,
    claims: Claims | None = None,
) -> pd.DataFrame:
    """Return the table of `evaluate` for a question that has been checked.

    Args:
        claims: of one of several ranks, which share the measurements out and write to the same `out`. The table is
            whole on rank 0 alone; of others it is what they measured.
    """
    if isinstance(model, LM):
        warn_of_unfit(model.config, max(question.lengths))
    results = Results(out) if out else None
    measurings = _measurings(model, question, results, claims)
    for measuring in measurings:
        for job in question.jobs:
            if lengths := job.lengths(question.lengths, model.train_length):
                job.check(measuring, lengths)
    rows: list[Row] = []
    with Progress(progress) as bar:
        measurements = plan(question, measurings, apart=claims is not None)
        bar.total(sum(m.tokens for m in measurements))
        if stored := sum(m.stored for m in measurements):
            cells = counted(sum(len(m.lengths) for m in measurements), "cell")
            bar.note(f"{out}: {stored} of {cells} {'was' if stored == 1 else 'were'} there, and not measured again")
        first = claims is None or claims.rank == 0
        if results and first:
            results.note_run({"command": _command(), **environment()})

        def measure(m: Measurement) -> None:
            with mitigated(m.measuring, m.handle):
                bar.say(m.title(texts=len(measurings) > 1))
                m.measuring.progress = bar.advance
                rows.extend(m.run())

        if claims:
            claims.share_out(measurements, measure, bar)
        else:
            for m in measurements:
                measure(m)
    if not first:
        return to_frame(rows)
    return _table(results.gather() if results else to_frame(rows), question, measurements, measurings)


def _command() -> str:
    """Return the command line that runs, without the folder that its program lies in; `rnn-longctx`, where that is this
    package's own (as `python -m rnn_longctx.cli`, by torchrun too)."""
    program, *words = sys.argv or [""]
    name = Path(program).name
    return shlex.join(["rnn-longctx" if name == "__main__.py" else name, *words])


def _measurings(
    model: LanguageModel, question: Question, results: Results | None, claims: Claims | None
) -> list[Measuring]:
    """Return what jobs work with, one a text; rows stored before get the model's training length of today."""
    segment = SEGMENTS[model.device.type]
    memory: dict[Any, Any] = {}
    measurings = [
        Measuring(
            model, text=text, batch=question.batch, seed=question.seed, results=results, segment=segment, memory=memory
        )
        for text in question.texts
    ]
    weights = measurings[0].weights_hash  # of the model before any remedy is put on it
    if results:
        with claims.alone() if claims else nullcontext():
            results.relabel(model.name, weights, model.train_length, former_name(model.name))
    return measurings


def _table(
    frame: pd.DataFrame, question: Question, measurements: list[Measurement], measurings: list[Measuring]
) -> pd.DataFrame:
    """Return the rows of the model as it is now. `attrs["asked"]` tells those that were asked for from what the folder
    holds beside them (`rnn_longctx.eval.show.terminal.asked`)."""
    key = measurings[0].key()
    setting = {column: key.get(column) for column in SETTING}
    losses = any(job.kind == "loss" for job in question.jobs)
    frame = frame[alike(frame, setting)].reset_index(drop=True)
    frame.attrs["asked"] = {
        **setting,
        "seed": question.seed,
        "texts": [m.loaded_text.hash for m in measurings] if losses else [],
        "settings": sorted({(plain(m.mitigation), m.job.label, length) for m in measurements for length in m.lengths}),
    }
    return frame
