"""What a model is asked and what is right, one file a task, for training and for measuring alike."""

from rnn_longctx.tasks.base import TASKS, Example, Task, TooShort

__all__ = ["TASKS", "Example", "Task", "TooShort"]
