"""State capacity: the training length from which a model forgets, the context it recalls, and the state they take."""

from rnn_longctx.eval.capacity.advise import Advice, advise
from rnn_longctx.eval.capacity.config import CapacityConfig, MeasureConfig
from rnn_longctx.eval.capacity.figures import draw
from rnn_longctx.eval.capacity.measure import check, measure, t_recall
from rnn_longctx.eval.capacity.recall import Recall
from rnn_longctx.eval.capacity.study import run_study

__all__ = [
    "Advice",
    "CapacityConfig",
    "MeasureConfig",
    "Recall",
    "advise",
    "check",
    "draw",
    "measure",
    "run_study",
    "t_recall",
]
