"""What a comparison is made of (see configs/compare/recurrences.yaml): what is swept, and in `measure` what is measured
(`rnn_longctx.eval.compare.measures`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeVar

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.eval.compare.equal import Kind, equalised
from rnn_longctx.eval.compare.measures import MeasureConfig, ascending
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.config import DataConfig, OptimizerConfig, PassingConfig, ScheduleConfig

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")  # of an entry: it names folders


@dataclass(frozen=True)
class ShapeConfig:
    """The shape of every entry that does not say another; see `rnn_longctx.models.config.ModelConfig`."""

    d_model: int = 192
    n_layer: int = 4
    mlp: float = 2.0  # the width of a gated MLP after every mixer, as a multiple of d_model; 0: there is none
    vocab_size: int = 256


@dataclass(frozen=True)
class Entry:
    """One architecture: a mixer with its parameters, and where it differs from `shape`.

    Attributes:
        longest: tokens; nothing longer is read (for what takes time in the square of the length). None: all lengths.
    """

    name: str
    mixer: str | list[str]
    d_model: int | None = None
    n_layer: int | None = None
    mlp: float | None = None
    longest: int | None = None

    def model(self, shape: ShapeConfig) -> ModelConfig:
        """Return the model of this entry as it is written. Raises InputError: no such mixer, or one of this shape."""
        differs = {k: v for k in ("d_model", "n_layer", "mlp") if (v := getattr(self, k)) is not None}
        return ModelConfig(self.mixer, **(vars(shape) | differs))


@dataclass(frozen=True)
class TrainingConfig:
    """How every model is trained: `TrainConfig`, but for what differs between models."""

    data: DataConfig = field(default_factory=DataConfig)
    train_length: int = 512  # tokens
    batch_size: int = 64  # sequences of a step
    steps: int = 1500
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    passing: PassingConfig | None = None
    amp: bool | Literal["auto"] = "auto"
    log_every: int = 50  # steps
    checkpoint_every: int = 250  # steps


@dataclass(frozen=True)
class ScoreConfig:
    """When training has come far enough: the first row of a run's log.csv in which all that is said here is reached.

    Attributes:
        loss: the mean over the tokens of `log_every` steps, in nats; answer_loss: that of the answers mixed in.
    """

    loss: float | None = None
    answer_loss: float | None = None

    def __post_init__(self) -> None:
        if self.loss is None and self.answer_loss is None:
            raise InputError("loss: expected one, an answer_loss, or both, such as {loss: 1.2}")


@dataclass(frozen=True)
class CompareConfig:
    """Entries that are trained alike and measured alike.

    Every entry is trained once at each of `learning_rates` (seed 0); at the best of them (`rnn_longctx.eval.compare.
    choice`) it is trained with all seeds, and these models are measured.

    Attributes:
        equal: what every entry has as much of as the first one (`equal.py`): "parameters" or "flops", operations a
            token, within 2%; "state", numbers that a row keeps after the training length, within 5%; None leaves them.
        forget: training lengths, in tokens, beyond that of `train`, which the search for T_forget tries at the best
            rate, with as many tokens a step; []: nothing is searched, and T_forget is known as a bound.
        score: what training is timed up to, in tokens and seconds; price: of an hour of the device, in any currency.
            None: nothing is said of either. Both may be changed when all is measured.
    """

    entries: list[Entry]
    learning_rates: list[float]
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    equal: Kind | None = "parameters"
    train: TrainingConfig = field(default_factory=TrainingConfig)
    seeds: int = 3
    forget: list[int] = field(default_factory=list)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    score: ScoreConfig | None = None
    price: float | None = None
    device: str = "auto"
    out: str = "runs/compare"

    def __post_init__(self) -> None:
        check_names(self.entries)
        if self.seeds < 1:
            raise InputError(f"seeds: expected at least 1, got {self.seeds}")
        rates = self.learning_rates
        if not rates or len({*rates}) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
            raise InputError(f"learning_rates: expected different ones above 0, such as [1e-3, 3e-3], got {rates}")
        if not self.train.data.held_out:
            raise InputError("train.data.held_out: the learning rate is chosen by held-out text; expected above 0")
        if self.forget:
            ascending("forget", [self.train.train_length, *self.forget])
        check_price(self.price)
        trained = {text.source for text in self.train.data.parts}
        if both := sorted(trained & set(self.measure.texts)):
            raise InputError(f"measure: {both[0]} is trained on; measure on another text")
        for i, entry in enumerate(self.entries):
            try:
                entry.model(self.shape)
            except InputError as error:
                raise InputError(f"entries[{i}] ({entry.name}): {error}") from None
            if entry.longest is not None and entry.longest <= self.train.train_length:
                raise InputError(
                    f"entries[{i}] ({entry.name}): longest must be beyond train_length {self.train.train_length}"
                )
        for length in self.train_lengths:
            self.training(Cell(self.entries[0].name, rates[0], 0, length), "")

    @cached_property
    def models(self) -> dict[str, ModelConfig]:
        """The model of every entry, by its name; of equal size where that is asked for. Raises InputError: it cannot
        be."""
        written = {entry.name: entry.model(self.shape) for entry in self.entries}
        return equalised(written, self.equal, self.train.train_length) if self.equal else written

    @property
    def train_lengths(self) -> list[int]:
        return [self.train.train_length, *self.forget]

    def settled(self) -> CompareConfig:
        """Return the same comparison with the shapes of all entries written out, for cells to read."""
        entries = []
        for entry in self.entries:
            model = self.models[entry.name]
            entries.append(replace(entry, d_model=model.d_model, n_layer=model.n_layer, mlp=model.mlp))
        return replace(self, entries=entries, equal=None)

    def entry(self, name: str) -> Entry:
        """Return the entry of a name. Raises InputError: there is none."""
        return named(self.entries, name)

    def trials(self, name: str) -> list[Cell]:
        """Return the cells of an entry that its learning rate is chosen by."""
        return [Cell(name, rate, 0, self.train.train_length) for rate in self.learning_rates]

    def replicas(self, name: str, rate: float) -> list[Cell]:
        """Return the cells of an entry that are measured, a seed each."""
        return [Cell(name, rate, seed, self.train.train_length) for seed in range(self.seeds)]

    def find(self, name: str) -> Cell:
        """Return the cell of a name. Raises InputError: there is none."""
        for entry in self.entries:
            for rate in self.learning_rates:
                for length in self.train_lengths:
                    for seed in range(self.seeds):
                        if (cell := Cell(entry.name, rate, seed, length)).name == name:
                            return cell
        raise InputError(f"this comparison has no cell {name}")

    def training(self, cell: Cell, out: str) -> TrainConfig:
        """Return how a cell is trained. Raises InputError: that cannot be."""
        t = self.train
        rows = round(t.batch_size * t.train_length / cell.train_length)
        if rows < 1:
            tokens = t.batch_size * t.train_length
            raise InputError(f"forget: {cell.train_length} is more than the {tokens} tokens of a step")
        return TrainConfig(
            model=self.models[cell.entry],
            data=t.data,
            optimizer=OptimizerConfig(lr=cell.rate, weight_decay=t.weight_decay, clip=t.clip),
            schedule=t.schedule,
            passing=t.passing,
            train_length=cell.train_length,
            batch_size=rows,
            steps=t.steps,
            amp=t.amp,
            device=self.device,
            seed=cell.seed,
            log_every=t.log_every,
            checkpoint_every=t.checkpoint_every,
            save_dtype="float32",
            out=out,
        )


@dataclass(frozen=True)
class Cell:
    """One model to train, and to measure where its rate is the one that is chosen."""

    entry: str
    rate: float
    seed: int
    train_length: int

    @property
    def name(self) -> str:
        return f"{self.entry}-lr{self.rate:g}-T{self.train_length}-s{self.seed}"


def selected(config: CompareConfig, names: Sequence[str]) -> list[str]:
    """Return the names of the entries that are asked for, all where none is. Raises InputError: there is no such."""
    return [config.entry(name).name for name in names] or [entry.name for entry in config.entries]


def check_names(entries: Sequence[Entry]) -> None:
    """Raise InputError where there is no entry, two have one name, or a name cannot be one of a folder."""
    if not entries:
        raise InputError("entries: expected at least one, such as {name: gla, mixer: gla}")
    names = [entry.name for entry in entries]
    for name in names:
        if not NAME.fullmatch(name):
            raise InputError(f"entries: a name is of letters, digits, _, -, + and dots, got {name!r}")
        if names.count(name) > 1:
            raise InputError(f"entries: {name} is there twice")


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def named(entries: Sequence[AnyEntry], name: str) -> AnyEntry:
    """Return the entry of a name. Raises InputError: there is none."""
    for entry in entries:
        if entry.name == name:
            return entry
    raise InputError(f"no entry {name!r}{nearest(name, [entry.name for entry in entries])}")


def check_price(price: float | None) -> None:
    """Raise InputError for a price that is none."""
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"price: expected that of an hour of the device, 0 or more, got {price}")
