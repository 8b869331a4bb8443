"""RULER's makers of data in lm-eval that never end: where their smallest prompt does not fit, they try it for ever.

`ruler_vt` begins with a worked example of at most 500 tokens, whatever the length; `ruler_cwe` with ten words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from rnn_longctx.errors import InputError

EXAMPLE, VT_ANSWER, CWE_ANSWER = 500, 30, 120  # tokens, in lm-eval's files


def check_it_ends(task: str, length: int, count: Callable[[str], int]) -> None:
    """Raise InputError where lm-eval would look for a prompt of `length` tokens for ever. count: tokens of a text."""
    if task not in ("ruler_vt", "ruler_cwe"):
        return
    drawn = random.getstate(), np.random.get_state()  # what lm-eval makes is to be what it is without this look
    try:
        if task == "ruler_vt":
            made: Any = import_module("lm_eval.tasks.ruler.vt_utils")
            example = count(made.generate_input_output(5, 1, 4, is_icl=True)[0]) + VT_ANSWER
            if example > EXAMPLE:
                raise InputError(f"task ruler_vt has a worked example of at most {EXAMPLE} tokens, and the shortest "
                                 f"takes {example} of this tokenizer: leave it out")  # fmt: skip
            least = example + count(made.generate_input_output(10, 1, 4)[0]) + VT_ANSWER
        else:
            made = import_module("lm_eval.tasks.ruler.cwe_utils")
            before = made.RNG.getstate()
            least = count(made.generate_input_output(10, length)[1]) + CWE_ANSWER
            made.RNG.setstate(before)
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
    if least > length:
        raise InputError(f"task {task} takes at least {least} tokens of this tokenizer; {length} were asked for")
