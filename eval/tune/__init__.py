"""Parameters of a mixer or a remedy tuned under a budget of time and memory, and the tuned setting set against the
default on held-out data."""

from __future__ import annotations

from rnn_longctx.eval.tune.mixer import MixerProblem
from rnn_longctx.eval.tune.remedy import RemedyProblem
from rnn_longctx.eval.tune.run import Budget, run_tune

__all__ = ["Budget", "MixerProblem", "RemedyProblem", "run_tune"]
