"""Checkpoints: formats in and out."""

from rnn_longctx.models.checkpoint.checkpoint import load, save

__all__ = ["load", "save"]
