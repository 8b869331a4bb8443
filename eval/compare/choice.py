"""Which learning rate an entry is compared at: the one of the least `held-out loss + (1 - recall)`.

Both are of what is never measured on: loss, in nats a token, of the held-out documents of the training texts; recall,
the share of answers that are right, of fresh examples of the tasks mixed into training, at the longest length that they
were trained at, the mean over the tasks. So ten points of recall weigh as much as 0.1 nats: a model of a slightly lower
loss that recalls nothing is not taken for the better one, nor one that recalls a little more and predicts text badly.
Where examples fill all rows of training, no text is learned, and the score is `1 - recall`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.train import TrainConfig
from rnn_longctx.train.evaluation import longest_examples, recall
from rnn_longctx.train.mix import task_of

EXAMPLES_SEED = 1  # of the examples: what is measured has seed 0


@dataclass(frozen=True)
class Trial:
    """What is known of a model when it is trained.

    Attributes:
        loss: held-out, in nats a token; not a number where training diverged.
        recall: the share of answers that are right, by task.
        fault: how training diverged, or nothing.
        learned_text: False where examples filled all rows of training.
    """

    loss: float
    recall: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    learned_text: bool = True

    @property
    def mean_recall(self) -> float:
        """The mean over tasks; 1 where none is trained on."""
        return sum(self.recall.values()) / len(self.recall) if self.recall else 1.0

    @property
    def score(self) -> float:
        """What the least of is chosen; infinite where the model is no use."""
        if not math.isfinite(self.loss):
            return math.inf
        return (self.loss if self.learned_text else 0.0) + (1.0 - self.mean_recall)


def trial_of(model: LanguageModel, config: TrainConfig) -> Trial:
    """Return what a model that has just been trained is judged by: its held-out loss is that of the run."""
    loss = model.provenance["metrics"]["validation_loss"]
    if loss is None:
        raise InputError("train.data.held_out: too little text is held out to choose a learning rate by")
    scores = {}
    for mixed in config.data.mixed:
        if mixed.fraction:
            task = task_of(mixed)
            examples = longest_examples(task, model.tokenizer, mixed.lengths[1], EXAMPLES_SEED)
            name = str(task) if task.label in scores else task.label
            scores[name] = recall(model, task, examples, model.tokenizer, config.batch_size, nullcontext)
    return Trial(float(loss), scores, learned_text=learns_text(config))


def learns_text(config: TrainConfig) -> bool:
    """Whether some rows of training hold text: those without an example, or with one that is shorter than they are."""
    mixed = [mixed for mixed in config.data.mixed if mixed.fraction]
    filled = all(m.fill or m.lengths[0] == config.longest for m in mixed)
    return sum(m.fraction for m in mixed) < 1 - 1e-9 or not filled


def best_rate(trials: Mapping[float, Trial]) -> float:
    """Return the learning rate of the least score, of equals the lower one. Raises InputError: all have diverged."""
    rate = min(trials, key=lambda rate: (trials[rate].score, rate))
    if math.isinf(trials[rate].score):
        raise InputError(f"training diverges at every learning rate: {trials[rate].fault or 'the loss is no number'}")
    return rate
