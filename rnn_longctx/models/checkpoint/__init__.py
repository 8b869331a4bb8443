"""Checkpoints: formats in and out."""

from rnn_longctx.models.checkpoint.load import load
from rnn_longctx.models.checkpoint.save import save

__all__ = ["load", "save"]
