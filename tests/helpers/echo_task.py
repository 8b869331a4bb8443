"""A task of somebody else's, as the how-to page has one."""

from dataclasses import dataclass

import numpy as np

from rnn_longctx.tasks import Example, Task, TooShort


@dataclass(frozen=True)
class Echo(Task):
    """The first tokens of a line of random ones are said again at its end."""

    name = "echo"
    symbols: int = 16
    copied: int = 3

    def example(self, length, i, n, rng, tokenizer):
        if length < 2 * self.copied:
            raise TooShort("an echo", 2 * self.copied, length)
        ids = rng.integers(0, self.symbols, length)
        ids[-self.copied :] = ids[: self.copied]
        return Example(ids, np.arange(length) >= length - self.copied, about={"copied": self.copied})

    @property
    def vocab_size(self):
        return self.symbols
