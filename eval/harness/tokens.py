"""How lm-eval's texts become token ids, and answers text: as its own HFLM has it, by the tokenizer's own rules.

Raw texts are read otherwise in this library (nothing is added, and text is never read as a special token). A prompt of
lm-eval begins with BOS where the tokenizer begins with it, and chat markers and other special tokens in it are one id
each. Unlike HFLM, nothing is put behind a text: HFLM scores the end token that a tokenizer such as ByT5's or BERT's
appends in the place of a continuation's first token, and lets the model go on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rnn_longctx.errors import InputError


class PromptTokenizer:
    """A model's tokenizer, which reads text as lm-eval's prompts are read.

    Attributes:
        full: the tokenizer of transformers, or None (bytes).
        begin: the ids that are put before a text.
        prefix_id: what an empty context is: BOS, else EOS, else what a text begins with, else a newline. Raises
            InputError where the tokenizer has none of them.
    """

    def __init__(self, tokenizer: Any, add_bos_token: bool | None = None, prefix_token_id: int | None = None):
        """add_bos_token: whether texts begin with BOS; None: where the tokenizer does. Raises InputError where it has
        none."""
        if add_bos_token not in (None, False, True):
            raise InputError(f"add_bos_token: expected True, False or None, got {add_bos_token!r:.60}")
        self.plain = tokenizer
        self.full = tokenizer.transformers() if hasattr(tokenizer, "transformers") else None
        self.bos_id = None if self.full is None else self.full.bos_token_id
        self.eos_id = tokenizer.eos_id if self.full is None else self.full.eos_token_id
        self.eos_id = tokenizer.eos_id if self.eos_id is None else self.eos_id
        begin = [] if self.full is None or add_bos_token is False else _begin(self.full)
        if add_bos_token and not begin:
            if self.bos_id is None:
                raise InputError(f"add_bos_token: tokenizer {tokenizer.name} has no BOS token; leave the option out")
            begin = [self.bos_id]
        self.begin: list[int] = begin
        self._prefixes = [i for i in (prefix_token_id, self.bos_id, self.eos_id, *begin) if i is not None]

    @property
    def prefix_id(self) -> int:
        # (a newline alone may be another token than one in a text, after a letter)
        newline = self.encode("x\n", False)[len(self.encode("x", False)) :] if not self._prefixes else []
        if not (ids := [*self._prefixes, *newline]):
            raise InputError(f"tokenizer {self.plain.name} has nothing to begin a text with: give prefix_token_id")
        return int(ids[0])

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of a text. add_special_tokens: with `begin` before it; None: unless it says BOS itself."""
        if self.full is None:
            return list(self.plain.encode(text).tolist())
        ids: list[int] = self.full.encode(text, add_special_tokens=False)
        bos = self.full.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and text.startswith(bos))
        return [*self.begin, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        ids = [i for i in ids if i != self.eos_id] if skip_special_tokens else list(ids)
        if self.full is None:
            return str(self.plain.decode(ids))
        return str(self.full.decode(ids, skip_special_tokens=skip_special_tokens))


def _begin(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer of transformers puts before a text, and not those that it puts behind."""
    text = next((t for t in ("a", "1", ".", "我") if tokenizer.encode(t, add_special_tokens=False)), "")
    plain, whole = (tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []
