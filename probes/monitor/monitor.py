"""Whether a model has collapsed, while it works: a monitor calibrated once, kept as JSON beside the checkpoint.

    monitor = rnn_longctx.CollapseMonitor.calibrated(model)
    with monitor.on(model, action="mitigate:state-norm") as watch:
        rnn_longctx.generate(model, ids, 10_000)
    watch.reports

What is judged, every `every` tokens:

    ratio      the Frobenius norm of a head's state over the largest that the head reached within the training length
               (`probes.envelope`), its geometric mean over the last SMOOTH looks
    margin     what a head's ratio may reach: exp(SPREADS standard deviations of its log peaks over the calibration's
               slices), within MARGINS. A head whose peaks differ tenfold from slice to slice will pass its largest
    shift      how far the mean input scales of the first recurrent layer over those looks lie from the calibration
               text's, per head and in its standard deviations, root mean square over heads, as a share of the limit.
               Those scales follow from the tokens alone, so that no state, collapsed or not, moves them. Over the
               last PASSAGE looks, the same distance from the nearest of the calibration text's passages as long; the
               larger of the two

    collapsed  a share of heads passes twice its margin, or one head 16 times; or a state is not finite
    drift      the shift is above 1 (the input is not what was calibrated on) and the norms are not gross: a share of
               heads past 4 times its margin, or one past 16 times, is a collapse whatever the input, and so is one
               that was there before the input changed
    warning    a share of heads passes its margin, or one 4 times
    ok         else

One head alone raises no alarm, unless by far: on 128K tokens of a healthy stream (the demo model kept from collapsing
by a decay of 0.997, calibrated as such) three of 64 heads left their margins at most, in a table of character codes,
and on 1M tokens with a decay of 0.99 one did. Of the demo model itself ten do at 2K tokens and 29 at 4K: on 11 of 12
slices it is warned of at 1.5K to 2.25K tokens, where the loss is some 6% above that of re-reading the last ones, and
called collapsed at 3.5K to 4K, where it is 23 to 34% above. The twelfth is a table, called drift and then collapsed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.config import counted, home_path, parse_length
from rnn_longctx.data import Text, load_text
from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import write_atomic
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.mitigations.attach import without_remedies
from rnn_longctx.models.adopt.adopting import as_language_model
from rnn_longctx.models.checkpoint.legacy import is_of
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.models.modes import warn_of_training
from rnn_longctx.probes.monitor.actions import Fallback, parse_action
from rnn_longctx.probes.monitor.inputs import input_statistics
from rnn_longctx.probes.monitor.journal import Journal
from rnn_longctx.probes.monitor.judge import History, Limits, Report, Seen, judge
from rnn_longctx.probes.monitor.watch import Watch

SPREADS, MARGINS = 3.0, (2.0, 16.0)
FACTOR = 2.0  # the most that recalibration moves an envelope from where it was calibrated


@dataclass(repr=False)
class CollapseMonitor:
    """What a model does within its training length, and when it leaves that. Made by `calibrated` or `load`.

    Attributes:
        model, weights, shape: whose it is: name, weights hash, (heads, headdim, d_state) of every recurrent layer.
        every, length: tokens between two looks; training length.
        text: what it was calibrated on.
        norms, margins: [layer][head]; norms in the units of the state.
        calibrated_norms: norms as `calibrated` found them, which bound `recalibrate`.
        gate_mean, gate_std: of the first layer's heads, log of the mean input scale over `every` tokens.
        gate_limits: what the shift may reach, over one look, two, up to SMOOTH.
        passages: [passage][head of the first layer], means of the log over PASSAGE looks; none of a short text.
        apart: how far from the nearest of them a passage may lie.
    """

    model: str
    weights: str
    shape: list[list[int]]
    every: int
    length: int
    text: str
    norms: list[list[float]]
    margins: list[list[float]]
    calibrated_norms: list[list[float]]
    gate_mean: list[float]
    gate_std: list[float]
    gate_limits: list[float]
    passages: list[list[float]]
    apart: float

    def __repr__(self) -> str:
        heads = counted(sum(heads for heads, *_ in self.shape), "head")
        looks = f"a look every {counted(self.every, 'token')}, calibrated at {counted(self.length, 'token')}"
        return (
            f"<CollapseMonitor of {self.model}: {heads} in {counted(len(self.shape), 'layer')}, {looks} of {self.text}>"
        )

    def __post_init__(self) -> None:
        self._before: list[dict[str, Any]] = []  # for `undo`

    @classmethod
    def calibrated(
        cls, model: Any, text: Text | str | Path | None = None, length: int | str | None = None, every: int | str = 256
    ) -> CollapseMonitor:
        """Calibrate on a model as it is without remedies.

        Args:
            model: this library's, or one of another library, which is adopted.
            text: from `rnn_longctx.load_text`, or its name; None takes the envelope kept with the checkpoint, if it is
                of that length, and the builtin text. At least 8 * every tokens, and `length`. Small changes of the
                input that last are told only where a text is given, and is of 256 * every tokens or more.
            length: tokens of a context in training (2048, "2k"); None takes the model's.
            every: tokens between two looks (256, "2k").
        Raises:
            InputError: a length or tokenizer that is not known, a text too short, a model that is being watched, or
                whose states are not finite within that length.
        """
        lm = as_language_model(model)
        length = lm.train_length if length is None else parse_length(length, "length")
        every = parse_length(every, "every")
        if length is None:
            raise InputError(f"a monitor needs the training length, which {lm.name} does not say: give length=")
        if lm.tokenizer is None:
            raise InputError(f"a monitor is calibrated on text, and {lm.name} has no tokenizer: give it one")
        text = load_text(text) if isinstance(text, str | Path) else text
        with unwatched(lm):
            envelope = envelope_of(lm, length, text)
            statistics = input_statistics(lm, every, text or load_text("builtin"), lasting=text is not None)
        spread = torch.tensor(envelope.peaks, dtype=torch.float64, device="cpu").log().std(1, correction=0)  # (L, H)
        norms = [list(row) for row in envelope.norms()]
        margins = (SPREADS * spread).exp().clamp(*MARGINS).tolist()
        return cls(
            model=lm.name,
            weights=lm.weights_hash,
            shape=shape_of(lm),
            every=every,
            length=length,
            text=envelope.label,
            norms=norms,
            margins=margins,
            calibrated_norms=norms,
            **statistics,
        )

    def save(self, path: str | Path) -> None:
        """Write the monitor as JSON, all of it or nothing. Raises InputError where it cannot be written."""
        data = {"kind": "collapse monitor", "version": 2} | dataclasses.asdict(self)
        write_atomic(home_path(path), (json.dumps(data) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path, model: Any) -> CollapseMonitor:
        """Read the monitor of a model. Raises InputError: no such file, not a monitor, or another model's."""
        try:
            data = json.loads(home_path(path).read_text())
            if data.pop("kind") != "collapse monitor" or data.pop("version") != 2:
                raise ValueError("another kind or version")
            monitor = cls(**data)
            monitor._limits()
        except OSError as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
            raise InputError(f"{path}: {why}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is not a saved monitor, or it is damaged ({one_line(error)})") from None
        monitor.check(as_language_model(model))
        return monitor

    def check(self, model: LanguageModel) -> None:
        """Raise InputError where the model does not compute what the one that this was calibrated on did."""
        shape, now = shape_of(model), model.weights_hash
        if shape != self.shape or not is_of(self.weights, model, now):
            ours = f"{counted(len(self.shape), 'layer')}, first {self.shape[0]}"
            theirs = f"{counted(len(shape), 'layer')}, first {shape[0]}, weights {now}"
            raise InputError(
                f"the monitor is of {self.model} ({ours}, weights {self.weights}), not of {model.name} ({theirs}): "
                "calibrate one for it"
            )

    def recalibrate(self, model: Any, seen: Text | str | Path | Seen) -> None:
        """Move the envelope towards a text's, or what a watch saw last, where the input has changed for good.

        No head's norm moves by more than a factor of 2 from where `calibrated` found it, however often this is called:
        a collapse cannot be learned as normal. What a watch saw only widens the envelope, since a few looks are no
        maximum. The input's statistics become those of the text, or centre on the last looks, which become one more
        passage. `undo` takes it back.

        Args:
            seen: a text or its name, read within the training length (not while the model is watched), or the `watch`
                of `on`.
        Raises:
            InputError: another model, nothing seen yet, a state that is not finite.
        """
        lm = as_language_model(model)
        self.check(lm)
        at, now = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (self.calibrated_norms, self.norms))
        moved: dict[str, Any] = {}
        if isinstance(seen, Text | str | Path):
            text = load_text(seen) if isinstance(seen, str | Path) else seen
            with unwatched(lm):
                envelope = envelope_of(lm, self.length, text)
                moved |= input_statistics(lm, self.every, text)
            norms, source = torch.tensor(envelope.norms(), dtype=torch.float64, device="cpu"), envelope.label
        else:
            recent = seen.recent()
            if not bool(recent.norms.isfinite().all()):
                raise InputError("what was seen last is not finite: there is nothing to recalibrate on")
            norms, source = torch.maximum(recent.norms.exp().view_as(at), now), f"a stream up to {recent.position}"
            if recent.scales is not None:
                moved["gate_mean"] = recent.scales.tolist()
                moved["passages"] = self.passages and [*self.passages, recent.scales.tolist()]
        moved |= {"norms": norms.clamp(at / FACTOR, at * FACTOR).tolist(), "text": f"{self.text}; moved to {source}"}
        self._before.append({name: getattr(self, name) for name in moved})
        self._move(moved)

    def undo(self) -> None:
        """Take the last `recalibrate` back. Raises InputError if there is none."""
        if not self._before:
            raise InputError("nothing was recalibrated: there is nothing to undo")
        self._move(self._before.pop())

    def _move(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    @contextmanager
    def on(
        self,
        model: Any,
        action: str | Callable[[Report], Any] = "warn",
        log: str | Path | None = None,
        prometheus: str | Path | None = None,
        fallback: Fallback | None = None,
    ) -> Iterator[Watch]:
        """Watch a model inside the `with` block, in this library's reading and generation and, adopted, in its own.
        This library's generation is in evaluation mode; a model's own calls stay in the mode that it is in, and an
        adopted one in training mode is warned of.

        Args:
            action: what to do.
                warn: `warnings.warn` where the status changes to another than ok.
                raise: `CollapseError` at the first collapse.
                mitigate:NAME: at the first collapse the remedy is switched on, for the rest of the block.
                rollback:NAME: at the first collapse the cache goes back to where the status was last ok (or to where
                this block began to read it), the remedy is switched on, and the tokens since are read again.
                fallback:truncate: at every collapse the state is dropped, and the last `length` tokens are read again.
                fallback: with `fallback`, which is called with the report and the last ids (B, <= length) at every
                collapse. It returns the ids (B, n) to read instead of the state, or None to leave it.
                A callable: called with every report.
            log: file to which every report is appended as a line of JSON. It holds no text and no ids.
            prometheus: file rewritten atomically with the last report, in Prometheus' exposition format.
        Rollback and fallback need a model read by this library (`rnn_longctx.adopt`): the hidden states of the present
        call are those after the action, and a stream is read in calls of at most `every` tokens. Elsewhere a remedy is
        on from the call after the one in which the collapse was seen. A rollback keeps a copy of the cache (with
        attention's, in a hybrid) and the ids since. Rows stand at one position: padding is refused. Streams are read
        one after the other: in turns, their looks are taken for one stream's, and the shift is mostly not known.

        Raises:
            InputError: another model's monitor (also of this one, when its weights or settings have changed: told here
                and where a stream begins), an action that is not known or cannot be taken, a file that cannot be
                written, a model that is watched already or under a control.
        """
        lm = as_language_model(model)
        self.check(lm)
        warn_of_training(lm)
        chosen = parse_action(lm, action, fallback)
        if chosen.rereads and model is not lm:
            raise InputError(
                f"{chosen.text} reads tokens again, which {lm.name} does not in its own generate: give "
                "rnn_longctx.adopt(model), and read with rnn_longctx.generate or stream"
            )
        if lm.restart is not None or lm.reader is not None:
            raise InputError(
                "a monitor follows a stream read token after token, and a control or a way to read prompts is on the "
                "model: take it off"
            )
        watch = Watch(self, lm, chosen, Journal(log, prometheus))
        with watch.watching():
            yield watch

    def judge(self, position: int, history: History) -> Report:
        """Return a report of a stream's last looks, without action; the history is told which rows have collapsed."""
        return judge(self._limits(), position, history)

    def _limits(self) -> Limits:
        return Limits.of(vars(self), [heads for heads, *_ in self.shape])


def shape_of(model: LanguageModel) -> list[list[int]]:
    """Return heads, headdim and d_state of every recurrent layer."""
    return [[mixer.heads, mixer.headdim, mixer.d_state] for mixer in model.mixers]


@contextmanager
def unwatched(model: LanguageModel) -> Iterator[None]:
    """Take the remedies off a model inside the block, for a calibration. Raises InputError while it is watched."""
    if any(mixer.observer is not None for mixer in model.mixers):
        raise InputError("the model is being watched, and cannot be calibrated meanwhile: leave the block first")
    with without_remedies(model):
        yield
