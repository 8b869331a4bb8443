"""What a pilot measures, and in which order: the thinnest whole answer first, then more of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rnn_longctx.config import counted, format_length
from rnn_longctx.eval.jobs.base import Job
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.recall import Counts, Recall
from rnn_longctx.mitigations import standard
from rnn_longctx.tasks.base import Task
from rnn_longctx.tasks.qa import QuestionAnswering

PLAIN, CONTROLS, REMEDIES, HEADS, RECALL, FINALS, OTHERS = (
    "loss without a remedy",
    "controls",
    "remedies",
    "heads",
    "recall",
    "the best again, on more text",
    "other remedies",
)
STAGES = (PLAIN, CONTROLS, REMEDIES, HEADS, RECALL, FINALS, OTHERS)
FINALISTS = 3  # remedies that are measured again, on more text
SHORT = 4  # times as many slices are read at the training length, which takes little
FARTHEST_RECALL = 4  # training lengths: prompts, of which many are read, are not asked beyond
PROBED = 32  # training lengths at most that the probe reads


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: in tokens, the training length among them, and one beyond it at least.
        plain: the lengths at which the bare model alone is read: those, and longer ones where they take little.
        final: those at which the remedies that came out best are read.
        slices, prompts: of each text and task; final_slices, final_prompts: of the remedies that came out best.
    """

    lengths: tuple[int, ...]
    plain: tuple[int, ...]
    final: tuple[int, ...]
    slices: int
    prompts: int
    final_slices: int
    final_prompts: int

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def farthest(self) -> int:
        """The longest length that anything is read at, the bare model and the best remedies among them."""
        return max(*self.lengths, *self.plain, *self.final)


@dataclass(frozen=True)
class Step:
    """A measurement that is begun or not as a whole.

    Attributes:
        remedy: its canonical text, "none", or of a finalist that is not known yet what stands for it.
        job: what is measured; None: the heads, by a probe.
    """

    stage: str
    remedy: str
    job: Job | None
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called in the ledger and by a person."""
        lengths = format_length(self.lengths[-1])
        if self.job is None:
            return f"heads up to {lengths}"
        if isinstance(self.job, LossOverLength):
            return f"{self.remedy}: loss up to {lengths}, {counted(self.job.slices, 'slice')}"
        assert isinstance(self.job, Recall)
        return f"{self.remedy}: {self.job.label} up to {lengths}, {counted(self.job.counts.n, 'prompt')}"


def candidates(train_length: int) -> list[str]:
    """Return the remedies that are tried first: of each mechanism that has held a loss, the plainest setting for a
    model of that training length, the cheap ones first (docs/leaderboard.md)."""
    return [
        "a-floor",
        f"rri:alpha={1 - 1 / train_length:.6g},beta=1",
        "state-norm:every=64",
        "a-floor+state-norm:every=64",
        f"window:tokens={train_length}",
        "token-filter+state-norm:every=64",
    ]


def controls(train_length: int) -> list[str]:
    """Return the two controls that every remedy is judged against: forget, and read the last tokens again."""
    even = max(2, train_length // 2 * 2)
    return [f"recompute:last={even}", f"reset:every={train_length},overlap={train_length // 2}"]


def others(train_length: int) -> list[str]:
    """Return what else "all" stands for, without controls."""
    first = {*candidates(train_length), "none"}
    named = [text for text in standard(train_length) if text not in first]
    return [text for text in named if not text.startswith(("recompute:", "reset:", "reset-recurrence:"))]


def loss_job(slices: int, train_length: int) -> LossOverLength:
    return LossOverLength(slices=slices, tokens=slices * SHORT * train_length, most=slices * SHORT)


def recall_job(task: Task, prompts: int) -> Recall:
    """Return a job that asks so many prompts at every length, of a file of questions no more than it has."""
    n = min(prompts, len(task.questions.asked)) if isinstance(task, QuestionAnswering) else prompts
    return Recall(task, Counts(n=n, least=n, tokens=1))


def recall_lengths(lengths: Sequence[int], train_length: int, least: int = 0) -> tuple[int, ...]:
    """Return the two lengths that prompts of at least so many tokens are asked at: training's, or the first that they
    fit into, and the longest that is not too far."""
    within = [n for n in lengths if max(train_length, least) <= n <= max(FARTHEST_RECALL * train_length, least)]
    return tuple(dict.fromkeys((within[0], within[-1]))) if within else ()


# Tasks stand with the fewest tokens that their prompts take.
Tasks = Mapping[Task, int]


def _recalls(stage: str, name: str, tasks: Tasks, prompts: int, sizes: Sizes, train_length: int) -> list[Step]:
    steps = []
    for task, least in tasks.items():
        if lengths := recall_lengths(sizes.lengths, train_length, least):
            steps.append(Step(stage, name, recall_job(task, prompts), lengths))
    return steps


def first_steps(sizes: Sizes, train_length: int, tasks: Tasks, diagnoses: Sequence[str] = ()) -> list[Step]:
    """Return the steps up to the point from which the best remedies are known. diagnoses: more controls, of hybrids."""
    loss, lengths = loss_job(sizes.slices, train_length), sizes.lengths
    rivals, remedies = [*controls(train_length), *diagnoses], candidates(train_length)
    steps = [Step(PLAIN, "none", loss, sizes.plain)]
    steps += [Step(CONTROLS, name, loss, lengths) for name in rivals]
    steps += [Step(REMEDIES, name, loss, lengths) for name in remedies]
    steps.append(Step(HEADS, "none", None, (min(sizes.longest, PROBED * train_length),)))
    for name in ["none", *controls(train_length), *remedies]:
        its_tasks = {**tasks, **without_document(tasks)} if name == "none" else tasks
        steps += _recalls(RECALL, name, its_tasks, sizes.prompts, sizes, train_length)
    return steps


def without_document(tasks: Tasks) -> Tasks:
    """Return the controls of questions about documents: the same ones without the document."""
    with_document = {
        task: least for task, least in tasks.items() if isinstance(task, QuestionAnswering) and task.document
    }
    return {replace(task, document=False): least for task, least in with_document.items()}


def final_steps(sizes: Sizes, train_length: int, tasks: Tasks, finalists: Sequence[str]) -> list[Step]:
    """Return the steps that measure the best remedies, none and the controls again on more or longer stretches of text,
    and with more prompts; none where the first ones have read as much."""
    names = ["none", *controls(train_length), *finalists]
    steps = []
    if sizes.final_slices > sizes.slices or sizes.final != sizes.lengths:
        loss = loss_job(sizes.final_slices, train_length)
        steps += [Step(FINALS, name, loss, sizes.final) for name in names]
    more = {t: n for t, n in tasks.items() if counts(t, sizes.final_prompts) > counts(t, sizes.prompts)}
    for name in names:
        steps += _recalls(FINALS, name, more, sizes.final_prompts, sizes, train_length)
    return steps


def counts(task: Task, prompts: int) -> int:
    """Return how many prompts of a task are asked."""
    return recall_job(task, prompts).counts.n


def other_steps(sizes: Sizes, train_length: int, tasks: Tasks) -> list[Step]:
    """Return the steps of the remedies that seldom help: they come last."""
    steps = []
    for name in others(train_length):
        steps.append(Step(OTHERS, name, loss_job(sizes.slices, train_length), sizes.lengths))
        steps += _recalls(OTHERS, name, tasks, sizes.prompts, sizes, train_length)
    return steps
