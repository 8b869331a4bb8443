"""Architectures compared: trained alike, of equal size, each at its best learning rate, and measured alike."""

from rnn_longctx.eval.compare.config import CompareConfig
from rnn_longctx.eval.compare.study import run_study

__all__ = ["CompareConfig", "run_study"]
