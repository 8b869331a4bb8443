"""A watch over the states of a model in use."""

from rnn_longctx.probes.monitor.monitor import CollapseMonitor

__all__ = ["CollapseMonitor"]
