"""A search by Optuna, killed and gone on with, and the comparison of what it finds with the default.

Trials run one after another, each in a process of its own: its memory is then its own, and it can be ended. The study
lies in tune.db (SQLite).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from rnn_longctx.config import home_path
from rnn_longctx.errors import InputError
from rnn_longctx.eval.tune.budget import Budget
from rnn_longctx.eval.tune.held_out import Comparison, compared
from rnn_longctx.eval.tune.problem import PROBLEM, plain
from rnn_longctx.eval.tune.search import Search
from rnn_longctx.eval.tune.tables import write_trials
from rnn_longctx.files import write_atomic
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.snapshots import claim_folder

STUDY, STORAGE = "tune", "tune.db"


def run_tune(problem: Any, out: str | Path, budget: Budget, say: Say = to_stdout) -> Comparison | None:
    """Search the best setting of a problem within a budget, and compare it with the default on held-out data.

    `out` gets tune.db, trials.csv, a folder a trial, and tuned.yaml and held_out.csv at the end.

    Returns:
        the comparison, or None where the search finds nothing better than the default.
    Raises:
        InputError: no Optuna; bad settings; a budget that fits no trial; a folder or a storage of another study, or one
            that is being written.
    """
    problem.space  # noqa: B018  (nothing is written where there is nothing to tune)
    optuna = imported()
    out = home_path(out)
    with _alone(out):
        problem = problem.prepared(out)
        described = plain({"kind": problem.kind, **problem.described(), "memory": budget.memory})
        described["over"] = plain(problem.space.described())
        claim_folder(out, described, [STORAGE])
        write_atomic(out / PROBLEM, json.dumps({"kind": problem.kind, **plain(problem.described())}).encode())
        study = _study(optuna, out, described)
        search = Search(optuna, study, problem, out, budget, say)
        try:
            best = search.run()
        finally:
            write_trials(study, out)
        default = problem.space.default_text
        if best == default:
            say(f"no setting that was tried is better than the default, {default}")
            return None
        say(f"the best of the search: {best}; now it and the default on held-out data")
        return compared(problem, default, best, out, say)


def imported() -> ModuleType:
    """Return Optuna. Raises InputError: it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError("tuning needs optuna: pip install 'rnn-longctx[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(optuna: ModuleType, out: Path, described: dict[str, Any]) -> Any:
    """Return the study of a folder. Raises InputError: tune.db is none, or is that of another problem."""
    file = out / STORAGE
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
        names = optuna.get_all_study_names(storage)
        study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
        known = study.user_attrs.get("problem")
    except Exception as error:  # SQLAlchemy's and Optuna's, of many kinds
        raise InputError(f"{file} cannot be read as a storage of Optuna: {str(error).splitlines()[0]:.200}") from None
    if known is None and (not names or (STUDY in names and not study.trials)):
        study.set_user_attr("problem", described)
    elif known != described:
        raise InputError(f"{file} is the storage of another study; set another --out, or remove it")
    return study


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Inside, no other process tunes in this folder. Raises InputError: one does; it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "tune.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{out}: another process is tuning there") from None
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
