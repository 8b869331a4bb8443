"""Online training: small updates on text as it arrives in a directory, each kept or undone.

An update reads the next `online.tokens` tokens about once, in streams as any training does, at the constant rate
`optimizer.lr`. A share of the rows, `online.replay`, reads the text of the config (`data.text`) again, so that it is
not forgotten: Ibrahim et al. (arXiv 2403.08763) need 5% where texts differ little and 25% where they differ much; here
nobody knows beforehand, and an update refused costs more than some rows. Then the model is measured. It is kept while,
at each of `evaluate.lengths`, the loss of the held-out text and recall hold, and the last part of the new text,
which was not trained on, has not become harder. Otherwise weights and moments go back to what they were, and the text
is not read again. What holds is judged against the best of all models kept: many losses, each too small to see, would
add up.

All that a run knows is in one snapshot, written after each decision: weights, moments, how far each file was read. To
undo an update and to go on after `kill -9` is the same: load it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rnn_longctx.config import counted, home_path
from rnn_longctx.data import Arrival, Arrivals, load_tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import Write, scalars
from rnn_longctx.progress import Say, to_stdout
from rnn_longctx.train.config import OnlineConfig, TrainConfig
from rnn_longctx.train.evaluation import Evaluation, held_out_loss
from rnn_longctx.train.export import export
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.loop import backward, fault
from rnn_longctx.train.optimizer import make_optimizer
from rnn_longctx.train.prepare import Run, prepare
from rnn_longctx.train.snapshots import Log, newest_snapshot, save_snapshot
from rnn_longctx.train.starts import Starts
from rnn_longctx.train.team import Team

COLUMNS = ["update", "decision", "reason", "text", "tokens", "train_loss", "new_before", "new_after"]
SHOWN = 3  # files named on the console's line
Figures = list[tuple[int, float, float]]  # of each length: tokens, loss, share of the answers that are right


def train_online(config: TrainConfig, stream: str | Path, say: Say = to_stdout) -> Path:
    """Update the model on what arrives in `stream`, or go on where a run of the same config ended, until a file STOP
    is there and less than an update's text is left, or SIGINT or SIGTERM comes; returns the directory of the model.

    `config.out` gets last/, the newest model kept (from the start on), online.csv, a row a decision (losses in nats per
    token, recall as shares; `text` names files and their bytes), and snapshots/. A file that cannot be read is
    skipped, with a row that says why. Raises InputError: bad settings, no such directory, and what `train` raises it
    for.
    """
    if config.online is None or config.evaluate is None:
        missing = "online" if config.online is None else "evaluate"
        raise InputError(f"{missing}: missing, and a stream needs it; see configs/train/online.yaml")
    if isinstance(config.train_length, str):
        raise InputError(f"train_length: a stream needs one length, got {config.train_length}")
    least = math.floor(config.online.tokens * (1 - config.online.held_out))
    if least <= config.longest:
        few = f"{config.online.tokens} give {least} to train on, train_length {config.longest} needs more"
        raise InputError(f"online.tokens: {few}")
    team = Team(config)
    if team.world > 1:
        raise InputError(f"a stream is trained on by one process, not {team.world}")
    arrivals = Arrivals(stream, load_tokenizer(config.data.tokenizer))
    out = home_path(config.out)
    with ExitStack() as stack:
        prepared = prepare(config, team, stack, say, online=True)
        write = stack.enter_context(scalars(config.log_to, out, out.name))
        stopping = stack.enter_context(_signals())
        run = Online(prepared, arrivals)
        run.begin()
        log = stack.enter_context(closing(Log(out / "online.csv", run.update or -1, run.columns)))
        if not run.update:
            run.log_start(log)
        _follow(run, arrivals, log, write, stopping)
    return out / "last"


def _follow(online: Online, arrivals: Arrivals, log: Log, write: Write, stopping: list[int]) -> None:
    """Make updates until the stream or the run is stopped."""
    settings = online.settings
    while not stopping:
        last, known = arrivals.stopped, len(arrivals.skipped)
        arrival = arrivals.take(settings.tokens)
        for name, reason in list(arrivals.skipped.items())[known:]:
            online.run.say(f"skipped {_printable(name)}: {reason}")
            log.write(online.row("skipped", reason, _printable(name)))
        if arrival is not None:
            row = online.learn(arrival, stopping)
            if row is None:
                break
            log.write(row)
            online.settle(row)
            write({f"online/{k}": v for k, v in row.items() if isinstance(v, float)}, online.update)
        elif last:
            left = f"what is left is less than an update of {settings.tokens:,} tokens"
            online.run.say(f"STOP after update {online.update}, of which {online.kept} were kept; {left}")
            return
        else:
            _wait(settings.poll, stopping)
    stopped = f"stopped after update {online.update}, of which {online.kept} were kept"
    online.run.say(f"{stopped}; the next run goes on there")


@dataclass
class Online:
    """A run between two decisions.

    Attributes:
        update: the number of the last one that was decided on.
        kept: how many were kept.
        tokens: in the updates kept.
        best: of each length, the lowest loss and the best recall of the models kept.
    """

    run: Run
    arrivals: Arrivals
    update: int = 0
    kept: int = 0
    tokens: int = 0
    best: Figures = field(default_factory=list)

    def __post_init__(self) -> None:
        run = self.run
        assert run.config.online is not None
        self.settings: OnlineConfig = run.config.online
        self.config, self.corpus, self.model, self.team = run.config, run.corpus, run.model, run.team
        self.optimizer = make_optimizer(run.model, run.config.optimizer)
        self.evaluation = Evaluation(run.config, run.corpus, run.model, run.out, run.autocast)
        self.task = self.evaluation.task.name
        lengths = self.evaluation.settings.lengths
        self.columns = [*COLUMNS, *(f"{name}_{n}" for n in lengths for name in ("loss", "passkey_accuracy"))]

    def begin(self) -> None:
        """Go on where the newest snapshot was; without one, measure the model as it is."""
        if self._restored():
            self.run.say(f"goes on after update {self.update}, of which {self.kept} were kept")
        else:
            self.best = list(self.evaluation.measure())
            self._save()
        self._publish()  # a process may have died between a snapshot and this

    def log_start(self, log: Log) -> None:
        self.run.say(f"start: {_spoken(self.best, self.task)}")
        log.write(self.row("start", figures=self.best) | {"update": 0})

    def row(
        self, decision: str, reason: str = "", text: str = "", figures: Figures | None = None, **measured: Any
    ) -> dict[str, Any]:
        """Return a row of online.csv of the update at hand; what was not measured is empty."""
        row = dict.fromkeys(self.columns, "") | {"update": self.update + 1, "decision": decision} | measured
        for length, loss, score in figures or []:
            row |= {f"loss_{length}": loss, f"passkey_accuracy_{length}": score}
        return row | {"reason": reason, "text": text}

    def learn(self, arrival: Arrival, stopping: list[int]) -> dict[str, Any] | None:
        """Train on what arrived and decide. Return the row, or None where a signal came meanwhile. Nothing on disk
        changes."""
        number = self.update + 1
        cut = math.floor(len(arrival.ids) * (1 - self.settings.held_out))
        ids = torch.from_numpy(arrival.ids).to(self.team.device)
        before = self._new_loss(ids[cut:])
        losses, reason = self._train(ids[:cut], number, stopping)
        if losses is None:
            return None
        figures, after = None, math.nan
        if reason is None:
            figures, after = list(self.evaluation.measure()), self._new_loss(ids[cut:])
            reason = refusal(figures, self.best, before, after, self.settings, self.task)
        decision = "kept" if reason is None else "refused"
        spans = [f"{_printable(name)} {start}-{stop}" for name, start, stop in arrival.spans]
        self.arrivals.done(arrival)
        if reason is None:
            self.kept, self.tokens = self.kept + 1, self.tokens + len(arrival.ids)
            assert figures is not None
            self.best = [
                (n, min(loss, least), max(score, most))
                for (n, loss, score), (_, least, most) in zip(figures, self.best, strict=True)
            ]
        more = f" and {counted(len(spans) - SHOWN, 'file')} more" if len(spans) > SHOWN else ""
        line = f"update {number} {decision}: {len(arrival.ids):,} tokens ({', '.join(spans[:SHOWN])}{more}); "
        line += (
            f"loss on their held-out share {before:.4f} before, {after:.4f} after; {_spoken(figures or [], self.task)}"
        )
        self.run.say(line + (f"; {reason}" if reason else ""))
        train_loss = sum(losses) / len(losses) if losses else math.nan
        return self.row(
            decision,
            reason or "",
            "; ".join(spans),
            figures,
            tokens=len(arrival.ids),
            train_loss=train_loss,
            new_before=before,
            new_after=after,
        )

    def settle(self, row: dict[str, Any]) -> None:
        """Make the decision of the row last: the snapshot is what counts, last/ follows it."""
        kept = row["decision"] == "kept"
        if not kept:
            read, skipped, last = self.arrivals.read, self.arrivals.skipped, self.update
            if not self._restored() or self.update != last:
                raise InputError(f"{self.run.out}: the snapshot to go back to, of update {last}, cannot be read")
            self.arrivals.read, self.arrivals.skipped = read, skipped
        self.update = row["update"]
        self._save()
        if kept:
            self._publish()

    def _train(self, new: torch.Tensor, number: int, stopping: list[int]) -> tuple[list[float] | None, str | None]:
        """Return the losses of the steps, and why they are worth nothing if so; no losses where a signal came."""
        c, share = self.config, 1 - self.settings.replay
        # What passes from row to row, and what a row is, begins anew with each update, by numbers of its own.
        seed = int(np.random.SeedSequence([c.seed, number]).generate_state(1)[0])
        c = replace(c, seed=seed)
        base = [self.settings.replay * s / sum(self.corpus.shares) for s in self.corpus.shares]
        texts = replace(
            self.corpus,
            sources=[new, *self.corpus.sources],
            shares=[share, *base],
            mapped=frozenset(i + 1 for i in self.corpus.mapped),
        )
        run, learner = replace(self.run, corpus=texts), Learner(self.model)
        starts = None if c.passing is None else Starts(self.model, c.passing, seed)
        losses: list[float] = []
        self.model.train()
        for step in range(math.ceil(len(new) / (share * c.batch_size * c.longest))):
            if stopping:
                return None, None
            self.optimizer.zero_grad(set_to_none=True)
            _, of_batch, final = backward(run, c, learner, starts, step)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.optimizer.clip)
            loss, _, size = self.team.agreed(of_batch, norm)
            if (bad := fault(loss, size, [])) is not None:
                return losses, f"step {step + 1}: loss or gradient {bad}"
            self.optimizer.step()
            losses.append(loss)
            if starts is not None:
                starts.end(step, final)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()
        return losses, None

    def _new_loss(self, ids: torch.Tensor) -> float:
        """Return the loss of the last of the new text, in windows of at most train_length."""
        self.model.eval()
        length = min(self.config.longest, len(ids) - 1)
        return held_out_loss(
            self.model, replace(self.corpus, held_out=ids), length, self.config.batch_size, self.run.autocast
        )

    def _save(self) -> None:
        state = {"update": self.update, "kept": self.kept, "tokens": self.tokens, "best": self.best}
        state |= {"read": self.arrivals.read, "skipped": self.arrivals.skipped}
        weights, moments = self.model.state_dict(), self.optimizer.state_dict()
        parts = {"model": weights, "optimizer": moments, "texts": self.run.text_hashes, "state": state}
        save_snapshot(self.run.out / "snapshots", self.update, parts)

    def _restored(self) -> bool:
        """Go to the newest snapshot. Return whether there is one."""
        snapshot = newest_snapshot(self.run.out / "snapshots", say=self.run.say)
        if snapshot is None:
            return False
        if snapshot["texts"] != self.run.text_hashes:
            raise InputError(f"{self.run.out}: the training text is not the one this run began with; set another out")
        self.team.load(self.model, self.optimizer, snapshot)
        state = snapshot["state"]
        self.update, self.kept, self.tokens, self.best = (state[k] for k in ("update", "kept", "tokens", "best"))
        self.arrivals.read, self.arrivals.skipped = state["read"], state["skipped"]
        return True

    def _publish(self) -> None:
        metrics = {"update": self.update, "kept": self.kept, "tokens": self.tokens}
        export(self.config, self.corpus, self.model, self.run.out / "last", metrics, envelope=False)


def refusal(
    figures: Figures, best: Figures, before: float, after: float, settings: OnlineConfig, task: str
) -> str | None:
    """Return why an update is undone, or None. before, after: the loss of the new text's last part; task: the name of
    what recall is measured by."""
    for (length, loss, score), (_, least, most) in zip(figures, best, strict=True):
        if not loss <= least + settings.loss_tolerance:
            return f"the loss at {length} tokens was {least:.4f}"
        if score < most - settings.passkey_tolerance - 1e-9:
            return f"the recall of {task} at {length} tokens was {most:.2f}"
    if not after <= before + settings.loss_tolerance:
        return "the new text's own held-out loss rose"
    return None


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside, the signals that asked to stop; a second of a kind does what it always does."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():  # Python lets no other ask
        before = {}

    def ask(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(seconds: float, stopping: list[int]) -> None:
    end = time.monotonic() + seconds
    while not stopping and (left := end - time.monotonic()) > 0:
        time.sleep(min(0.2, left))


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _spoken(figures: Figures, task: str) -> str:
    return (
        ", ".join(f"loss {loss:.4f} {task} accuracy {score:.2f} at {n}" for n, loss, score in figures) or "not measured"
    )
