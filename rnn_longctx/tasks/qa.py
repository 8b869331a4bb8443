"""A person's own questions about their own documents, from a file of JSON Lines, one object a line:

    {"document": "reports/2024.txt", "question": "Who signed it?", "answer": "Ada Lovelace", "answers": ["A. Lovelace"]}

`document` is the path of a text, seen from the folder of the file, or the text itself; `answers` are more answers that
are right. A prompt ends with the question, and the document stands before it: its last tokens where it is too long,
and behind others of the file's documents where it is too short. With `document=false` the same questions are asked
behind filler in the place of the document: what is answered then, the model knew or guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rnn_longctx.config import home_path
from rnn_longctx.data.content import read_text
from rnn_longctx.data.tokenizers import Tokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.spec import quiet
from rnn_longctx.tasks.base import TASKS, Example, Task, TooShort
from rnn_longctx.tasks.prompts import FILLER, piece, reply_to

WORDING = "\n\nQuestion: {0}\nAnswer:"
BETWEEN = "\n\n"  # stands between two documents
FIELDS = ("document", "question", "answer", "answers")


@dataclass(frozen=True)
class Asked:
    """A question, the document that answers it, and the answers that are right, the first of which is the usual one."""

    document: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """What a file holds; digest: of all that is in it and in its documents, shortened."""

    asked: tuple[Asked, ...]
    digest: str


@TASKS.register
@dataclass(frozen=True)
class QuestionAnswering(Task):
    """file: JSON Lines of questions; document: whether the document is there to be read."""

    name = "qa"
    generated = True
    answer_loss = True
    examples = tuple(f"qa:file={Path(__file__).with_name('qa.jsonl')}{more}" for more in ("", ",document=false"))

    file: str
    document: bool = quiet(True)

    def __post_init__(self) -> None:
        self.questions  # noqa: B018 (is read when made)

    @property
    def questions(self) -> Questions:
        path = home_path(self.file)
        try:
            return _read(path, path.stat().st_mtime_ns)
        except OSError as error:
            raise InputError(f"{self.name}: cannot read {self.file}: {error.strerror or error}") from None

    def generator(self, seed: int, length: int, i: int) -> np.random.Generator:
        """Return the random numbers that say in which order the questions are asked: the same for every example and
        length, so that each is asked once before one is asked again, and lengths compare."""
        return np.random.default_rng([seed])

    def example(self, length: int, i: int, n: int, rng: np.random.Generator, tokenizer: Tokenizer) -> Example:
        asked = self.questions.asked
        row = int(rng.permutation(len(asked))[i % len(asked)])
        wording = WORDING.replace("{0}", asked[row].question)
        question = piece(tokenizer, asked[row].document[-20:] if self.document else FILLER, wording)
        reply = reply_to(tokenizer, wording, asked[row].answers[0])
        room = length - len(question)
        if room < 1:
            raise TooShort("a question and a token before it", len(question) + 1, length)
        if not len(reply):
            raise InputError(f"tokenizer {tokenizer.name} cannot say the answer of question {row + 1} of {self.file}")
        ids = np.concatenate([self._context(row, room, tokenizer), question, reply])
        longest = max(len(reply_to(tokenizer, wording, answer)) for answer in asked[row].answers)
        # two more: a model may part the answer otherwise, and the token after it shows that it ends
        return Example(ids, np.arange(len(ids)) >= length, about={"question": row}, new_tokens=longest + 2)

    def _context(self, row: int, room: int, tokenizer: Tokenizer) -> np.ndarray:
        """Return `room` tokens that end with the document of a question."""
        pieces: list[np.ndarray] = []
        missing = room
        for document in self._documents(row):
            pieces.append(_encoded(tokenizer, document))
            missing -= len(pieces[-1])
            if missing <= 0:
                break
            pieces.append(_encoded(tokenizer, BETWEEN))
            missing -= len(pieces[-1])
        if missing > 0:
            filler = piece(tokenizer, FILLER, FILLER)
            pieces.append(np.tile(filler, -(-missing // len(filler))))
        return np.concatenate(pieces[::-1])[-room:]

    def _documents(self, row: int) -> Iterator[str]:
        """Yield the documents that stand before a question, the last first: its own, then others again and again."""
        if not self.document:
            return
        documents = list(dict.fromkeys(asked.document for asked in self.questions.asked))
        first = documents.index(self.questions.asked[row].document)
        yield documents[first]
        others = documents[first + 1 :] + documents[:first]
        while others:
            yield from others

    def right(self, reply: np.ndarray, example: Example, tokenizer: Tokenizer) -> float:
        """Return whether the reply begins with one of the answers that are right, and the word that ends it ends there:
        a model that was not taught to stop goes on. Capitals and runs of spaces do not count."""
        answers = self.questions.asked[int(example.about["question"])].answers
        said = _plain(tokenizer.decode(reply.tolist()))
        return float(any(said.startswith(a) and _ends(a, said[len(a) :]) for a in map(_plain, answers)))

    @property
    def label(self) -> str:
        return f"{self.name}-{Path(self.file).stem}" + ("" if self.document else "-without-document")

    @property
    def text(self) -> str:
        return f"{Path(self.file).stem} {self.questions.digest}"


def _ends(answer: str, rest: str) -> bool:
    """Return whether an answer's last word ends before the rest of a reply: 12 does not before 5, nor before .5."""
    number_goes_on = answer[-1:].isdigit() and re.match(r"[.,-]\d", rest) is not None
    return not rest[:1].isalnum() and not number_goes_on


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


@lru_cache(64)
def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of a document, remembered: it is asked about at many lengths and under many remedies."""
    return piece(tokenizer, "\n", text)


@lru_cache(16)
def _read(path: Path, changed: int) -> Questions:
    """Read a file of questions; `changed` makes one that has changed another. Messages name its lines and hold nothing
    of what stands there: it may be a person's own.

    Raises:
        InputError: a line that is no question, a document that is missing or no text, no question at all.
    """
    asked: list[Asked] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                asked.append(_asked(line, path.parent))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from None
    if not asked:
        raise InputError(f"{path} holds no questions: one JSON object a line, with document, question and answer")
    digest = hashlib.sha256(json.dumps([vars(one) for one in asked]).encode()).hexdigest()[:16]
    return Questions(tuple(asked), digest)


def _asked(line: bytes, folder: Path) -> Asked:
    """Return the question of a line. Raises InputError for what is none."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise InputError("not a question: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise InputError(f"expected an object with {', '.join(FIELDS[:3])}, got {type(record).__name__}")
    document, question = (_text(record, name) for name in ("document", "question"))
    more = record.get("answers", [])
    if not isinstance(more, list) or not all(isinstance(answer, str) for answer in more):
        raise InputError("answers is a list of texts")
    given = [_text(record, "answer")] if "answer" in record or not more else []
    answers = tuple(dict.fromkeys(text for text in map(_clean, [*given, *more]) if text))
    if not answers:
        raise InputError("answers holds no text")
    return Asked(_document(document, folder), question, answers)


def _text(record: dict[Any, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not (value := _clean(value)):
        raise InputError(f"{name} is a text that is not empty, got {'none' if value is None else type(value).__name__}")
    return value


def _clean(text: str) -> str:
    """Return a text without NUL and halves of surrogate pairs, which JSON can hold, and without spaces at its ends."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def _document(value: str, folder: Path) -> str:
    """Return a document: of a file where there is one of that name, else the text itself, where it looks like
    no file's name.

    Raises:
        InputError: neither is there; a file that cannot be read, or is no text.
    """
    path = folder / value if len(value) <= 1024 and "\n" not in value else None
    try:
        is_file = path is not None and path.is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file and path is not None:
        if text := _clean(read_text(path).decode("utf-8", "replace")):
            return text
        raise InputError(f"the document {value} is empty")
    if _names_a_file(value):
        raise InputError(f"there is no document {value}: expected a file beside the questions, or the text itself")
    return value


def _names_a_file(value: str) -> bool:
    """Return whether a text looks like the name of a file: one short word of ASCII with a suffix or a folder."""
    one_word = value.isascii() and len(value.split()) == 1 and len(value) <= 255
    return one_word and ("/" in value or Path(value).suffix != "")
