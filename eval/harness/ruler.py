"""RULER's tasks of lm-eval, made at the length that is read.

lm-eval's own makers step coarsely (`niah_single_1` at 4096 bytes reads 2,600), count a worked example that is in no
prompt (`ruler_cwe`), make 500 prompts whatever the limit, draw from generators that nobody seeds, and try for ever
where the smallest prompt does not fit. Here its texts get as many pieces of filler as fit into the length with all
that the model reads before its answer (RULER counts the answer too), and what is drawn depends on the seed, the task,
the length and the number of the prompt alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np

from rnn_longctx.errors import InputError

# module of lm_eval.tasks.ruler: (what in it makes the prompts of one length, the method below that does it here)
MAKERS = {
    "niah_utils": ("generate_samples", "niah"),
    "cwe_utils": ("get_dataset", "cwe"),
    "vt_utils": ("get_dataset", "vt"),
    "fwe_utils": ("get_dataset", "fwe"),
    "qa_utils": ("get_dataset", "qa"),
}
# task: (its module, its function there); niah_* are functions of niah_utils
TASKS = {
    "ruler_cwe": ("cwe_utils", "get_cw_dataset"),
    "ruler_vt": ("vt_utils", "get_vt_dataset"),
    "ruler_fwe": ("fwe_utils", "fwe_download"),
    "ruler_qa_squad": ("qa_utils", "get_squad"),
    "ruler_qa_hotpot": ("qa_utils", "get_hotpotqa"),
}
SAMPLES = 500  # lm-eval's
EXAMPLE = 500  # tokens of the worked example of variable tracking, with its answer
Doc = dict[str, Any]


class TooShort(InputError):
    """The smallest prompt of a task does not fit into a length."""


def is_ruler(task: str, path: Any) -> bool:
    """Return whether a task is one of RULER's, by its name and the file that lm-eval has it from."""
    return (task in TASKS or task.startswith("niah_")) and "lm_eval/tasks/ruler/" in str(path).replace("\\", "/")


def maker(task: str, length: int, count: Callable[[str], int], limit: int | None, seed: int) -> Callable[..., Any]:
    """Return the `custom_dataset` of one of RULER's tasks at a length.

    Args:
        count: the tokens that the model reads of a prompt.
        limit: how many prompts are made; None: lm-eval's 500.
    """

    def make(**metadata: Any) -> Any:
        place, function = TASKS.get(task, ("niah_utils", task))
        module = import_module(f"lm_eval.tasks.ruler.{place}")
        sampler, method = MAKERS[place]
        ours = getattr(_Maker(task, length, count, limit or SAMPLES, seed), method)
        with patch.object(module, sampler, ours), patch.object(module, "get_tokenizer", lambda *_: None), restored():
            return getattr(module, function)(**metadata | {"max_seq_lengths": [length]})

    return make


@contextmanager
def restored() -> Iterator[None]:
    """Leave the generators of `random` and numpy as they were."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def draw_from(*what: Any) -> int:
    """Seed the generators of `random` and numpy by what is drawn, and return that seed."""
    seed = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    return seed


@dataclass(frozen=True)
class Filler:
    """The pieces that prompts are filled up with.

    Attributes:
        least: pieces that a prompt cannot do without, for all or by its number.
        most: pieces that there are; None: any number.
        delimiter: what stands between a prompt and what is put before its answer.
    """

    least: int | Callable[[int], int]
    most: int | None = None
    delimiter: str = " "


class _Maker:
    """A maker of the prompts of one task and length."""

    def __init__(self, task: str, length: int, count: Callable[[str], int], samples: int, seed: int):
        self.task, self.length, self.count, self.samples, self.seed = task, length, count, samples, seed

    # Each of these stands in for one of lm-eval's functions and takes its arguments.

    def niah(self, haystack: Any, **needles: Any) -> list[Doc]:
        module = import_module("lm_eval.tasks.ruler.prepare_niah")
        names = ("template", "type_haystack", "type_needle_k", "type_needle_v")
        wording = {name: needles[name] for name in names}
        values, queries = needles.get("num_needle_v", 1), needles.get("num_needle_q", 1)
        keys = max(needles.get("num_needle_k", 1), queries)
        counts = {"num_needle_k": keys, "num_needle_v": values, "num_needle_q": queries}
        kind = needles["type_needle_v"]
        what, verb = (kind[:-1], "is") if queries * values == 1 else (kind, "are")

        def make(pieces: int, index: int) -> Doc:
            text, answers, query = module.generate_input_output(pieces, haystack, **wording, **counts)
            prefix = f"The special magic {what} for {query} mentioned in the provided text {verb}"
            return {"input": text, "outputs": answers, "gen_prefix": prefix}

        most = len(haystack) if needles["type_haystack"] == "essay" else None
        return self._filled(make, Filler(keys * values, most))

    def cwe(self, *_: Any, **__: Any) -> list[Doc]:
        module = import_module("lm_eval.tasks.ruler.cwe_utils")

        def make_as(size: int) -> Callable[[int, int], Doc]:
            def make(words: int, index: int) -> Doc:
                module.RNG.seed(random.getrandbits(32))
                _, text, answer = module.generate_input_output(words, size)
                return _cut(text, module.CONFIG["answer_prefix"]) | {"outputs": answer}

            return make

        # From 4096 tokens on the common words stand there 30 times each, which leaves bytes no room for others.
        often, seldom = make_as(max(self.length, 4096)), make_as(4095)
        roomy = self.length >= 4096 and self._size(self._draw(often, 40, 0)) <= self.length
        return self._filled(often if roomy else seldom, Filler(11, len(module.WORDS), "\n\n"))

    def fwe(self, *_: Any, **__: Any) -> list[Doc]:
        module = import_module("lm_eval.tasks.ruler.fwe_utils")

        def make(words: int, index: int) -> Doc:
            # with a limit that no text meets, it has the words that it is told to
            text, answer, _ = module.generate_input_output(
                1 << 60, _no_tokens, num_words=words, vocab_size=max(20, self.length // 50)
            )
            return _cut(text, module.CONFIG["answer_prefix"]) | {"outputs": answer}

        return self._filled(make, Filler(100))  # of fewer words the third and the fourth stand there equally often

    def vt(self, *_: Any, **__: Any) -> list[Doc]:
        module = import_module("lm_eval.tasks.ruler.vt_utils")
        begin = module.CONFIG["variable_tracking"]["template"][:20]

        def example(noises: int) -> str:
            draw_from(self.seed, self.task, self.length, "example")
            text, answer = module.generate_input_output(noises, 1, 4, is_icl=True)
            return f"{text} {' '.join(answer)}\n\n"

        # lm-eval tries for ever where five sentences of noise do not fit
        noises = next((n for n in range(20, 1, -1) if self.count(example(n)) <= EXAMPLE), 1)
        shown = example(noises)

        def make(noises: int, index: int) -> Doc:
            text, answer = module.generate_input_output(noises, 1, 4)
            at = text.index(begin)
            text = f"{text[:at]}{module.randomize_icl(shown)}\n\n{text[at:]}"
            return _cut(text, " Answer: According to the chain(s) of variable assignment") | {"outputs": answer}

        return self._filled(make, Filler(1))

    def qa(self, tokenizer: Any, docs: list[str], qas: list[Any], **_: Any) -> list[Doc]:
        module = import_module("lm_eval.tasks.ruler.qa_utils")

        def make(documents: int, index: int) -> Doc:
            text, answer = module.generate_input_output(index, documents, qas=qas, docs=docs)
            return {"input": text, "outputs": answer, "gen_prefix": "Answer:"}

        # with all documents lm-eval shuffles the list that the questions point into
        filler = Filler(lambda index: len(qas[index]["context"]), len(docs) - 1)
        return self._filled(make, filler, questions=len(qas))

    # --- all of them

    def _draw(self, make: Callable[[int, int], Doc], pieces: int, index: int) -> Doc:
        draw_from(self.seed, self.task, self.length, index)
        return make(pieces, index)

    def _size(self, doc: Doc, delimiter: str = " ") -> int:
        return self.count(f"{doc['input']}{delimiter}{doc['gen_prefix']}")

    def _filled(self, make: Callable[[int, int], Doc], filler: Filler, questions: int | None = None) -> list[Doc]:
        """Return prompts with as many pieces of filler as fit into the length.

        Args:
            make: a prompt of a number of pieces, and its own number.
            questions: there are so many, and those whose smallest prompt does not fit are passed over.
        Raises:
            TooShort: no prompt fits.
        """
        docs: list[Doc] = []
        pieces, smallest = 0, 0
        for index in range(self.samples if questions is None else questions):
            doc, pieces, size = self._largest(make, index, filler, pieces)
            if size > self.length:
                smallest = min(smallest or size, size)
                if questions is None:
                    break
                continue
            docs.append(doc | {"index": index, "length": size, "max_length": self.length})
            if len(docs) == self.samples:
                return docs
        if smallest and (questions is None or not docs):
            least = f"task {self.task} takes at least {smallest} tokens of this tokenizer"
            raise TooShort(f"{least}; {self.length} were asked for")
        return docs

    def _largest(self, make: Callable[[int, int], Doc], index: int, filler: Filler, guess: int) -> tuple[Doc, int, int]:
        """Return (prompt, its pieces, its tokens) with the most pieces that fit, looked for from a guess on; or the
        smallest."""
        least = filler.least if isinstance(filler.least, int) else filler.least(index)
        top = 1 << 60 if filler.most is None else filler.most
        guess = max(guess, least + 1)
        best = self._draw(make, least, index)
        low, size = least, self._size(best, filler.delimiter)
        first, rise = size, 0.0
        for _ in range(20):
            n = min(guess, top)
            if size > self.length or n <= low:
                break
            doc = self._draw(make, n, index)
            tokens = self._size(doc, filler.delimiter)
            rise = max((tokens - first) / (n - least), 1e-3)  # tokens a piece
            if tokens <= self.length:
                best, low, size = doc, n, tokens
            else:
                top = n - 1
            guess = low + int((self.length - size) / rise)
        return best, low, size


def _cut(text: str, prefix: str) -> Doc:
    """Return a prompt and what is put before its answer."""
    at = text.rfind(prefix)
    return {"input": text[:at].strip(), "gen_prefix": text[at:].strip()}


class _NoTokens:
    input_ids: tuple[int, ...] = ()


def _no_tokens(text: str) -> _NoTokens:
    return _NoTokens()
