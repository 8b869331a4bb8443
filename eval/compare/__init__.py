"""Architectures compared: trained alike, of equal size, each at its best learning rate, and measured alike; or how
their time and memory grow."""

from __future__ import annotations

from pathlib import Path

from rnn_longctx.config import load_yaml, read_yaml
from rnn_longctx.eval.compare.config import CompareConfig
from rnn_longctx.eval.compare.growth import GrowthConfig, run_growth
from rnn_longctx.eval.compare.study import run_study

__all__ = ["CompareConfig", "GrowthConfig", "load_comparison", "run_growth", "run_study"]


def load_comparison(path: str | Path) -> CompareConfig | GrowthConfig:
    """Return what a YAML file compares: growth, where it says `measure: growth`, or trained models. Raises InputError:
    see `load_yaml`."""
    if read_yaml(path).get("measure") == "growth":
        return load_yaml(GrowthConfig, path)
    return load_yaml(CompareConfig, path)
